"""Which heads make a feature's pre-activation vary? FVE over all tokens, and over those on which it fires.

p = x . W_enc[:, f] is the linear part of a feature's pre-activation, d_h head h's part of it:

    FVE = Cov(d_h, p) / Var(p)

Over all tokens it follows in closed form from the covariance of x (``fve``). Over the tokens on which the
feature fires it is summed up sparsely (``ActiveShares``). Of an SAE that normalises its input, x stands for x
divided by the token's size and W_enc for ``weights.attribution_directions``, so that the parts are those of
DFA. Source: seed 001, row B3.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from atlas.analysis.arrays import UNREADABLE, read_npz
from atlas.errors import StoreError
from atlas.kernels.features import by_feature
from atlas.kernels.shares import add_moments, add_shares

LEAST_ACTIVE = 10
_STRIP = 64
"""Rows of x^T x in one product: of the strips below the diagonal nothing is computed."""
_SUMS = ("n", "p", "pp", "d", "dp")


class Moments:
    """Mergeable sums of activations from which the mean and the covariance follow, in float64.

    ``outer`` is what x^T x is on and above its diagonal; what lies below mirrors it and is never asked for.
    """

    def __init__(self, n: int, total: np.ndarray, outer: np.ndarray) -> None:
        self.n, self.total, self.outer = n, total, outer

    @classmethod
    def empty(cls, d_in: int) -> "Moments":
        """No token yet."""
        return cls(0, np.zeros(d_in), np.zeros((d_in, d_in)))

    def update(self, x: Float[Tensor, "n d_in"]) -> None:
        """Add activations."""
        wide = x.double()
        self.n += len(x)
        self.total += wide.sum(0).cpu().numpy()
        outer = wide.new_zeros(self.outer.shape)
        for low in range(0, len(outer), _STRIP):
            rows = slice(low, low + _STRIP)
            outer[rows, low:] = wide[:, rows].T @ wide[:, low:]
        self.outer += outer.cpu().numpy()

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both texts together."""
        return Moments(self.n + other.n, self.total + other.total, self.outer + other.outer)

    def covariance(self) -> np.ndarray:
        """Population covariance [d_in, d_in]."""
        n = max(self.n, 1)
        mean = self.total / n
        above = np.triu(self.outer)
        return (above + np.triu(above, 1).T) / n - np.outer(mean, mean)

    def save(self, path: Path) -> None:
        """Write to an uncompressed .npz file."""
        np.savez(path, n=self.n, total=self.total, outer=self.outer)

    @classmethod
    def load(cls, path: Path) -> "Moments":
        """Read what ``save`` wrote; StoreError if it is damaged."""
        try:
            file = read_npz(path)
            return cls(int(file["n"]), file["total"], file["outer"])
        except UNREADABLE as error:
            raise StoreError(f"moments in {str(path)!r} cannot be read: {error}") from None


def fve(W_enc: np.ndarray, covariance: np.ndarray, n_heads: int) -> np.ndarray:
    """FVE over all tokens, [d_sae, n_heads]; sums to 1 over heads and may leave [0, 1].

    (W_enc[h, f]^T C[h, :] W_enc[:, f]) / (W_enc[:, f]^T C W_enc[:, f]) with C = Cov(x); NaN where p does not
    vary.

    >>> fve(np.array([[1.0], [1.0]]), np.diag([3.0, 1.0]), n_heads=2).tolist()
    [[0.75, 0.25]]
    """
    W = W_enc.astype(np.float64)
    parts = (W * (covariance @ W)).reshape(n_heads, -1, W.shape[1]).sum(1).T
    variance = parts.sum(1, keepdims=True)
    return np.divide(parts, variance, out=np.full_like(parts, np.nan), where=variance > 0)


