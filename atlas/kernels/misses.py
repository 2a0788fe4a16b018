"""The nearest misses of features: the largest of what did not fire, block by block, in short sorted lists."""

import numpy as np
import numpy.typing as npt

from atlas.kernels.compiled import compiled

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@compiled
def leave_out(pre: Floats, row: Ints, feature: Ints) -> None:
    """Put -inf where a feature fires."""
    for i in range(len(row)):
        pre[row[i], feature[i]] = -np.inf


@compiled
def _largest(values: Floats, best: Floats, place: npt.NDArray[np.int32]) -> None:
    """Each feature's largest value in a block [places, d_sae], and where it is first.

    Row after row: a feature's own column would be a miss of the cache at every step.
    """
    best[:], place[:] = values[0], 0
    for at in range(1, len(values)):
        row, here = values[at], np.int32(at)
        for f in range(len(row)):
            value, before = row[f], best[f]
            place[f] = here if value > before else place[f]
            best[f] = max(before, value)


@compiled
def put(kept: Floats, token: Ints, value: float, of: int) -> None:
    """Put a value into a list: the largest first, of equals the smaller token first."""
    slot = len(kept)
    while slot > 0 and (
        token[slot - 1] < 0 or value > kept[slot - 1] or (value == kept[slot - 1] and of < token[slot - 1])
    ):
        slot -= 1
    for later in range(len(kept) - 1, slot, -1):
        kept[later], token[later] = kept[later - 1], token[later - 1]
    if slot < len(kept):
        kept[slot], token[slot] = value, of


@compiled
def add_blocks(pre: Floats, first_token: int, context: int, kept: Floats, token: Ints) -> None:
    """Put the largest value of each block into its feature's list: pre [blocks, places, d_sae].

    ``first_token`` is the number of the first block's first place; the next block's is ``context`` later. The
    lists are those of ``insert``; -inf is no value, and equals are kept as there, whichever comes first.
    """
    d_sae, n = kept.shape
    best, place = np.empty(d_sae, np.float32), np.empty(d_sae, np.int32)
    for b in range(len(pre)):
        _largest(pre[b], best, place)
        for f in range(d_sae):
            if best[f] >= kept[f, n - 1] and best[f] > -np.inf:
                put(kept[f], token[f], best[f], first_token + b * context + place[f])


@compiled
def insert(kept: Floats, token: Ints, feature: Ints, new_token: Ints, new: Floats) -> None:
    """Put values into their features' lists [d_sae, n]; unused slots hold -inf and the token -1."""
    for i in range(len(feature)):
        put(kept[feature[i]], token[feature[i]], new[i], new_token[i])
