"""The sparse activations of one SAE over a text, feature by feature: what every corpus summary reads.

Only activations above zero are held, sorted by feature and then by token occurrence (block * context +
position). Because this order does not depend on how the text was cut into shards or in which order the
shards were merged, every summary computed from it is the same to the last bit, whatever the number of
workers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from atlas.errors import StoreError

# What numpy raises for an .npz file that is missing, empty, cut short, altered, or not one at all.
UNREADABLE = (OSError, ValueError, KeyError, EOFError, BadZipFile)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FeatureActs:
    """Activations above zero: ``value[starts[f]:starts[f + 1]]`` at ``token[...]`` belong to feature f."""

    context: int
    starts: Ints
    token: Ints
    value: Floats

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.starts) - 1

    @cached_property
    def counts(self) -> Ints:
        """Active tokens of each feature."""
        return np.diff(self.starts)

    @cached_property
    def feature(self) -> Ints:
        """The feature of each activation."""
        return np.repeat(np.arange(self.d_sae), self.counts)

    @cached_property
    def block(self) -> Ints:
        """The block of each activation."""
        return self.token // self.context

    @cached_property
    def position(self) -> Ints:
        """The position in its block of each activation."""
        return self.token % self.context

    @cached_property
    def strongest_first(self) -> Ints:
        """Indices that sort each feature's activations from strong to weak; ties: smaller token first.

        Positive floats order like their bits, so one stable integer sort does it.
        """
        bits = self.value.view(np.uint32).astype(np.uint64)
        key = (self.feature.astype(np.uint64) << np.uint64(32)) | (np.uint64(0xFFFFFFFF) - bits)
        return np.argsort(key, kind="stable")

    @cached_property
    def rank(self) -> Ints:
        """Rank from the top of each activation in the order of ``strongest_first``."""
        return np.arange(len(self.token)) - np.repeat(self.starts[:-1], self.counts)

    @classmethod
    def collect(
        cls,
        parts: Iterable[tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]],
        d_sae: int,
        context: int,
    ) -> "FeatureActs":
        """From (feature, token, value) triples in any order, each (feature, token) at most once.

        >>> acts = FeatureActs.collect([([1, 0], [5, 6], [0.5, 2.0]), ([1], [2], [1.0])], d_sae=3, context=4)
        >>> acts.starts.tolist(), acts.token.tolist(), acts.value.tolist()
        ([0, 1, 3, 3], [6, 2, 5], [2.0, 1.0, 0.5])
        """
        columns = list(zip(*parts, strict=True)) or [(), (), ()]
        feature, token = (
            np.concatenate([*map(np.asarray, c), np.empty(0)]).astype(np.int64) for c in columns[:2]
        )
        value = np.concatenate([*map(np.asarray, columns[2]), np.empty(0, np.float32)]).astype(np.float32)
        span = int(token.max(initial=0)) + 1
        order = np.argsort(feature * span + token, kind="stable")
        starts = np.concatenate([[0], np.bincount(feature, minlength=d_sae).cumsum()])
        return cls(context, starts.astype(np.int64), token[order], value[order])

    @classmethod
    def merge(cls, parts: Iterable["FeatureActs"]) -> "FeatureActs":
        """The activations of several disjoint parts of a text; any grouping and order gives the same."""
        kept = list(parts)
        if len({(p.context, p.d_sae) for p in kept}) != 1:
            raise StoreError("shards of different SAEs or contexts cannot be merged")
        return cls.collect(((p.feature, p.token, p.value) for p in kept), kept[0].d_sae, kept[0].context)

    def save(self, path: Path) -> None:
        """Write to an uncompressed .npz file."""
        np.savez(
            path,
            context=self.context,
            starts=self.starts,
            token=self.token.astype(np.uint32),
            value=self.value,
        )

    @classmethod
    def load(cls, path: Path) -> "FeatureActs":
        """Read what ``save`` wrote; StoreError if the file is damaged."""
        try:
            with np.load(path, allow_pickle=False) as file:
                token = file["token"].astype(np.int64)
                return cls(int(file["context"]), file["starts"], token, file["value"])
        except UNREADABLE as error:
            raise StoreError(f"activations in {str(path)!r} cannot be read: {error}") from None


def first_of_runs(keys: npt.NDArray) -> Ints:
    """Indices at which a new value begins in a sorted array.

    >>> first_of_runs(np.array([3, 3, 4, 7, 7])).tolist()
    [0, 2, 3]
    """
    if len(keys) == 0:
        return np.empty(0, np.int64)
    return np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))


def rank_in_runs(keys: npt.NDArray) -> Ints:
    """Place of each entry within its run of equal values.

    >>> rank_in_runs(np.array([3, 3, 4, 7, 7])).tolist()
    [0, 1, 0, 0, 1]
    """
    starts = first_of_runs(keys)
    lengths = np.diff(np.concatenate([starts, [len(keys)]]))
    return np.arange(len(keys)) - np.repeat(starts, lengths)
