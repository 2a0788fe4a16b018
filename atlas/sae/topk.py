"""The k largest entries of each row, or the largest of a whole batch, with one answer where entries tie.

Ties go to the lower index. -0.0 and 0.0 tie, and NaN counts as positive infinity, so that a diverged SAE
shows NaN in its loss.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.errors import SAEError
from atlas.kernels.largest import largest

Array = np.ndarray
CHUNK_ELEMENTS = 1 << 20
"""Entries that one thread works on at a time."""
_BITS: dict[torch.dtype, tuple[type, Any, Any]] = {
    torch.float32: (np.int32, np.int32(0x7F80_0000), np.int32(0x7FFF_FFFF)),
    torch.float64: (np.int64, np.int64(0x7FF0_0000_0000_0000), np.int64(0x7FFF_FFFF_FFFF_FFFF)),
}
"""Integers as wide as a float, the one that looks like infinity, and the mask of all bits but the sign."""


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
    whole = rows.reshape(1, -1)
    flat = (_cuda(whole, n) if rows.is_cuda else _cpu(whole, n))[0]
    return flat // width, flat % width, whole[0, flat]


def _check(name: str, n: int, most: int) -> None:
    if not 1 <= n <= most:
        raise SAEError(f"{name} {n} is not allowed; it must be from 1 to {most}")


def _cpu(rows: Tensor, k: int) -> Int[Tensor, "n_rows k"]:
    """Indices of the k largest of each row, ascending; with as many threads as torch uses."""
    rows = rows.detach().contiguous()
    rows = rows if rows.dtype in _BITS else rows.float()
    kind, infinity, magnitude = _BITS[rows.dtype]
    bits: Array = rows.numpy().view(kind)
    out = np.empty((len(bits), k), dtype=np.int64)
    size = max(1, CHUNK_ELEMENTS // bits.shape[1])
    parts = [slice(start, start + size) for start in range(0, len(bits), size)]

    def work(part: slice) -> None:
        largest(bits[part], infinity, magnitude, k, out[part])

    threads = min(torch.get_num_threads(), len(parts))
    if threads < 2:
        for part in parts:
            work(part)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, parts))
    return torch.from_numpy(out)


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
