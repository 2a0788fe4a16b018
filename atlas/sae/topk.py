"""The k largest entries of each row, or the largest of a whole batch, with one answer where entries tie.

On a CPU the wide matrix is read once. Its rows are cut into groups of neighbours; the k-th largest of the
groups' maxima is no larger than the k-th largest entry, so only the few groups that reach it are looked at
again. Ties go to the lower index. -0.0 and 0.0 tie, and NaN counts as positive infinity, so that a
diverged SAE shows NaN in its loss.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from atlas.errors import SAEError

GROUP = 32
CHUNK_ELEMENTS = 1 << 20
"""Entries that one thread works on at a time: a few MB stay in its cache."""

Array = np.ndarray


class _Found(NamedTuple):
    """Candidates in ascending order of place: the row that each is in, its column and its value."""

    row: Array
    column: Array
    value: Array


def top_k(
    rows: Float[Tensor, "n_rows width"], k: int
) -> tuple[Float[Tensor, "n_rows k"], Int[Tensor, "n_rows k"]]:
    """Values and indices of the k largest entries of each row, in index order; ties go to the lower index.

    ``torch.topk`` breaks ties as it likes and is many times slower on a CPU.

    Raises:
        SAEError: k is not from 1 to the width.

    >>> values, index = top_k(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 2)
    >>> values.tolist(), index.tolist()
    ([[3.0, 3.0]], [[1, 2]])
    """
    n_rows, width = rows.shape
    _check("k", k, width)
    if rows.is_cuda:
        index = _cuda(rows, k)
        return rows.gather(1, index), index
    array, out = _as_numpy(rows), np.empty((n_rows, k), dtype=np.int64)
    if width < 2 * GROUP * k:

        def work(part: slice) -> None:
            out[part] = _largest(array[part], k) % width

    else:
        filled, maxima = _in_groups(array)

        def work(part: slice) -> None:
            bound = _kth_largest(maxima[part], k)
            found = _candidates(filled[part], maxima[part], bound, width)
            out[part] = _largest_candidates(found, len(out[part]), k)

    _in_parallel(work, n_rows, width)
    index = torch.from_numpy(out)
    return rows.gather(1, index), index


def top_of_batch(
    rows: Float[Tensor, "n_rows width"], n: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Row, column and value of the n largest entries of the whole matrix, sorted by row, then by column.

    Ties go to the lower row, then to the lower column.

    Raises:
        SAEError: n is not from 1 to the number of entries.

    >>> row, column, value = top_of_batch(torch.tensor([[1.0, 3.0], [3.0, 2.0], [3.0, 0.0]]), 2)
    >>> row.tolist(), column.tolist(), value.tolist()
    ([0, 1], [1, 0], [3.0, 3.0])
    """
    n_rows, width = rows.shape
    _check("n", n, n_rows * width)
    if rows.is_cuda:
        flat = _cuda(rows.reshape(1, -1), n)[0]
    elif n_rows * width < 2 * GROUP * n:
        flat = torch.from_numpy(_largest(_as_numpy(rows).reshape(1, -1), n)[0])
    else:
        flat = torch.from_numpy(_largest_of_all(_as_numpy(rows), n))
    return flat // width, flat % width, rows.reshape(-1)[flat]


def _check(name: str, n: int, most: int) -> None:
    if not 1 <= n <= most:
        raise SAEError(f"{name} {n} is not allowed; it must be from 1 to {most}")


def _as_numpy(rows: Tensor) -> Array:
    rows = rows.detach().contiguous()
    return (rows if rows.dtype in (torch.float32, torch.float64) else rows.float()).numpy()


def _in_parallel(work: Callable[[slice], object], n_rows: int, width: int) -> list[Any]:
    """What ``work`` gives for each run of rows, in order, with as many threads as torch uses."""
    size = max(1, CHUNK_ELEMENTS // max(width, 1))
    parts = [slice(start, start + size) for start in range(0, n_rows, size)]
    threads = min(torch.get_num_threads(), len(parts))
    if threads < 2:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, parts))


def _kth_largest(rows: Array, k: int) -> Array:
    place = rows.shape[1] - k
    return np.partition(rows, place, axis=1)[:, place : place + 1]


