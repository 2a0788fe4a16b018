"""Sums of positive contributions over top examples: by head and kind of source, and by distance."""

import numpy as np
import numpy.typing as npt

from atlas.kernels.compiled import compiled

Ints = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]


@compiled
def _same_and_after(tokens: Ints, p: int, same: npt.NDArray, after: npt.NDArray) -> None:
    """Mark the sources that are earlier copies of p's token, and those that follow one."""
    same[: p + 1], after[: p + 1] = 0, 0
    for s in range(1, p):
        same[s] = tokens[s] == tokens[p]
    for s in range(2, p):
        after[s] = same[s - 1]


@compiled
def add_by_head(
    dense: npt.NDArray[np.float32],
    tokens: Ints,
    position: Ints,
    feature: Ints,
    kinds: Sums,
    distance: Sums,
) -> None:
    """Add the positive part of examples to the sums of their features.

    dense [n, heads, key], tokens [n, key]; kinds [d_sae, heads, 7] in the order bos, current, previous, same
    token, after a match, not BOS, all; distance [d_sae, heads] weighs what is not BOS by its distance.
    A row's few numbers are added up in float32, without BOS, which may be millions of times as large as the
    rest; rows in float64.
    """
    n, heads, key = dense.shape
    same, after = np.zeros(key, np.float32), np.zeros(key, np.float32)
    for i in range(n):
        p, f = position[i], feature[i]
        _same_and_after(tokens[i], p, same, after)
        for h in range(heads):
            row, none = dense[i, h, : p + 1], np.float32(0)
            rest, copies, followers, far = none, none, none, none
            for s in range(1, len(row)):
                value = max(row[s], none)
                rest += value
                copies += value * same[s]
                followers += value * after[s]
                far += value * np.float32(p - s)
            first, sums = np.float64(max(row[0], none)), kinds[f, h]
            sums[0] += first
            sums[1] += max(row[p], none)
            if p > 1:
                sums[2] += max(row[p - 1], none)
            sums[3] += copies
            sums[4] += followers
            sums[5] += rest
            sums[6] += first + rest
            distance[f, h] += far


@compiled
def add_by_distance(
    dense: npt.NDArray[np.float32], position: Ints, feature: Ints, bin_of: Ints, bins: Sums
) -> None:
    """Add examples to their features' sums by distance: bins [d_sae, positive and negative, bins].

    ``bin_of`` names the bin of each distance; BOS has bin 0 whatever its distance.
    """
    n, heads, key = dense.shape
    positive, negative = np.empty(key, np.float32), np.empty(key, np.float32)
    for i in range(n):
        p, f = position[i], feature[i]
        positive[: p + 1], negative[: p + 1] = 0, 0
        for h in range(heads):
            row = dense[i, h, : p + 1]
            for s in range(len(row)):
                positive[s] += max(row[s], np.float32(0))
                negative[s] += max(-row[s], np.float32(0))
        for s in range(p + 1):
            where = 0 if s == 0 else bin_of[p - s]
            bins[f, 0, where] += positive[s]
            bins[f, 1, where] += negative[s]
