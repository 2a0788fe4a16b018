"""Encoding and decoding that touch only the active features of a token, with their gradients.

With f sparse, x^ = f W_dec costs (active features) * d_in products per token in place of d_sae * d_in, and
so do all three gradients; only the pre-activations stay dense. Several SAEs are stacked: row r of SAE s is
row s * batch + r of one long list, its feature i is feature s * d_sae + i.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")


class Pattern:
    """Which features are active in which row, as (row, feature) pairs sorted by row.

    The transpose is worked out once, when first needed.
    """

    def __init__(
        self, row: Int[Tensor, " nnz"], feature: Int[Tensor, " nnz"], n_rows: int, n_features: int
    ) -> None:
        self.row, self.feature, self.n_rows, self.n_features = row, feature, n_rows, n_features
        self._by_feature: tuple[Tensor, Tensor] | None = None
        self._starts: Tensor | None = None

    @classmethod
    def fixed(cls, index: Int[Tensor, "n_rows k"], n_features: int) -> "Pattern":
        """The same number of features in every row."""
        n_rows, k = index.shape
        row = torch.arange(n_rows, device=index.device).repeat_interleave(k)
        return cls(row, index.reshape(-1), n_rows, n_features)

    @property
    def starts(self) -> Int[Tensor, " n_rows"]:
        """Where each row's pairs begin."""
        if self._starts is None:
            counts = torch.bincount(self.row, minlength=self.n_rows)
            self._starts = counts.cumsum(0) - counts
        return self._starts

    def where(self, kept: Bool[Tensor, " nnz"]) -> "Pattern":
        """Some of the pairs."""
        return Pattern(self.row[kept], self.feature[kept], self.n_rows, self.n_features)

    def _transposed(self) -> tuple[Tensor, Tensor]:
        if self._by_feature is None:
            order = torch.argsort(self.feature, stable=True)
            counts = torch.bincount(self.feature, minlength=self.n_features)
            self._by_feature = order, torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return self._by_feature

    def scatter(
        self, values: Float[Tensor, " nnz"], rows: Float[Tensor, "n_rows d"]
    ) -> Float[Tensor, "n_features d"]:
        """For each feature, the sum over its pairs of value * rows[row]."""
        order, starts = self._transposed()
        sparse = torch.sparse_csr_tensor(
            starts,
            self.row[order],
            values[order],
            (self.n_features, self.n_rows),
            check_invariants=False,
        )
        return sparse @ rows

    def sum_by_feature(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, " n_features"]:
        """The sum of the values that belong to each feature."""
        out = values.new_zeros(self.n_features)
        return out.index_add_(0, self.feature, values)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, pattern: Pattern) -> Tensor:
        # embedding_bag is the fused gather-multiply-sum; its own graph gives the gradient of the values.
        with torch.enable_grad():
            leaf = values.detach().requires_grad_()
            out = F.embedding_bag(
                pattern.feature, W_dec.detach(), pattern.starts, mode="sum", per_sample_weights=leaf
            )
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
    values: Float[Tensor, " nnz"], W_dec: Float[Tensor, "n_features d_in"], pattern: Pattern
) -> Float[Tensor, "n_rows d_in"]:
    """f W_dec for sparse f, differentiable in the values and in W_dec.

    >>> pattern = Pattern(torch.tensor([0, 0]), torch.tensor([0, 2]), n_rows=2, n_features=3)
    >>> sparse_decode(torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [5.0], [3.0]]), pattern).tolist()
    [[7.0], [0.0]]
    """
    return _Decode.apply(values, W_dec, pattern)  # type: ignore[no-untyped-call]


def selected_preactivations(
    x: Float[Tensor, "n_rows d_in"],
    W_enc_rows: Float[Tensor, "n_features d_in"],
    b_enc: Float[Tensor, " n_features"],
    selected: Float[Tensor, " nnz"],
    pattern: Pattern,
) -> Float[Tensor, " nnz"]:
    """Pre-activations already computed densely (``selected``), made differentiable in W_enc and b_enc.

    ``W_enc_rows`` is W_enc transposed, one row per feature. No gradient goes to x: the caller treats the
    bias that is subtracted from x separately.
    """
    return _Select.apply(x, W_enc_rows, b_enc, selected, pattern)  # type: ignore[no-untyped-call]
