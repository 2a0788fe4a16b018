"""Where does a feature's evidence lie? Sums of positive DFA over its top examples, by head and by distance.

Only positive contributions, max(dfa, 0), of the dense head x source matrix count; their sums over a feature's
top examples are added up, so that parts of the text can be merged. A share is a sum over the sources in
question divided by the sum over all sources.

With p the example's position, s the source and t the tokens of the block:

    bos s = 0            same_token   0 < s < p and t[s] = t[p]
    current s = p        after_match  1 < s < p and t[s - 1] = t[p]
    previous s = p - 1 > 0   local 1 <= p - s <= 8 and s > 0   long_range p - s > 32 and s > 0
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from atlas.analysis.acts import Ints, first_of_runs
from atlas.analysis.arrays import UNREADABLE, read_npz
from atlas.errors import StoreError
from atlas.kernels.attribution import add_by_distance, add_by_head
from atlas.kernels.sources import count_matched
from atlas.tables import DFA_SHARES

LOCAL, LONG_RANGE = 8, 32
CANCELLED = 5
"""An example whose heads' parts come to less than one in so many of their sizes has no DFA shares."""
DISTANCES = np.array([0, 1, 2, 3, 5, 9, 17, 33, 65, 129])
"""Smallest distance of each bin; BOS has a bin of its own before them."""
_LOWS = np.concatenate([[-1], DISTANCES])
_HIGHS = np.concatenate([[-1], DISTANCES[1:] - 1, [np.iinfo(np.int16).max]])
_SOURCES = (*DFA_SHARES, "not_bos", "all")
Columns = dict[str, Any]


def matched_prefix(tokens: Ints, position: Ints, source: Ints) -> Ints:
    """How many tokens before each source repeat those up to each position? (rows B11 to B15)

    The n >= 1 tokens t[s - n .. s - 1] = t[p - n + 1 .. p]; 0 where the token before the source is not the
    position's, where the source is the position itself, or there is none (-1). BOS is never part of a match.

    >>> tokens = np.array([0, 7, 8, 9, 5, 7, 8])
    >>> matched_prefix(tokens, np.array([6, 6, 5]), np.array([3, 2, 2])).tolist()
    [2, 0, 1]
    """
    matched = np.empty(len(position), np.int64)
    count_matched(_each(tokens, len(position)), position, source, matched)
    return matched


def _each(tokens: Ints, n: int) -> Ints:
    """The tokens of each example's block, one row each."""
    return np.ascontiguousarray(np.broadcast_to(tokens, (n, tokens.shape[-1])), dtype=np.int64)


class DFASums:
    """Sums over the top examples of every feature of an SAE; a mergeable summary."""

    def __init__(self, d_sae: int, n_heads: int) -> None:
        self.n = np.zeros(d_sae, np.int64)
        self.n_matched, self.prefix = np.zeros(d_sae, np.int64), np.zeros(d_sae, np.int64)
        self.share = np.zeros((d_sae, n_heads))
        self.n_share = np.zeros(d_sae, np.int64)
        self.by_head = np.zeros((d_sae, n_heads, len(_SOURCES)))
        self.distance = np.zeros((d_sae, n_heads))
        self.bins = np.zeros((d_sae, 2, len(_LOWS)))

    def update(
        self,
        feature: Ints,
        position: Ints,
        tokens: Ints,
        dense: Float[np.ndarray, "n heads key"],
        by_head: Float[np.ndarray, "n heads"],
        matched: Ints,
    ) -> None:
        """Add top examples: tokens of their block (or of each one's), dense DFA and its sums, prefixes."""
        n, key = len(feature), dense.shape[2]
        parts = by_head.astype(np.float64)
        p = parts.sum(1)
        usable = (p > 0) & (CANCELLED * p >= np.abs(parts).sum(1))
        found = {
            "n": np.ones(n, np.int64),
            "n_matched": (matched > 0).astype(np.int64),
            "prefix": matched,
            "n_share": usable.astype(np.int64),
            "share": parts * np.where(usable, 1 / np.where(usable, p, 1), 0)[:, None],
        }
        # A feature may come more than once.
        order = np.argsort(feature, kind="stable")
        starts = first_of_runs(feature[order])
        for name, values in found.items():
            getattr(self, name)[feature[order][starts]] += np.add.reduceat(values[order], starts)
        add_by_head(dense, _each(tokens, n), position, feature, self.by_head, self.distance)
        bin_of = np.searchsorted(DISTANCES, np.arange(key), side="right")
        add_by_distance(dense, position, feature, bin_of, self.bins)

    def merge(self, other: "DFASums") -> "DFASums":
        """The sums of both parts together."""
        merged = DFASums(*self.share.shape)
        for name, value in vars(self).items():
            setattr(merged, name, value + getattr(other, name))
        return merged

    def dfa_share(self) -> npt.NDArray[np.float64]:
        """Mean over a feature's top examples of d_h / p, [d_sae, heads]; NaN where it has none.

        Only examples in which the heads make the feature fire count, p = sum of d_h >= sum of |d_h| / 5:
        where the bias does and the heads' parts cancel, d_h / p has any size.
        """
        return _ratio(self.share, self.n_share[:, None])

    def head_columns(self) -> Columns:
        """The ``dfa_*`` columns of ``head_attribution``, by feature and head."""
        total = self.by_head[..., _SOURCES.index("all")]
        found = {
            f"dfa_{name}": _ratio(self.by_head[..., _SOURCES.index(name)], total).ravel()
            for name in DFA_SHARES
        }
        found["dfa_distance"] = _ratio(self.distance, self.by_head[..., _SOURCES.index("not_bos")]).ravel()
        return found

    def summary(self) -> Columns:
        """The rows of ``dfa_summary``: features with a top example."""
        has = np.flatnonzero(self.n)
        sums = dict(zip(_SOURCES, self.by_head[has].sum(1).T, strict=True))
        shares = {name: _ratio(sums[name], sums["all"]) for name in DFA_SHARES}
        near, far = (_LOWS >= 1) & (_HIGHS <= LOCAL), _LOWS > LONG_RANGE
        for name, which in (("local", near), ("long_range", far)):
            shares[name] = _ratio(self.bins[has, 0][:, which].sum(1), sums["all"])
        return {
            "feature": has,
            "n": self.n[has],
            **shares,
            "distance": _ratio(self.distance[has].sum(1), sums["not_bos"]),
            "matched": self.n_matched[has] / self.n[has],
            "matched_prefix": _ratio(self.prefix[has], self.n_matched[has]),
        }

    def distances(self) -> Columns:
        """The rows of ``dfa_distances``: bins that any contribution falls into."""
        total = self.bins[:, 0].sum(1)
        feature, which = np.nonzero((self.bins.sum(1) > 0) & (total > 0)[:, None])
        positive, negative = self.bins[feature, :, which].T
        return {
            "feature": feature,
            "low": _LOWS[which],
            "high": _HIGHS[which],
            "share": positive / total[feature],
            "negative": negative / total[feature],
        }

    def save(self, path: Path) -> None:
        """Write to an uncompressed .npz file."""
        np.savez(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> "DFASums":
        """Read what ``save`` wrote; StoreError if it is damaged."""
        try:
            file = read_npz(path)
            found = cls(*file["share"].shape)
            for name in vars(found):
                setattr(found, name, file[name])
        except UNREADABLE as error:
            raise StoreError(f"sums of attributions in {str(path)!r} cannot be read: {error}") from None
        return found


def _ratio(part: npt.NDArray, whole: npt.NDArray) -> npt.NDArray[np.float64]:
    part = part.astype(np.float64)
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)
