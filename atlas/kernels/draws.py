"""Draws among features' activations by a hash of each token, whatever the parts the text was cut into."""

import numpy as np
import numpy.typing as npt

from atlas.kernels.compiled import compiled

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

_UPPER, _LOWER = np.uint64(33), np.uint64(0x7FFFFFFF)
"""31 bits of a hash decide one draw, 31 others the other."""


@compiled
def mixed(x: np.uint64) -> np.uint64:
    """SplitMix64's finaliser: a fixed, well-spread function of 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def mixed_all(x: Hashes) -> Hashes:
    """``mixed`` of each number."""
    out = np.empty_like(x)
    for i in range(len(x)):
        out[i] = mixed(x[i])
    return out


@compiled
def _offer(value: np.uint64, at: int, kept: Hashes, place: Ints, n: int) -> int:
    """Keep ``at``, whose hash is below the last one kept or finds room; of equals the earlier is first.

    How many are kept then.
    """
    slot = n
    while slot > 0 and value < kept[slot - 1]:
        slot -= 1
    for later in range(min(n, len(kept) - 1), slot, -1):
        kept[later], place[later] = kept[later - 1], place[later - 1]
    kept[slot], place[slot] = value, at
    return min(n + 1, len(kept))


@compiled
def draw(
    starts: Ints, strongest: Ints, token: Ints, salt: Hashes, of_part: Ints, of_all: Ints, counts: Ints
) -> None:
    """Fill what is drawn of each feature's activations, which lie one feature after the other (``starts``).

    ``strongest`` [n] are the activations from strong to weak within a feature. Part g of n activations are
    those with floor(parts * (rank from the bottom) / n) = g. The smallest hashes are drawn: by their upper
    bits of each part, ``of_part`` [d_sae, parts, k], by their lower bits of all, ``of_all`` [d_sae, k];
    ``counts`` [d_sae, parts + 1] says how many. Both hold places in ``strongest``, ascending; ties go to the
    stronger.
    """
    parts = of_part.shape[1]
    upper, lower = np.empty(of_part.shape[2], np.uint64), np.empty(of_all.shape[1], np.uint64)
    for f in range(len(of_part)):
        n, rank, any_of_all = starts[f + 1] - starts[f], starts[f], 0
        of_feature = of_all[f]
        for g in range(parts - 1, -1, -1):
            drawn, end, mine = 0, starts[f + 1] - (g * n + parts - 1) // parts, of_part[f, g]
            for at in range(rank, end):
                value = mixed(salt[f] + np.uint64(token[strongest[at]]))
                # Nearly all are told here, without a call.
                if drawn < len(upper) or value >> _UPPER < upper[-1]:
                    drawn = _offer(value >> _UPPER, at, upper, mine, drawn)
                if any_of_all < len(lower) or value & _LOWER < lower[-1]:
                    any_of_all = _offer(value & _LOWER, at, lower, of_feature, any_of_all)
            rank, counts[f, g] = end, drawn
            mine[:drawn].sort()
        counts[f, parts] = any_of_all
        of_all[f, :any_of_all].sort()
