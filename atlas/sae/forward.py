"""Each architecture's forward pass in training, for several SAEs of one shape at once.

x: activations of n SAEs [n, batch, d_in], scaled to a mean squared norm of d_in. Parameters are stacked;
W_enc is kept as rows [n, d_sae, d_in]. With c the value of b_dec, a constant, pre = (x - c) W_enc + b_enc -
(b_dec - c) W_enc: x is centred before it is rounded, and b_dec has its gradient through the bias, which
needs no product with the batch. What every architecture returns is a ``Forward``; the loss is put together
in ``bank``.

Sources: ReLU, Bricken et al. 2023 (L1 times decoder norm: Conerly et al. 2024); TopK, Gao et al. 2024;
BatchTopK, Bussmann et al. 2024; Matryoshka, Bussmann et al. 2025; JumpReLU and gated, Rajamanoharan et
al. 2024.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from atlas.configs import SAEConfig
from atlas.sae.feature_acts import DenseActs, SparseActs, in_parts
from atlas.sae.sparse import Pattern, selected_preactivations, sparse_decode
from atlas.sae.topk import top_k, top_of_batch

Params = Mapping[str, Tensor]


class Forward(NamedTuple):
    """What one pass gives: the reconstruction and what the loss needs of it."""

    x_hat: Float[Tensor, "n batch d_in"]
    """The reconstruction."""
    centred: Float[Tensor, "n batch d_in"]
    """x minus the value of b_dec."""
    acts: DenseActs | SparseActs
    """What fired, without gradients."""
    penalty: Float[Tensor, " n"]
    """The sparsity penalty without its coefficient; zero where k features are kept."""
    pre: Float[Tensor, "n batch d_sae"]
    """Pre-activations, without gradients; a ReLU SAE without AuxK has only f."""
    bias: Float[Tensor, "n d_sae"]
    """b_enc - (b_dec - its value) W_enc (a gated SAE: of the gate)."""
    fit: Float[Tensor, " n"] | None = None
    """Squared error to minimise, where it is not that of x_hat (Matryoshka)."""
    aux: Float[Tensor, " n"] | None = None
    """The gated SAE's auxiliary error."""
    least: Float[Tensor, " n"] | None = None
    """BatchTopK: the smallest activation above zero that was kept; zero if none was."""


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Batched matrix product, computed in ``dtype``, in the precision of ``a``."""
    return torch.bmm(a, b) if a.dtype == dtype else torch.bmm(a.to(dtype), b.to(dtype)).to(a.dtype)


def affine(bias: Float[Tensor, "n d"], a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b plus a bias per column; fused where no change of precision is asked."""
    if a.dtype == dtype:
        return torch.baddbmm(bias[:, None], a, b)
    return product(a, b, dtype) + bias[:, None]


def start_size(config: SAEConfig, d_in: int, d_sae: int) -> float:
    """Norm of the encoder's rows at the start; a JumpReLU SAE's threshold and kernel go with it.

    With ReLU and random rows, half of the features fire and x^ is d_sae / (2 d_in) times x in the mean; a
    wide SAE would spend its training on coming down from there.

    >>> start_size(SAEConfig("relu"), 64, 512), start_size(SAEConfig("topk"), 64, 512)
    (0.25, 1.0)
    """
    return 1.0 if config.has_k else min(1.0, 2 * d_in / d_sae)


def squared_error(x: Float[Tensor, "n batch d_in"], x_hat: Float[Tensor, "n batch d_in"]) -> Tensor:
    """Mean over tokens of the squared error summed over d_in, per SAE."""
    return (x - x_hat).square().sum(2).mean(1)


def _bias(p: Params, name: str = "b_enc") -> Float[Tensor, "n d_sae"]:
    """The encoder's bias, through which b_dec has its gradient.

    SAE by SAE, since a batched product of matrix and vector rounds differently in different company.
    """
    taken = [torch.mv(W, b - b.detach()) for W, b in zip(p["W_enc"], p["b_dec"], strict=True)]
    return p[name] - torch.stack(taken)


def _centred(p: Params, x: Tensor) -> Float[Tensor, "n batch d_in"]:
    return x - p["b_dec"].detach()[:, None]


