"""A bank: SAEs of one shape at several sites, stacked and trained as batched matrix products.

Every SAE keeps its own seed, weights, dead counters and statistics; the loss of the bank is the sum of
the members' losses, so no gradient passes between them.

Inside the bank W_enc is kept as rows [n_saes, d_sae, d_in] (the transpose of the published W_enc), and
the decoder's bias is subtracted from the input as part of the encoder's bias:
pre = x W_enc + (b_enc - b_dec W_enc).
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from atlas.configs import SAEConfig
from atlas.sae.sparse import Pattern, selected_preactivations, sparse_decode
from atlas.sae.topk import top_k

PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


class BankLoss(NamedTuple):
    """One batch's losses per SAE (means over tokens; squared errors summed over d_in) and what fired."""

    mse: Float[Tensor, " n_saes"]
    sparsity: Float[Tensor, " n_saes"]
    aux: Float[Tensor, " n_saes"]
    l0: Float[Tensor, " n_saes"]
    fired: Bool[Tensor, "n_saes d_sae"]

    @property
    def total(self) -> Float[Tensor, ""]:
        """What the optimiser minimises."""
        return (self.mse + self.sparsity + self.aux).sum()


def seed_of(seed: int, name: str) -> int:
    """A seed for one SAE, from the run's seed and the SAE's name, whatever its company in the bank."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


class Bank:
    """The parameters of SAEs of one shape and their loss."""

    def __init__(
        self, config: SAEConfig, d_in: int, names: Sequence[str], seed: int, device: torch.device
    ) -> None:
        self.config, self.d_in, self.d_sae, self.names = config, d_in, config.width(d_in), tuple(names)
        directions = [self._unit_rows(seed_of(seed, name)) for name in names]
        self.W_dec = torch.stack(directions).to(device).requires_grad_()
        self.W_enc = torch.stack(directions).to(device).requires_grad_()
        self.b_enc = torch.zeros(len(names), self.d_sae, device=device, requires_grad=True)
        self.b_dec = torch.zeros(len(names), d_in, device=device, requires_grad=True)

    def _unit_rows(self, seed: int) -> Float[Tensor, "d_sae d_in"]:
        rows = torch.randn(self.d_sae, self.d_in, generator=torch.Generator().manual_seed(seed))
        return rows / rows.norm(dim=1, keepdim=True)

    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def loss(self, x: Float[Tensor, "n_saes batch d_in"], dead: Bool[Tensor, "n_saes d_sae"]) -> BankLoss:
        """The members' losses on a batch; ``dead`` features help with the AuxK loss of TopK."""
        bias = self.b_enc - (self.W_enc @ self.b_dec[:, :, None]).squeeze(2)
        if self.config.architecture == "topk":
            return self._topk_loss(x, bias, dead)
        return self._relu_loss(x, bias)

    def _relu_loss(self, x: Tensor, bias: Tensor) -> BankLoss:
        f = torch.baddbmm(bias[:, None], x, self.W_enc.transpose(1, 2)).relu()
        error = torch.baddbmm(self.b_dec[:, None], f, self.W_dec) - x
        mse = error.square().sum(2).mean(1)
        sparsity = self.config.l1_coefficient * f.sum(2).mean(1)
        active = f.detach() > 0
        l0 = active.sum(2).float().mean(1)
        return BankLoss(mse, sparsity, torch.zeros_like(mse), l0, active.any(1))

    def _topk_loss(self, x: Tensor, bias: Tensor, dead: Tensor) -> BankLoss:
        n, batch, d_in = x.shape
        with torch.no_grad():
            pre = torch.baddbmm(bias[:, None], x, self.W_enc.transpose(1, 2))
            selected, index = top_k(pre.reshape(n * batch, self.d_sae), min(self.config.k, self.d_sae))
        member = torch.arange(n, device=x.device).repeat_interleave(batch)
        pattern = Pattern(index + member[:, None] * self.d_sae, n * self.d_sae)
        values = selected_preactivations(
            x.reshape(-1, d_in), self.W_enc.reshape(-1, d_in), bias.reshape(-1), selected, pattern
        ).relu()
        x_hat = sparse_decode(values, self.W_dec.reshape(-1, d_in), pattern).reshape(x.shape)
        error = x - x_hat - self.b_dec[:, None]
        positive = (values.detach() > 0).to(x.dtype)
        fired = (pattern.sum_by_feature(positive) > 0).reshape(n, self.d_sae)
        aux = self._aux_loss(x, bias, pre, error.detach(), dead)
        l0 = positive.sum(1).reshape(n, batch).mean(1)
        return BankLoss(error.square().sum(2).mean(1), torch.zeros_like(aux), aux, l0, fired)

    def _aux_loss(self, x: Tensor, bias: Tensor, pre: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """AuxK: the dead features of largest pre-activation try to explain what the live ones leave.

        Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section A.2.
        """
        losses = []
        for s in range(len(x)):
            numbers = dead[s].nonzero().squeeze(1)
            k = min(self.config.aux_k, len(numbers))
            if k == 0 or self.config.aux_coefficient == 0:
                losses.append(x.new_zeros(()))
                continue
            selected, index = top_k(pre[s][:, numbers], k)
            pattern = Pattern(numbers[index], self.d_sae)
            values = selected_preactivations(x[s], self.W_enc[s], bias[s], selected, pattern).relu()
            rest = error[s] - sparse_decode(values, self.W_dec[s], pattern)
            losses.append(self.config.aux_coefficient * rest.square().sum(1).mean())
        return torch.stack(losses)

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Take out of each decoder row's gradient the part along the row, which renormalising undoes."""
        grad = self.W_dec.grad
        if grad is not None:
            grad -= (grad * self.W_dec).sum(2, keepdim=True) * self.W_dec

    @torch.no_grad()
    def renormalise(self) -> None:
        """Bring decoder rows back to norm 1."""
        self.W_dec /= self.W_dec.norm(dim=2, keepdim=True).clamp_min(1e-8)
