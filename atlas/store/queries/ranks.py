"""Rank correlations of columns of a table."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float64]
LEAST_ROWS = 3


def average_ranks(values: Floats) -> Floats:
    """The place of each value in ascending order, from 1; equal values share the mean of theirs.

    >>> average_ranks(np.array([0.3, 0.1, 0.3, 0.9])).tolist()
    [2.5, 1.0, 2.5, 4.0]
    """
    order = np.argsort(values)
    ascending = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    ends = np.append(starts[1:], len(values))
    ranks = np.empty(len(values))
    ranks[order] = np.repeat((starts + ends + 1) / 2, ends - starts)
    return ranks


def rank_correlation(rows: pa.Table, one: str, other: str) -> float | None:
    """Spearman's rank correlation of two columns over the rows that have both; None below 3 rows.

    None, too, where a column does not vary.

    >>> t = pa.table({"a": [1.0, 2.0, 3.0], "b": [10.0, 30.0, 20.0]})
    >>> rank_correlation(t, "a", "b")
    0.5
    """
    return rank_correlations(rows, (one, other))[one, other]


def rank_correlations(rows: pa.Table, columns: Sequence[str]) -> dict[tuple[str, str], float | None]:
    """``rank_correlation`` of every pair of columns."""
    values = {name: _floats(rows[name]) for name in columns}
    whole = not any(np.isnan(column).any() for column in values.values())
    ranks = {name: average_ranks(column) for name, column in values.items()} if whole else {}
    return {
        (one, other): _pearson(ranks[one], ranks[other]) if whole else _of_both(values[one], values[other])
        for one, other in combinations(columns, 2)
    }


def _floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)


def _of_both(one: Floats, other: Floats) -> float | None:
    both = ~(np.isnan(one) | np.isnan(other))
    return _pearson(average_ranks(one[both]), average_ranks(other[both]))


def _pearson(one: Floats, other: Floats) -> float | None:
    if len(one) < LEAST_ROWS:
        return None
    a, b = one - one.mean(), other - other.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return round(float(a @ b / size), 12) if size > 0 else None
