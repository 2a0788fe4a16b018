"""Sums over the tokens on which each feature fires, by head: what FVE over active tokens is made of."""

import numpy as np
import numpy.typing as npt

from atlas.kernels.compiled import compiled

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]


@compiled
def _add_four(x: Floats, row: Ints, p: Floats, total: Floats, times_p: Floats) -> None:
    """Add four tokens of a feature; at once, because each addition to the sums reads and writes them."""
    a, b, c, d = x[row[0]], x[row[1]], x[row[2]], x[row[3]]
    of_a, of_b, of_c, of_d = p[0], p[1], p[2], p[3]
    for i in range(len(total)):
        total[i] += (a[i] + b[i]) + (c[i] + d[i])
        times_p[i] += (of_a * a[i] + of_b * b[i]) + (of_c * c[i] + of_d * d[i])


@compiled
def _add_one(one: Floats, p: float, total: Floats, times_p: Floats) -> None:
    """Add one token of a feature."""
    for i in range(len(total)):
        total[i] += one[i]
        times_p[i] += p * one[i]


@compiled
def _sum_runs(values: Floats, width: int) -> None:
    """Put the sums of runs of ``width`` to the front; halves are added up for as long as there are any.

    All runs at once: a loop over one of them is too short for a processor's lanes.
    """
    n = len(values)
    while width and width % 2 == 0:
        n, width = n // 2, width // 2
        for i in range(n):
            values[i] = values[2 * i] + values[2 * i + 1]
    for run in range(n // max(width, 1)):
        total = np.float32(0)
        for i in range(width):
            total += values[run * width + i]
        values[run] = total


@compiled
def add_moments(starts: Ints, p: Floats, n: Sums, total: Sums, squares: Sums) -> None:
    """Add how many tokens each feature has, and sums of p and of p^2; ``p`` is sorted by feature."""
    for f in range(len(n)):
        n[f] += starts[f + 1] - starts[f]
        for i in range(starts[f], starts[f + 1]):
            value = np.float64(p[i])
            total[f] += value
            squares[f] += value * value


@compiled
def add_shares(
    starts: Ints, row: Ints, p: Floats, x: Floats, directions: Floats, by_head: Sums, weighted: Sums
) -> None:
    """Add sums of d_h and of p d_h, d_h = x[h] . W_enc[h, f], over each feature's tokens, [d_sae, heads].

    ``row`` and ``p`` are sorted by feature (``starts``); x [n, d_in], directions [d_sae, d_in].
    """
    d_sae, n_heads = by_head.shape
    d_in = x.shape[1]
    total, times_p = np.empty(d_in, np.float32), np.empty(d_in, np.float32)
    for f in range(d_sae):
        i, end, W = starts[f], starts[f + 1], directions[f]
        if i < end:
            total[:], times_p[:] = 0, 0
            while i + 4 <= end:
                _add_four(x, row[i : i + 4], p[i : i + 4], total, times_p)
                i += 4
            while i < end:
                _add_one(x[row[i]], p[i], total, times_p)
                i += 1
            for c in range(d_in):
                total[c] *= W[c]
                times_p[c] *= W[c]
            _sum_runs(total, d_in // n_heads)
            _sum_runs(times_p, d_in // n_heads)
            for h in range(n_heads):
                by_head[f, h] += total[h]
                weighted[f, h] += times_p[h]
