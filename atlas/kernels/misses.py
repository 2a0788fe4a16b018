"""The nearest misses of features: the largest of what did not fire, block by block, in short sorted lists."""

import numpy as np
import numpy.typing as npt

from atlas.kernels.compiled import compiled


@compiled
def first_places(
    pre: npt.NDArray[np.float32],
    best: npt.NDArray[np.float32],
    block: npt.NDArray[np.int64],
    feature: npt.NDArray[np.int64],
    place: npt.NDArray[np.int64],
) -> None:
    """Fill ``place`` with where, in its block, each feature first has the value ``best``.

    pre [blocks, places, d_sae], best [blocks, d_sae]; the pairs of block and feature are sorted by block. The
    rows of a block are read one after the other: a feature's own column would be a miss at every step.
    """
    low = 0
    while low < len(block):
        high = low + np.searchsorted(block[low:], block[low], side="right")
        values, wanted = pre[block[low]], best[block[low]]
        of, found = feature[low:high], place[low:high]
        for at in range(len(values) - 1, -1, -1):
            row = values[at]
            for i in range(len(of)):
                if row[of[i]] == wanted[of[i]]:
                    found[i] = at
        low = high


@compiled
def insert(
    kept: npt.NDArray[np.float32],
    token: npt.NDArray[np.int64],
    feature: npt.NDArray[np.int64],
    new_token: npt.NDArray[np.int64],
    new: npt.NDArray[np.float32],
) -> None:
    """Put values into their features' lists [d_sae, n]: the largest first, of equals the smaller token first.

    Unused slots hold -inf and the token -1.
    """
    n = kept.shape[1]
    for i in range(len(feature)):
        f, value, of = feature[i], new[i], new_token[i]
        slot = n
        while slot > 0 and (
            token[f, slot - 1] < 0
            or value > kept[f, slot - 1]
            or (value == kept[f, slot - 1] and of < token[f, slot - 1])
        ):
            slot -= 1
        for later in range(n - 1, slot, -1):
            kept[f, later], token[f, later] = kept[f, later - 1], token[f, later - 1]
        if slot < n:
            kept[f, slot], token[f, slot] = value, of
