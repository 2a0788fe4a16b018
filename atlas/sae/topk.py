"""The k largest entries of each row, or the largest of a whole batch, with one answer where entries tie.

Ties go to the lower index. -0.0 and 0.0 tie, and NaN counts as positive infinity, so that a diverged SAE
shows NaN in its loss.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.errors import SAEError
from atlas.kernels.largest import GROUP, candidates, group_maxima, keep, kth_largest, largest

CHUNK_ELEMENTS = 1 << 20
"""Entries that one thread works on at a time."""
_INTEGERS: dict[torch.dtype, tuple[type, int]] = {
    torch.float32: (np.int32, 0x7F80_0000),
    torch.float64: (np.int64, 0x7FF0_0000_0000_0000),
}
"""Integers as wide as a float, and the one that looks like infinity."""

Array = np.ndarray
R = TypeVar("R")


def top_k(
    rows: Float[Tensor, "n_rows width"], k: int
) -> tuple[Float[Tensor, "n_rows k"], Int[Tensor, "n_rows k"]]:
    """Values and indices of the k largest entries of each row, in index order; ties go to the lower index.

    ``torch.topk`` breaks ties as it likes and is several times slower on a CPU.

    Raises:
        SAEError: k is not from 1 to the width.

    >>> values, index = top_k(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 2)
    >>> values.tolist(), index.tolist()
    ([[3.0, 3.0]], [[1, 2]])
    """
    _check("k", k, rows.shape[1])
    index = _cuda(rows, k) if rows.is_cuda else _cpu(rows, k)
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
    whole = rows.reshape(-1)
    flat = _cuda(whole[None], n)[0] if rows.is_cuda else _largest_of_all(whole, n)
    return flat // width, flat % width, whole[flat]


def _check(name: str, n: int, most: int) -> None:
    if not 1 <= n <= most:
        raise SAEError(f"{name} {n} is not allowed; it must be from 1 to {most}")


def _bits(values: Tensor) -> tuple[Array, Any, Any]:
    """Numbers as integers of the same bits, what infinity looks like, and the mask of all but the sign."""
    values = values.detach().contiguous()
    values = values if values.dtype in _INTEGERS else values.float()
    kind, infinity = _INTEGERS[values.dtype]
    return values.numpy().view(kind), kind(infinity), kind(np.iinfo(kind).max)


def _cpu(rows: Tensor, k: int) -> Int[Tensor, "n_rows k"]:
    """Indices of the k largest of each row, ascending."""
    bits, infinity, magnitude = _bits(rows)
    out = np.empty((len(bits), k), dtype=np.int64)
    size = max(1, CHUNK_ELEMENTS // bits.shape[1])

    def work(part: slice) -> None:
        largest(bits[part], infinity, magnitude, k, out[part])

    _in_parallel(work, len(bits), size)
    return torch.from_numpy(out)


def _largest_of_all(values: Tensor, n: int) -> Int[Tensor, " n"]:
    """Indices of the n largest, ascending; what ``largest`` does with a row, its parts side by side."""
    bits, infinity, magnitude = _bits(values)
    maxima = np.empty(-(-len(bits) // GROUP), bits.dtype)
    size = max(1, CHUNK_ELEMENTS // GROUP)

    def read(part: slice) -> None:
        group_maxima(bits[_entries(part)], infinity, magnitude, maxima[part])

    def look_again(part: slice) -> tuple[Array, Array]:
        groups = np.flatnonzero(maxima[part] >= bound)
        keys = np.empty(len(groups) * GROUP + 1, bits.dtype)
        column = np.empty(len(keys), np.int64)
        found = candidates(bits[_entries(part)], infinity, magnitude, groups, bound, keys, column)
        return keys[:found], column[:found] + part.start * GROUP

    _in_parallel(read, len(maxima), size)
    bound = kth_largest(maxima, n) if n <= len(maxima) else -int(infinity)
    keys, column = (np.concatenate(c) for c in zip(*_in_parallel(look_again, len(maxima), size), strict=True))
    out = np.empty(n, np.int64)
    keep(keys, column, n, out)
    return torch.from_numpy(out)


def _entries(groups: slice) -> slice:
    """The entries of some groups; the last of them may be shorter than it says."""
    return slice(groups.start * GROUP, groups.stop * GROUP)


def _in_parallel(work: Callable[[slice], R], n: int, size: int) -> list[R]:
    """What ``work`` gives for each ``size`` of n, in order, with as many threads as torch uses."""
    parts = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    threads = min(torch.get_num_threads(), len(parts))
    if threads < 2:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, parts))


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