class _ReLU(torch.autograd.Function):
    """ReLU, in place if asked, and each feature's sum over the batch; one pass back over the gradient."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
        if in_place:
            ctx.mark_dirty(pre)
        f = pre.relu_() if in_place else pre.relu()
        ctx.save_for_backward(f)
        return f, f.sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (f,) = ctx.saved_tensors
        # The gradient is a fresh product that nobody else holds.
        gradient = grads[0].contiguous()
        for part, fired in zip(in_parts(gradient), in_parts(f), strict=True):
            part.add_(grads[1][:, None]).mul_(fired > 0)
        return gradient, None


def _relu(pre: Tensor, config: SAEConfig) -> tuple[Tensor, Tensor]:
    """Feature activations and their sums; pre-activations are kept only for what needs them."""
    found: tuple[Tensor, Tensor] = _ReLU.apply(pre, config.revival != "auxk")  # type: ignore[no-untyped-call]
    return found


def _l1(total: Float[Tensor, "n d_sae"], batch: int, p: Params, config: SAEConfig) -> Float[Tensor, " n"]:
    """Summed activation per token; with free decoder rows, activation times the row's norm."""
    if config.decoder == "free":
        total = total * p["W_dec"].norm(dim=2)
    return total.sum(1) / batch


def relu(p: Params, x: Tensor, configs: Sequence[SAEConfig], dtype: torch.dtype) -> Forward:
    """f = ReLU(pre), with an L1 penalty."""
    bias, centred = _bias(p), _centred(p, x)
    pre = affine(bias, centred, p["W_enc"].transpose(1, 2), dtype)
    f, total = _relu(pre, configs[0])
    x_hat = affine(p["b_dec"], f, p["W_dec"], dtype)
    penalty = _l1(total, x.shape[1], p, configs[0])
    return Forward(x_hat, centred, DenseActs(f.detach()), penalty, pre.detach(), bias)


def gated(p: Params, x: Tensor, configs: Sequence[SAEConfig], dtype: torch.dtype) -> Forward:
    """f = 1[gate > 0] ReLU(magnitude); the penalty is on ReLU(gate), which alone reconstructs x as well."""
    bias, centred = _bias(p, "b_gate"), _centred(p, x)
    gate = affine(bias, centred, p["W_enc"].transpose(1, 2), dtype)
    linear = gate - p["b_gate"][:, None]
    magnitude = torch.addcmul(p["b_enc"][:, None], linear, p["r_mag"].exp()[:, None])
    f = magnitude.relu() * (gate > 0)
    x_hat = affine(p["b_dec"], f, p["W_dec"], dtype)
    open_gate = gate.relu()
    by_gate = affine(p["b_dec"].detach(), open_gate, p["W_dec"].detach(), dtype)
    penalty = _l1(open_gate.sum(1), x.shape[1], p, configs[0])
    aux = squared_error(x, by_gate)
    return Forward(x_hat, centred, DenseActs(f.detach()), penalty, gate.detach(), bias, aux=aux)


class _JumpReLU(torch.autograd.Function):
    """pre where pre > threshold; the threshold's gradient comes through a rectangle of width epsilon."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.epsilon = epsilon
        return pre * (pre > threshold[:, None])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold[:, None]).abs() < ctx.epsilon / 2
        d_threshold = -(grads[0] * near).sum(1) * threshold / ctx.epsilon
        return grads[0] * (pre > threshold[:, None]), d_threshold, None


class _Count(torch.autograd.Function):
    """Features above their threshold, per SAE and token; only the threshold gets a gradient."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.epsilon = epsilon
        return (pre > threshold[:, None]).sum((1, 2)).to(pre.dtype) / pre.shape[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold[:, None]).abs() < ctx.epsilon / 2).sum(1).to(pre.dtype)
        return None, -grads[0][:, None] * near / (ctx.epsilon * pre.shape[1]), None


def jumprelu(p: Params, x: Tensor, configs: Sequence[SAEConfig], dtype: torch.dtype) -> Forward:
    """f = pre where pre > threshold, threshold = exp(log_threshold), with an L0 penalty."""
    bias, centred, threshold = _bias(p), _centred(p, x), p["log_threshold"].exp()
    width = configs[0].bandwidth * start_size(configs[0], *p["W_enc"].shape[:0:-1])
    pre = affine(bias, centred, p["W_enc"].transpose(1, 2), dtype)
    f: Tensor = _JumpReLU.apply(pre, threshold, width)  # type: ignore[no-untyped-call]
    penalty: Tensor = _Count.apply(pre.detach(), threshold, width)  # type: ignore[no-untyped-call]
    x_hat = affine(p["b_dec"], f, p["W_dec"], dtype)
    return Forward(x_hat, centred, DenseActs(f.detach()), penalty, pre.detach(), bias)


class _Kept(NamedTuple):
    """The features that were kept, differentiable, over all SAEs and tokens."""

    centred: Float[Tensor, "n batch d_in"]
    pre: Float[Tensor, "n batch d_sae"]
    bias: Float[Tensor, "n d_sae"]
    values: Float[Tensor, " nnz"]
    pattern: Pattern


