"""A bank: SAEs of one shape, stacked and trained as batched matrix products.

Every SAE keeps its own seed, weights, coefficient, dead counters and statistics; no gradient passes between
members, so each trains as it would alone. Members are worked off a few at a time, as many as keep the
pre-activations of a batch inside the processor's caches.

    loss = mse_coefficient * ||x - x^||^2 + coefficient * penalty + auxiliary + objective

each a mean over tokens, with x scaled to a mean squared norm of d_in.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from atlas.configs import SAEConfig
from atlas.sae.forward import FORWARD, Forward, Params, squared_error, start_size
from atlas.sae.revive import revival_loss

SLICE_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Pre-activations that are worked on at once, by kind of device."""

Objective = Callable[[slice, Params, Forward], Float[Tensor, " n"]]


class BankLoss(NamedTuple):
    """One batch's losses per SAE (means over tokens, with their coefficients) and what fired."""

    mse: Float[Tensor, " n_saes"]
    """Squared error of the reconstruction, without coefficient."""
    total: Float[Tensor, " n_saes"]
    """What the optimiser minimises."""
    sparsity: Float[Tensor, " n_saes"]
    aux: Float[Tensor, " n_saes"]
    objective: Float[Tensor, " n_saes"]
    firings: Float[Tensor, "n_saes d_sae"]
    """Tokens on which each feature fires."""
    least: Float[Tensor, " n_saes"]
    """BatchTopK: smallest kept activation."""
    peak: Float[Tensor, "n_saes watched"]
    """Strongest activation of the watched features."""


