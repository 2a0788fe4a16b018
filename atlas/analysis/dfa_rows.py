"""The DFA of kept examples on its way into a table: taken down in any order, stored by feature.

A part of the text writes one folder per SAE. ``StoredRows`` puts the parts together again, a range of
features at a time.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from atlas.analysis.acts import Ints
from atlas.analysis.arrays import open_arrays, save_arrays
from atlas.analysis.contributions import Largest
from atlas.analysis.dfa_sums import matched_prefix
from atlas.analysis.examples import GROUPS
from atlas.errors import StoreError
from atlas.kernels.sources import gather_runs, write_down
from atlas.tables import FULL_WEIGHT, SOURCES

_ROW = np.dtype(
    [
        ("feature", "i4"), ("code", "i1"), ("rank", "i2"), ("block", "i4"), ("bias", "f4"), ("pre", "f4"),
        ("top_head", "i2"), ("top_source", "i2"), ("matched", "i2"), ("unit", "f4"), ("n_sources", "i2"),
    ]
)  # fmt: skip
_SOURCE = np.dtype([("head", "i2"), ("source", "i2"), ("weight", "i2")])


class Rows(NamedTuple):
    """DFA of examples, sorted by feature, group and rank; ``sources`` belong to them one after the other."""

    rows: npt.NDArray
    by_head: npt.NDArray[np.float32]
    sources: npt.NDArray

    def sorted(self) -> "Rows":
        """In the order of the table's key."""
        rows = self.rows
        key = (rows["feature"].astype(np.int64) * len(GROUPS) + rows["code"]) << 16 | rows["rank"]
        order = np.argsort(key)
        counts = rows["n_sources"].astype(np.int64)
        sources = np.empty_like(self.sources)
        # As numbers of two bytes, three to a source.
        flat, out = self.sources.view(np.int16), sources.view(np.int16)
        gather_runs(flat, 3 * (counts.cumsum() - counts)[order], 3 * counts[order], out)
        return Rows(rows[order], self.by_head[order], sources)


class Split(NamedTuple):
    """Pre-activations of examples: each head's part, what is added to them, and the sum as x gives it."""

    by_head: Float[Tensor, "n heads"]
    bias_term: Float[Tensor, " n"]
    pre_activation: Float[Tensor, " n"]


class DFARows:
    """Takes down the DFA of examples, read through some heads of a layer."""

    def __init__(self, heads: Sequence[int]) -> None:
        self.heads = np.array(heads, np.int64)
        self.parts: list[Rows] = [
            Rows(np.empty(0, _ROW), np.empty((0, len(heads)), np.float32), np.empty(0, _SOURCE))
        ]

    def add(self, kept: Any, split: Split, largest: Largest, tokens: Ints) -> Ints:
        """Add examples: how they split, their largest contributions, and the tokens of their blocks.

        Returns how far the prefix of each one's strongest source matches.
        """
        key = tokens.shape[1]
        top_head, top_source = np.divmod(largest.best, key)
        some = largest.best >= 0
        top_source = np.where(some, top_source, -1)
        matched = matched_prefix(tokens, kept.position, top_source)
        rows = np.empty(len(largest.n), _ROW)
        rows["feature"], rows["code"], rows["rank"] = kept.feature, kept.code, kept.rank
        rows["block"] = kept.block
        rows["bias"] = split.bias_term.cpu().numpy()
        rows["pre"] = split.pre_activation.cpu().numpy()
        rows["top_head"], rows["top_source"] = np.where(some, self.heads[top_head], -1), top_source
        rows["matched"] = matched
        unit = short(np.abs(largest.value[:, 0]) / FULL_WEIGHT)
        rows["unit"], rows["n_sources"] = unit, largest.n
        sources = np.empty(int(largest.n.sum()), _SOURCE)
        numbers = sources.view(np.int16).reshape(-1, 3)
        write_down(largest.place, largest.value, largest.n, unit, self.heads, key, numbers)
        self.parts.append(Rows(rows, split.by_head.cpu().numpy(), sources))
        return matched

    def save(self, folder: Path) -> None:
        """Write into a new folder, sorted by feature."""
        joined = Rows(*(np.concatenate(parts) for parts in zip(*self.parts, strict=True))).sorted()
        save_arrays(folder, joined._asdict())


class StoredRows:
    """One SAE's DFA in any number of parts on disk, read a range of features at a time.

    Raises:
        StoreError: a file is missing or damaged.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.parts = [_open(folder) for folder in folders]
        self.offsets = [
            np.concatenate([[0], part.rows["n_sources"].cumsum(dtype=np.int64)]) for part in self.parts
        ]

    def read(self, features: range) -> Rows:
        """The rows of some features, in the order of the table's key."""
        return Rows(
            *(np.concatenate(parts) for parts in zip(*self._parts_of(features), strict=True))
        ).sorted()

    def _parts_of(self, features: range) -> Iterator[Rows]:
        for part, offset in zip(self.parts, self.offsets, strict=True):
            low, high = np.searchsorted(part.rows["feature"], [features.start, features.stop])
            yield Rows(part.rows[low:high], part.by_head[low:high], part.sources[offset[low] : offset[high]])


def short(unit: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Numbers, none below 0, rounded up to three decimal digits, which take a byte less.

    >>> short(np.array([0.0123401, 0.0])).tolist()
    [0.012400000356137753, 0.0]
    """
    decimals = 2 - np.floor(np.log10(np.where(unit > 0, unit, 1).astype(np.float64)))
    return (np.ceil(unit * 10.0**decimals) / 10.0**decimals).astype(np.float32)


def _open(folder: Path) -> Rows:
    found = Rows(**open_arrays(folder, Rows._fields))
    kinds = found.rows.dtype == _ROW and found.sources.dtype == _SOURCE
    if not kinds or found.rows["n_sources"].sum() != len(found.sources):
        raise StoreError(f"attributions in {str(folder)!r} do not belong together")
    return found


def columns_of(found: Rows) -> dict[str, Any]:
    """The columns of the ``dfa`` table."""
    rows, n_heads = found.rows, found.by_head.shape[1]
    none = rows["top_source"] < 0
    heads = pa.array(np.arange(0, found.by_head.size + 1, n_heads, dtype=np.int32))
    edges = pa.array(np.concatenate([[0], rows["n_sources"].cumsum(dtype=np.int64)]).astype(np.int32))
    fields = [SOURCES.value_type.field(i) for i in range(3)]
    sources = [pa.array(np.ascontiguousarray(found.sources[field.name])) for field in fields]
    return {
        "feature": rows["feature"].astype(np.int64),
        "example_group": GROUPS[rows["code"]],
        "rank": rows["rank"],
        "by_head": pa.ListArray.from_arrays(heads, pa.array(found.by_head.ravel())),
        "bias_term": rows["bias"],
        "pre_activation": rows["pre"],
        "top_head": pa.array(rows["top_head"], mask=none),
        "top_source": pa.array(rows["top_source"], mask=none),
        "matched_prefix": rows["matched"],
        "unit": rows["unit"],
        "sources": pa.ListArray.from_arrays(edges, pa.StructArray.from_arrays(sources, fields=fields)),
    }