def _chosen(pre: Tensor, configs: Sequence[SAEConfig]) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs (row, feature) to keep and their pre-activations, over all SAEs."""
    n, batch, d_sae = pre.shape
    ks = [min(c.k, d_sae) for c in configs]
    if configs[0].architecture == "topk" and len(set(ks)) == 1:
        values, index = top_k(pre.reshape(n * batch, d_sae), ks[0])
        row = torch.arange(n * batch, device=pre.device).repeat_interleave(ks[0])
        offset = torch.div(row, batch, rounding_mode="floor") * d_sae
        return row, index.reshape(-1) + offset, values.reshape(-1)
    rows, features, kept = [], [], []
    for s, k in enumerate(ks):
        if configs[s].architecture == "topk":
            values, index = top_k(pre[s], k)
            row = torch.arange(batch, device=pre.device).repeat_interleave(k)
            index, values = index.reshape(-1), values.reshape(-1)
        else:
            row, index, values = top_of_batch(pre[s], k * batch)
        rows.append(row + s * batch)
        features.append(index + s * d_sae)
        kept.append(values)
    return torch.cat(rows), torch.cat(features), torch.cat(kept)


def _keep(p: Params, x: Tensor, configs: Sequence[SAEConfig], dtype: torch.dtype) -> _Kept:
    n, batch, d_in = x.shape
    bias, centred, d_sae = _bias(p), _centred(p, x), p["W_enc"].shape[1]
    with torch.no_grad():
        pre = affine(bias, centred, p["W_enc"].transpose(1, 2), dtype)
        row, feature, selected = _chosen(pre, configs)
    pattern = Pattern(row, feature, n * batch, n * d_sae)
    values = selected_preactivations(
        centred.reshape(-1, d_in), p["W_enc"].reshape(-1, d_in), bias.reshape(-1), selected, pattern
    )
    return _Kept(centred, pre, bias, values.relu(), pattern)


def topk(p: Params, x: Tensor, configs: Sequence[SAEConfig], dtype: torch.dtype) -> Forward:
    """f = ReLU of the k largest pre-activations of each token."""
    kept = _keep(p, x, configs, dtype)
    x_hat = sparse_decode(kept.values, p["W_dec"].reshape(-1, x.shape[2]), kept.pattern).reshape(x.shape)
    acts = SparseActs(kept.values.detach(), kept.pattern, len(x))
    x_hat = x_hat + p["b_dec"][:, None]
    return Forward(x_hat, kept.centred, acts, x.new_zeros(len(x)), kept.pre, kept.bias)


def _least(acts: SparseActs, batch: int) -> Float[Tensor, " n"]:
    """The smallest activation above zero of each SAE; zero if it has none."""
    positive = acts.values > 0
    member = torch.div(acts.pattern.row, batch, rounding_mode="floor")[positive]
    out = acts.values.new_full((acts.n,), torch.inf)
    out.scatter_reduce_(0, member, acts.values[positive], "amin")
    return torch.where(torch.isinf(out), 0.0, out)


def batchtopk(p: Params, x: Tensor, configs: Sequence[SAEConfig], dtype: torch.dtype) -> Forward:
    """f = ReLU of the k * batch largest pre-activations of the whole batch."""
    out = topk(p, x, configs, dtype)
    if not isinstance(out.acts, SparseActs):
        raise TypeError("topk gives sparse activations")
    return out._replace(least=_least(out.acts, x.shape[1]))


def matryoshka(p: Params, x: Tensor, configs: Sequence[SAEConfig], dtype: torch.dtype) -> Forward:
    """BatchTopK whose first features reconstruct x by themselves, too: the mean error over the prefixes."""
    kept, d_sae = _keep(p, x, configs, dtype), p["W_enc"].shape[1]
    W_dec = p["W_dec"].reshape(-1, x.shape[2])
    ends = [max(1, round(fraction * d_sae)) for fraction in configs[0].prefixes]
    place = kept.pattern.feature % d_sae
    x_hat, fit = p["b_dec"][:, None].expand_as(x), x.new_zeros(len(x))
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        inside = (place >= start) & (place < end)
        part = sparse_decode(kept.values[inside], W_dec, kept.pattern.where(inside))
        x_hat = x_hat + part.reshape(x.shape)
        fit = fit + squared_error(x, x_hat) / len(ends)
    acts = SparseActs(kept.values.detach(), kept.pattern, len(x))
    nothing = x.new_zeros(len(x))
    least = _least(acts, x.shape[1])
    return Forward(x_hat, kept.centred, acts, nothing, kept.pre, kept.bias, fit=fit, least=least)


FORWARD = {
    "relu": relu,
    "topk": topk,
    "batchtopk": batchtopk,
    "matryoshka": matryoshka,
    "jumprelu": jumprelu,
    "gated": gated,
}
"""Each architecture's forward pass."""