def seed_of(seed: int, name: str) -> int:
    """A seed for one SAE, from the run's seed and the SAE's name, whatever its company in the bank."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


def parameter_names(config: SAEConfig) -> tuple[str, ...]:
    """The tensors that an architecture trains."""
    extra = {"gated": ("b_gate", "r_mag"), "jumprelu": ("log_threshold",)}
    bias = ("b_dec",) if config.decoder_bias else ()
    return ("W_enc", "b_enc", "W_dec", *bias, *extra.get(config.architecture, ()))


class Bank:
    """The parameters of SAEs of one shape, and their losses and gradients.

    ``configs`` has one config per SAE; they may differ in k, in the coefficients and in the label.
    """

    def __init__(
        self,
        configs: Sequence[SAEConfig],
        d_in: int,
        names: Sequence[str],
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.configs, self.config = tuple(configs), configs[0]
        self.d_in, self.d_sae = d_in, configs[0].width(d_in)
        self.names, self.dtype = tuple(names), dtype
        n, zeros, size = len(names), torch.zeros, start_size(self.config, d_in, self.d_sae)
        directions = [self._unit_rows(seed_of(seed, name)) for name in names]
        self.W_dec = torch.stack(directions).to(device)
        if not self.config.tied_start:
            directions = [self._unit_rows(seed_of(seed, f"{name}/encoder")) for name in names]
        self.W_enc = torch.stack(directions).to(device) * size
        self.b_enc = zeros(n, self.d_sae, device=device)
        self.b_dec = zeros(n, d_in, device=device)
        if self.config.architecture == "gated":
            self.b_gate = zeros(n, self.d_sae, device=device)
            self.r_mag = zeros(n, self.d_sae, device=device)
        if self.config.architecture == "jumprelu":
            start = torch.full((n, self.d_sae), math.log(self.config.threshold * size))
            self.log_threshold = start.to(device)

    def _unit_rows(self, seed: int) -> Float[Tensor, "d_sae d_in"]:
        rows = torch.randn(self.d_sae, self.d_in, generator=torch.Generator().manual_seed(seed))
        return rows / rows.norm(dim=1, keepdim=True)

    def __len__(self) -> int:
        return len(self.names)

    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name, each with one row per SAE."""
        return {name: getattr(self, name) for name in parameter_names(self.config)}

    def slices(self, batch: int) -> list[slice]:
        """Runs of members that are worked on together; one at a time where each runs the whole model."""
        if self.config.objective == "kl":
            return [slice(i, i + 1) for i in range(len(self))]
        most = SLICE_ELEMENTS["cuda" if self.W_dec.is_cuda else "cpu"]
        size = max(1, most // (batch * self.d_sae))
        return [slice(i, min(i + size, len(self))) for i in range(0, len(self), size)]

    def _leaves(self, which: slice) -> dict[str, Tensor]:
        leaves = {name: p[which].detach().requires_grad_() for name, p in self.parameters().items()}
        leaves.setdefault("b_dec", self.b_dec[which].detach())
        return leaves

    def forward(self, which: slice, p: Params, x: Float[Tensor, "n batch d_in"]) -> Forward:
        """The forward pass of some members with the parameters ``p``."""
        dtype = x.dtype if self.dtype == torch.float32 else self.dtype
        return FORWARD[self.config.architecture](p, x, self.configs[which], dtype)

    def loss(
        self,
        x: Float[Tensor, "n_saes batch d_in"],
        dead: Bool[Tensor, "n_saes d_sae"],
        warm: float = 1.0,
        objective: Objective | None = None,
        watch: Sequence[int] = (),
    ) -> BankLoss:
        """The members' losses on a batch; their gradients go into ``grad`` of the parameters.

        ``dead`` features may be helped, ``warm`` scales the sparsity penalty, ``objective`` adds its term.
        """
        whole = self.slices(x.shape[1])
        parts = [self._slice_loss(s, x[s], dead[s], warm, objective, watch) for s in whole]
        return BankLoss(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _slice_loss(
        self,
        which: slice,
        x: Tensor,
        dead: Tensor,
        warm: float,
        objective: Objective | None,
        watch: Sequence[int],
    ) -> BankLoss:
        config, p = self.config, self._leaves(which)
        out = self.forward(which, p, x)
        mse = squared_error(x, out.x_hat)
        fit = mse if out.fit is None else out.fit
        sparsity = out.penalty * self._coefficients(which, x) * warm
        aux = revival_loss(p, x, out, dead, config)
        if out.aux is not None:
            aux = aux + out.aux
        extra = torch.zeros_like(mse) if objective is None else objective(which, p, out)
        total = config.mse_coefficient * fit + sparsity + aux + extra
        self._gradients(which, p, total)
        least = out.least if out.least is not None else torch.zeros_like(mse)
        peak = out.acts.peak(watch) if watch else x.new_zeros(len(x), 0)
        mse, total, sparsity, aux, extra = (t.detach() for t in (mse, total, sparsity, aux, extra))
        return BankLoss(mse, total, sparsity, aux, extra, out.acts.firings(), least, peak)

    def _coefficients(self, which: slice, x: Tensor) -> Float[Tensor, " n"]:
        l0 = self.config.architecture == "jumprelu"
        values = [c.l0_coefficient if l0 else c.l1_coefficient for c in self.configs[which]]
        return torch.tensor(values, dtype=x.dtype, device=x.device)

    def _grad(self, name: str) -> Tensor:
        """The gradient of a parameter, made when it is first asked for."""
        p: Tensor = getattr(self, name)
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        return p.grad

    def _gradients(self, which: slice, p: Params, total: Tensor) -> None:
        names = list(self.parameters())
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            total.sum(), [p[name] for name in names], allow_unused=True
        )
        for name, gradient in zip(names, found, strict=True):
            place = self._grad(name)[which]
            place.zero_() if gradient is None else place.copy_(gradient)

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Take out of each decoder row's gradient the part along the row, which renormalising undoes."""
        if self.config.decoder == "unit":
            grad = self._grad("W_dec")
            grad -= (grad * self.W_dec).sum(2, keepdim=True) * self.W_dec

    @torch.no_grad()
    def renormalise(self) -> None:
        """Bring decoder rows back to norm 1, or to 1 at most."""
        if self.config.decoder != "free":
            norm = self.W_dec.norm(dim=2, keepdim=True).clamp_min(1e-8)
            self.W_dec /= norm.clamp_min(1.0) if self.config.decoder == "clipped" else norm
