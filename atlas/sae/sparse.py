"""Encoding and decoding that touch only the k active features of a token, with their gradients.

With f sparse (k of d_sae), x^ = f W_dec costs k * d_in products per token in place of d_sae * d_in, and so
do all three gradients; only the pre-activations stay dense. The rows of several SAEs are stacked: row r
of SAE s reads features s * d_sae to (s + 1) * d_sae - 1 of one long list.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")


class Pattern:
    """Which features are active in which row; its transpose is worked out once, when first needed."""

    def __init__(self, index: Int[Tensor, "n_rows k"], n_features: int) -> None:
        self.index = index
        self.n_features = n_features
        self._by_feature: tuple[Tensor, Tensor, Tensor] | None = None

    def _transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._by_feature is None:
            flat = self.index.reshape(-1)
            order = torch.argsort(flat, stable=True)
            counts = torch.bincount(flat, minlength=self.n_features)
            starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            self._by_feature = (order, torch.div(order, self.index.shape[1], rounding_mode="floor"), starts)
        return self._by_feature

    def scatter(
        self, values: Float[Tensor, "n_rows k"], rows: Float[Tensor, "n_rows d"]
    ) -> Float[Tensor, "n_features d"]:
        """The sum over rows r and slots j with index[r, j] = f of values[r, j] * rows[r]."""
        order, row_of, starts = self._transposed()
        sparse = torch.sparse_csr_tensor(
            starts, row_of, values.reshape(-1)[order], (self.n_features, len(rows)), check_invariants=False
        )
        return sparse @ rows

    def sum_by_feature(self, values: Float[Tensor, "n_rows k"]) -> Float[Tensor, " n_features"]:
        """The sum of the values that belong to each feature."""
        out = values.new_zeros(self.n_features)
        return out.index_add_(0, self.index.reshape(-1), values.reshape(-1))


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, pattern: Pattern) -> Tensor:
        # embedding_bag is the fused gather-multiply-sum; its own graph gives the gradient of the values.
        with torch.enable_grad():
            leaf = values.detach().requires_grad_()
            out = F.embedding_bag(pattern.index, W_dec.detach(), mode="sum", per_sample_weights=leaf)
        ctx.pattern, ctx.leaf, ctx.out = pattern, leaf, out
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_values,) = torch.autograd.grad(ctx.out, ctx.leaf, grads[0])
        return d_values, ctx.pattern.scatter(ctx.leaf.detach(), grads[0]), None


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _rows: Tensor, _b: Tensor, selected: Tensor, pattern: Pattern) -> Tensor:
        ctx.x, ctx.pattern = x, pattern
        return selected.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_rows = ctx.pattern.scatter(grads[0], ctx.x)
        return None, d_rows, ctx.pattern.sum_by_feature(grads[0]), None, None


def sparse_decode(
    values: Float[Tensor, "n_rows k"], W_dec: Float[Tensor, "n_features d_in"], pattern: Pattern
) -> Float[Tensor, "n_rows d_in"]:
    """f W_dec for sparse f, differentiable in the values and in W_dec."""
    return _Decode.apply(values, W_dec, pattern)  # type: ignore[no-untyped-call]


def selected_preactivations(
    x: Float[Tensor, "n_rows d_in"],
    W_enc_rows: Float[Tensor, "n_features d_in"],
    b_enc: Float[Tensor, " n_features"],
    selected: Float[Tensor, "n_rows k"],
    pattern: Pattern,
) -> Float[Tensor, "n_rows k"]:
    """Pre-activations already computed densely (``selected``), made differentiable in W_enc and b_enc.

    ``W_enc_rows`` is W_enc transposed, one row per feature. No gradient goes to x: the caller treats the
    bias that is subtracted from x separately.
    """
    return _Select.apply(x, W_enc_rows, b_enc, selected, pattern)  # type: ignore[no-untyped-call]
