"""Feature activations of a batch in training: written out, or as (row, feature, value)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from atlas.sae.sparse import Pattern

PART = 1 << 21
"""Elements that a pass over a matrix takes at once on a CPU, so that they stay in its caches."""


def in_parts(matrix: Float[Tensor, "n batch d"]) -> tuple[Tensor, ...]:
    """The matrix as runs of rows that fit into the caches; whole on a GPU."""
    n, batch, d = matrix.shape
    rows = batch if matrix.is_cuda else max(1, PART // (n * d))
    return torch.split(matrix, rows, dim=1)


@dataclass(frozen=True)
class DenseActs:
    """Feature activations of a batch, every one written out."""

    f: Float[Tensor, "n batch d_sae"]

    def firings(self) -> Float[Tensor, "n d_sae"]:
        """How many tokens of the batch each feature fires on."""
        out = self.f.new_zeros(self.f.shape[0], self.f.shape[2])
        for part in in_parts(self.f):
            out += (part > 0).to(self.f.dtype).sum(1)
        return out

    def peak(self, features: Sequence[int]) -> Float[Tensor, "n chosen"]:
        """The strongest activation of some features."""
        return self.f[:, :, list(features)].amax(1)


@dataclass(frozen=True)
class SparseActs:
    """Feature activations of a batch as (row, feature, value)."""

    values: Float[Tensor, " nnz"]
    pattern: Pattern
    n: int

    def firings(self) -> Float[Tensor, "n d_sae"]:
        """How many tokens of the batch each feature fires on."""
        return self.pattern.sum_by_feature((self.values > 0).to(self.values.dtype)).reshape(self.n, -1)

    def peak(self, features: Sequence[int]) -> Float[Tensor, "n chosen"]:
        """The strongest activation of some features."""
        most = self.values.new_zeros(self.pattern.n_features)
        most.scatter_reduce_(0, self.pattern.feature, self.values, "amax")
        return most.reshape(self.n, -1)[:, list(features)]
