"""The k largest entries of rows, nearly all of which are read once and no more.

Entries are compared as integers in the order of the floats whose bits they are: -0.0 equals 0.0, and NaN
equals positive infinity. A row is cut into groups of neighbours; the k-th largest of the groups' maxima is no
larger than the k-th largest entry, so only the few groups that reach it are looked at again.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from atlas.kernels.compiled import compiled

GROUP = 16
_LANES, _EXACT = 16, 1 << 24
Bits = npt.NDArray[np.signedinteger[Any]]
Ints = npt.NDArray[np.int64]


@compiled
def _key(bits: int, infinity: int, magnitude: int) -> int:
    """What a float of these bits is compared by."""
    size = bits & magnitude
    nan = size > infinity
    size = infinity if nan else size
    return size if (bits >= 0 or nan) else -size


@compiled
def group_maxima(row: Bits, infinity: int, magnitude: int, maxima: Bits) -> None:
    """The largest key of each group; the last group may be shorter."""
    whole = len(row) // GROUP
    for g in range(whole):
        best = -infinity
        for i in range(GROUP):
            best = max(best, _key(row[g * GROUP + i], infinity, magnitude))
        maxima[g] = best
    if whole < len(maxima):
        best = -infinity
        for i in range(whole * GROUP, len(row)):
            best = max(best, _key(row[i], infinity, magnitude))
        maxima[whole] = best


@compiled
def _reaching(keys: Bits, least: int) -> int:
    """How many keys are not below ``least``."""
    if len(keys) > _EXACT:
        return int(np.count_nonzero(keys >= least))
    n = np.float32(0)  # as wide as a key, so that one instruction adds as many as it compares
    for i in range(len(keys)):
        n += np.float32(1) if keys[i] >= least else np.float32(0)
    return int(n)


@compiled
def kth_largest(keys: Bits, k: int) -> int:
    """The k-th largest key, or a smaller number that exactly k keys reach."""
    low, high = keys[0], keys[0]
    for key in keys:
        low, high = min(low, key), max(high, key)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # half-way, rounded up; their sum may be too large
        n = _reaching(keys, middle)
        if n == k:
            return middle
        if n > k:
            low = middle
        else:
            high = middle - 1
    return low


@compiled
def candidates(
    row: Bits, infinity: int, magnitude: int, groups: Ints, bound: int, keys: Bits, column: Ints
) -> int:
    """Put the entries of some groups that reach the bound into ``keys`` and ``column``; how many they are.

    Every entry is written and the next one overwrites it unless it is kept, so that no branch is guessed.
    """
    found, whole = 0, len(row) // GROUP
    for g in groups:
        size = GROUP if g < whole else len(row) - whole * GROUP
        for i in range(g * GROUP, g * GROUP + size):
            key = _key(row[i], infinity, magnitude)
            keys[found], column[found] = key, i
            found += key >= bound
    return found


@compiled
def keep(keys: Bits, column: Ints, k: int, out: Ints) -> None:
    """Fill ``out`` with the columns of the k largest keys, of equals the first; uses up ``column``."""
    bound = kth_largest(keys, k)
    # All that reach the bound are kept, unless too many equal it.
    exact = _reaching(keys, bound) == k
    spare = k if exact else k - _reaching(keys, bound + 1)
    kept = 0
    for i in range(len(keys)):
        equal = keys[i] == bound
        column[kept] = column[i]
        kept += (keys[i] > bound) | (equal & (spare > 0))
        spare -= equal
    out[:] = column[:k]


@compiled
def largest(rows: Bits, infinity: int, magnitude: int, k: int, out: Ints) -> None:
    """Fill each row of ``out`` [rows, k] with the columns of the k largest entries, ascending.

    Ties go to the lower column. ``infinity`` is what infinity looks like, ``magnitude`` masks the sign.
    """
    n, width = rows.shape
    n_groups = -(-width // GROUP)
    maxima, groups = np.empty(n_groups, rows.dtype), np.empty(n_groups + 1, np.int64)
    keys, column = np.empty(width + _LANES, rows.dtype), np.empty(width + _LANES, np.int64)
    for r in range(n):
        group_maxima(rows[r], infinity, magnitude, maxima)
        bound = kth_largest(maxima, k) if k <= n_groups else -infinity
        reach = 0
        for g in range(n_groups):
            groups[reach] = g
            reach += maxima[g] >= bound
        found = candidates(rows[r], infinity, magnitude, groups[:reach], bound, keys, column)
        # Whole lanes leave no rest that would be counted one by one; what fills them loses every tie.
        whole = -(-found // _LANES) * _LANES
        keys[found:whole] = -infinity
        keep(keys[:whole], column, k, out[r])