def _reaching(rows: Array, bound: Array) -> Array:
    """Flat indices of the entries that are not below the bound of their row (NaN is never below)."""
    below = rows < bound
    return np.flatnonzero(np.logical_not(below, out=below))


def _largest(rows: Array, k: int) -> Array:
    """Flat indices [n_rows, k] of the k largest of each row, ascending."""
    bound = _kth_largest(rows, k)
    flat = _reaching(rows, bound)
    if len(flat) != len(rows) * k:
        flat = _without_surplus(rows, bound, flat, k)
    return flat.reshape(len(rows), k)


def _without_surplus(rows: Array, bound: Array, flat: Array, k: int) -> Array:
    """Of the entries that reach the k-th largest, those above it and the first of those that equal it."""
    row = flat // rows.shape[1]
    value, bound = (np.where(np.isnan(a), np.inf, a) for a in (rows.reshape(-1)[flat], bound[:, 0]))
    above = value > bound[row]
    spare = k - np.bincount(row[above], minlength=len(rows))
    equal = np.flatnonzero(value == bound[row])
    counts = np.bincount(row[equal], minlength=len(rows))
    rank = np.arange(len(equal)) - (counts.cumsum() - counts)[row[equal]]
    above[equal[rank < spare[row[equal]]]] = True
    return flat[above]


def _in_groups(rows: Array) -> tuple[Array, Array]:
    """The rows, filled up with -inf to whole groups, and the largest entry of each group."""
    whole = torch.from_numpy(rows)
    if rows.shape[1] % GROUP:
        whole = F.pad(whole, (0, -rows.shape[1] % GROUP), value=-math.inf)
    return whole.numpy(), whole.reshape(len(rows), whole.shape[1] // GROUP, GROUP).amax(2).numpy()


def _candidates(rows: Array, maxima: Array, bound: Array, width: int) -> _Found:
    """The entries that reach the bound of their row, by way of the groups that reach it."""
    groups = _reaching(maxima, bound)
    row, group = np.divmod(groups, maxima.shape[1])
    values = rows.reshape(-1, GROUP).take(groups, axis=0)
    which, offset = np.divmod(_reaching(values, bound[row] if len(bound) > 1 else bound), GROUP)
    found = _Found(row[which], group[which] * GROUP + offset, values[which, offset])
    if width < rows.shape[1]:
        real = found.column < width
        found = _Found(*(part[real] for part in found))
    return found


def _largest_candidates(found: _Found, n_rows: int, k: int) -> Array:
    """Columns [n_rows, k] of the k largest candidates of each row."""
    counts = np.bincount(found.row, minlength=n_rows)
    most = int(counts.max())
    place = np.arange(len(found.row)) + (np.arange(n_rows) * most - (counts.cumsum() - counts))[found.row]
    # Filling goes behind a row's candidates, so that it loses every tie.
    values = np.full(n_rows * most, -np.inf, dtype=found.value.dtype)
    columns = np.zeros(n_rows * most, dtype=np.int64)
    values[place], columns[place] = found.value, found.column
    return columns[_largest(values.reshape(n_rows, most), k)]


def _largest_of_all(rows: Array, n: int) -> Array:
    """Flat indices of the n largest entries of the matrix, ascending."""
    filled, maxima = _in_groups(rows)
    bound, (n_rows, width) = _kth_largest(maxima.reshape(1, -1), n), rows.shape

    def work(part: slice) -> _Found:
        found = _candidates(filled[part], maxima[part], bound, width)
        return found._replace(row=found.row + part.start)

    found = _Found(*(np.concatenate(part) for part in zip(*_in_parallel(work, n_rows, width), strict=True)))
    return (found.row * width + found.column)[_largest(found.value[None], n)[0]]


def _cuda(rows: Tensor, k: int) -> Int[Tensor, "n_rows k"]:
    """Indices of the k largest of each row, ascending."""
    bound = rows.topk(k, dim=1).values[:, -1:]
    chosen = ~(rows < bound)
    if int(chosen.sum()) != len(rows) * k:
        value, bound = (torch.where(torch.isnan(a), torch.inf, a) for a in (rows, bound))
        above, equal = value > bound, value == bound
        spare = k - above.sum(1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(1) <= spare))
    return chosen.reshape(-1).nonzero().squeeze(1).reshape(len(rows), k) % rows.shape[1]
