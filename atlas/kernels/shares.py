"""Sums over the tokens on which each feature fires, by head: what FVE over active tokens is made of."""

import numpy as np
import numpy.typing as npt

from atlas.kernels.compiled import compiled

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]


@compiled
def _add_tokens(row: Ints, p: Floats, x: Floats, total: Floats, times_p: Floats) -> int:
    """Add the first four tokens of a feature, or the first; how many were added.

    Four at once, because each addition to the sums reads and writes them.
    """
    if len(row) < 4:
        one, weight = x[row[0]], p[0]
        for c in range(len(total)):
            total[c] += one[c]
            times_p[c] += weight * one[c]
        return 1
    a, b, c, d = x[row[0]], x[row[1]], x[row[2]], x[row[3]]
    for i in range(len(total)):
        total[i] += (a[i] + b[i]) + (c[i] + d[i])
        times_p[i] += (p[0] * a[i] + p[1] * b[i]) + (p[2] * c[i] + p[3] * d[i])
    return 4


@compiled
def add_shares(
    starts: Ints, row: Ints, p: Floats, x: Floats, directions: Floats, by_head: Sums, weighted: Sums
) -> None:
    """Add sums of d_h and of p d_h, d_h = x[h] . W_enc[h, f], over each feature's tokens, [d_sae, heads].

    ``row`` and ``p`` are sorted by feature (``starts``); x [n, d_in], directions [d_sae, d_in].
    """
    d_sae, n_heads = by_head.shape
    d_in = x.shape[1]
    width = d_in // n_heads
    total, times_p = np.empty(d_in, np.float32), np.empty(d_in, np.float32)
    for f in range(d_sae):
        if starts[f] < starts[f + 1]:
            total[:], times_p[:] = 0, 0
            i, end = starts[f], starts[f + 1]
            while i < end:
                i += _add_tokens(row[i:end], p[i:end], x, total, times_p)
            for h in range(n_heads):
                low = h * width
                W, one, other = directions[f, low : low + width], np.float32(0), np.float32(0)
                for c in range(len(W)):
                    one += total[low + c] * W[c]
                    other += times_p[low + c] * W[c]
                by_head[f, h] += one
                weighted[f, h] += other
