"""Encoding and decoding that touch only the active features of a token, with their gradients.

With f sparse, x^ = f W_dec costs (active features) * d_in products per token in place of d_sae * d_in, and
so do all three gradients; only the pre-activations stay dense. Several SAEs are stacked: row r of SAE s is
row s * batch + r of one long list, its feature i is feature s * d_sae + i.
"""

import warnings
from typing import Any

import numpy as np
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
        self._by_feature: tuple[Tensor, Tensor, Tensor] | None = None
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

    def _transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The order of the pairs by feature, their rows in that order, and where each feature begins."""
        if self._by_feature is None:
            order = _stable_order(self.feature, self.n_features)
            counts = torch.bincount(self.feature, minlength=self.n_features)
            rows = self.row.index_select(0, order)
            self._by_feature = order, rows, counts.cumsum(0) - counts
        return self._by_feature

    def scatter(
        self, values: Float[Tensor, " nnz"], rows: Float[Tensor, "n_rows d"]
    ) -> Float[Tensor, "n_features d"]:
        """For each feature, the sum over its pairs of value * rows[row]."""
        order, where, starts = self._transposed()
        return F.embedding_bag(
            where, rows, starts, mode="sum", per_sample_weights=values.index_select(0, order)
        )

    def products(
        self, rows: Float[Tensor, "n_rows d"], features: Float[Tensor, "n_features d"]
    ) -> Float[Tensor, " nnz"]:
        """For each pair, the scalar product of its row of ``rows`` and its feature's row of ``features``."""
        ends = torch.cat([self.starts, self.starts.new_full((1,), len(self.row))])
        nothing = rows.new_zeros(len(self.row))
        size = (self.n_rows, self.n_features)
        sparse = torch.sparse_csr_tensor(ends, self.feature, nothing, size, check_invariants=False)
        return torch.sparse.sampled_addmm(sparse, rows, features.T, beta=0).values()

    def sum_by_feature(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, " n_features"]:
        """The sum of the values that belong to each feature."""
        out = values.new_zeros(self.n_features)
        return out.index_add_(0, self.feature, values)


def _stable_order(feature: Int[Tensor, " nnz"], n_features: int) -> Int[Tensor, " nnz"]:
    # NumPy sorts 16-bit keys by their digits, several times faster than torch sorts 64-bit ones.
    if feature.is_cuda or n_features > 1 << 16:
        return torch.argsort(feature.int(), stable=True)
    return torch.from_numpy(np.argsort(feature.numpy().astype(np.uint16), kind="stable"))


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, pattern: Pattern) -> Tensor:
        # embedding_bag is the fused gather-multiply-sum.
        ctx.save_for_backward(values, W_dec)
        ctx.pattern = pattern
        return F.embedding_bag(pattern.feature, W_dec, pattern.starts, mode="sum", per_sample_weights=values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        d_x = grads[0].contiguous()
        return ctx.pattern.products(d_x, W_dec), ctx.pattern.scatter(values, d_x), None


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