class ActiveShares:
    """FVE by head over the tokens on which each feature fires; a mergeable summary.

    Sum over active tokens of x and of p x, feature by feature, are products with a sparse matrix; their
    products with the head's slice of W_enc[:, f] are the sums of d_h and of p d_h.

    >>> shares = ActiveShares(torch.tensor([[1.0], [1.0]]), n_heads=2)
    >>> x = torch.tensor([[float(i), 1.0] for i in range(10)])
    >>> shares.update(x, torch.arange(10), torch.zeros(10, dtype=torch.int64), x.sum(1))
    >>> shares.finish().tolist()
    [[1.0, 0.0]]
    """

    def __init__(self, directions: Float[Tensor, "d_in d_sae"], n_heads: int) -> None:
        d_sae = directions.shape[1]
        self.by_feature, self.n_heads = directions.T.contiguous(), n_heads
        self.sums = {name: np.zeros((d_sae, n_heads) if "d" in name else d_sae) for name in _SUMS}

    def update(
        self,
        x: Float[Tensor, "n d_in"],
        row: Int[Tensor, " active"],
        feature: Int[Tensor, " active"],
        p: Float[Tensor, " active"],
    ) -> None:
        """Add a batch of tokens: where which feature fires, and the linear part of its pre-activation."""
        add = self._by_product if x.is_cuda else self._by_loop
        add(x, row, feature, p)

    def _by_loop(self, x: Tensor, row: Tensor, feature: Tensor, p: Tensor) -> None:
        """``update`` on a CPU."""
        order, starts = by_feature(feature.numpy(), len(self.by_feature))
        row_of, p_of, sums = row.numpy()[order], p.numpy()[order], self.sums
        add_moments(starts, p_of, sums["n"], sums["p"], sums["pp"])
        add_shares(starts, row_of, p_of, x.numpy(), self.by_feature.numpy(), sums["d"], sums["dp"])

    def _by_product(self, x: Tensor, row: Tensor, feature: Tensor, p: Tensor) -> None:
        """``update`` on a GPU."""
        d_sae, order = len(self.by_feature), feature.argsort(stable=True)
        row, p, of = row[order], p[order], feature[order]
        counts = torch.bincount(feature, minlength=d_sae)
        offsets = F.pad(counts.cumsum(0), (1, 0))
        found = {"n": counts}
        for name, part in (("p", p.double()), ("pp", p.double() ** 2)):
            found[name] = part.new_zeros(d_sae).index_add_(0, of, part)
        for name, weights in (("d", None), ("dp", p)):
            total = F.embedding_bag(
                row, x, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
            )
            found[name] = (total * self.by_feature).reshape(d_sae, self.n_heads, -1).sum(2).double()
        for name, part in found.items():
            self.sums[name] += part.cpu().numpy()

    def merge(self, other: "ActiveShares") -> "ActiveShares":
        """The sums of both texts together."""
        merged = ActiveShares(self.by_feature.T, self.n_heads)
        merged.sums = {name: self.sums[name] + other.sums[name] for name in _SUMS}
        return merged

    def finish(self) -> npt.NDArray[np.float64]:
        """FVE over active tokens [d_sae, n_heads]; NaN below 10 of them or where p does not vary."""
        n = np.maximum(self.sums["n"], 1)[:, None]
        p = self.sums["p"][:, None] / n
        covariance = self.sums["dp"] / n - self.sums["d"] / n * p
        variance = self.sums["pp"][:, None] / n - p**2
        usable = (self.sums["n"][:, None] >= LEAST_ACTIVE) & (variance > 1e-9 * p**2)
        return np.divide(covariance, variance, out=np.full_like(covariance, np.nan), where=usable)

    def save(self, path: Path) -> None:
        """Write to an uncompressed .npz file."""
        np.savez(path, allow_pickle=False, **self.sums)

    def load(self, path: Path) -> "ActiveShares":
        """Read what ``save`` of shares of the same SAE wrote; StoreError if it is damaged."""
        found = ActiveShares(self.by_feature.T, self.n_heads)
        try:
            file = read_npz(path)
            found.sums = {name: file[name] for name in _SUMS}
        except UNREADABLE as error:
            raise StoreError(f"shares in {str(path)!r} cannot be read: {error}") from None
        return found
