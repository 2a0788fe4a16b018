"""Each kept example's contributions by head and source, looked at while they are in the processor's cache."""

import numpy as np
import numpy.typing as npt

from atlas.kernels.compiled import compiled
from atlas.kernels.sources import keep_of_one, room_to_keep

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@compiled
def read_rows(x: Floats, block: Ints, position: Ints, weights: Floats, feature: Ints, out: Floats) -> None:
    """Fill ``out`` [n] with x[block, position] . weights[feature]; no row is copied."""
    for i in range(len(out)):
        one, other, total = x[block[i], position[i]], weights[feature[i]], np.float32(0)
        for c in range(len(one)):
            total += one[c] * other[c]
        out[i] = total


@compiled
def _weigh(pattern: Floats, read: Floats, scale: float, out: Floats) -> np.float32:
    """Fill ``out`` with pattern * read * scale, source by source; their sum."""
    total = np.float32(0)
    for s in range(len(out)):
        value = pattern[s] * read[s] * scale
        out[s] = value
        total += value
    return total


@compiled
def attribute(
    pattern: Floats,
    read: Floats,
    position: Ints,
    scale: Floats,
    by_head: Floats,
    place: Ints,
    value: Floats,
    count: Ints,
    best: Ints,
    slot: Ints,
    kept: Floats,
) -> None:
    """Attribute examples of one block: pattern [heads, query, key], ``read`` v . direction [heads, n, key].

    Fills each example's sums by head [n, heads] and what ``keep_largest`` fills; the contributions themselves
    go into ``kept`` [slots, heads, key], all zeros before, where ``slot`` is not negative.
    """
    heads, n, key = read.shape
    row, room = np.empty(heads * key, np.float32), room_to_keep(heads * key)
    for i in range(n):
        here, sources = position[i], position[i] + 1
        for h in range(heads):
            part = row[h * sources : (h + 1) * sources]
            by_head[i, h] = _weigh(pattern[h, here, :sources], read[h, i, :sources], scale[i], part)
            if slot[i] >= 0:
                kept[slot[i], h, :sources] = part
        used = row[: heads * sources]
        count[i], best[i] = keep_of_one(used, sources, key, place[i], value[i], room)
