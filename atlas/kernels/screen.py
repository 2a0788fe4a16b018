"""What fires and what nearly fires, looked for among upper bounds of pre-activations and computed exactly.

Upper bounds come as bfloat16, whose bits are compared as integers ("keys"): the magnitude, negated where the
sign is. A pre-activation of at least v has a key of at least ``_floor`` of v, however the bound was rounded.
Only entries that may count are computed, in float32: feature by feature, because the directions of all
features are larger than a processor's cache and the tokens of a batch are not.
"""

import numpy as np
import numpy.typing as npt

from atlas.kernels.compiled import compiled
from atlas.kernels.largest import keep, kth_largest
from atlas.kernels.misses import put

Keys = npt.NDArray[np.int16]
Bits = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

MEMBERS = 8
"""Features whose largest key stands for them all at first."""
FIRED = -32768
"""Less than the key of any number."""
_LANES, _MAGNITUDE, _SMALLEST_NORMAL = 16, 0x7FFF_FFFF, 0x0080_0000
_HALF_A_STEP = np.float32(2**-8)


@compiled
def round_rows(rows: Floats, wide: Keys, size: Floats, of_rounded: Floats, off: Floats) -> None:
    """Put rows [n, d], rounded to bfloat16, into the first columns of ``wide``, as bits.

    Fills the norm of each row, of its rounded self and of the difference.
    """
    d = rows.shape[1]
    rounded = np.empty(d, np.float32)
    near = rounded.view(np.int32)
    for r in range(len(rows)):
        row = rows[r]
        bits = row.view(np.int32)
        for c in range(d):
            even = (bits[c] >> 16) & 1
            high = (bits[c] + 0x7FFF + even) >> 16
            wide[r, c], near[c] = high, high << 16
        one, other, between = np.float32(0), np.float32(0), np.float32(0)
        for c in range(d):
            one += row[c] * row[c]
            other += rounded[c] * rounded[c]
            between += (row[c] - rounded[c]) * (row[c] - rounded[c])
        size[r], of_rounded[r], off[r] = np.sqrt(one), np.sqrt(other), np.sqrt(between)


@compiled
def to_keys(bits: Keys) -> None:
    """Bits of bfloat16 numbers, none of them NaN, to their keys, in their place."""
    for i in range(len(bits)):
        sign = bits[i] >> 15
        bits[i] = ((bits[i] & 0x7FFF) ^ sign) - sign


@compiled
def _ordered(bits: int) -> int:
    """A float32 of these bits as an integer that orders like it."""
    return bits if bits >= 0 else -(bits & _MAGNITUDE)


@compiled
def _floor(value: float, one: Floats, bits: Bits) -> int:
    """The key of the largest bfloat16 not above a number; of one too small for bfloat16, that of zero.

    ``one`` and ``bits`` are the same four bytes, to be written over.
    """
    one[0] = value
    ordered = _ordered(bits[0])
    if ordered >= 0:
        return ordered >> 16 if ordered >= _SMALLEST_NORMAL else 0
    return -((0xFFFF - ordered) >> 16)


@compiled
def floors(values: Floats) -> Keys:
    """The key that an upper bound of at least each value has at least."""
    one, found = np.empty(1, np.float32), np.empty(len(values), np.int16)
    bits = one.view(np.int32)
    for i in range(len(values)):
        found[i] = _floor(values[i], one, bits)
    return found


@compiled
def _pre_activation(x: Floats, weights: Floats, bias: float) -> np.float32:
    """x . weights + bias."""
    total = np.float32(0)
    for c in range(len(x)):
        total += x[c] * weights[c]
    return total + bias


@compiled
def _group_maxima(row: Keys, maxima: Keys) -> None:
    """The largest key of each group: every n-th of the row, n groups of ``MEMBERS`` and what is left over."""
    n = len(maxima)
    for g in range(n):
        best = row[g]
        for j in range(1, MEMBERS):
            here = row[g + j * n]
            best = max(best, here)
        maxima[g] = best
    for i in range(MEMBERS * n, len(row)):
        maxima[i - MEMBERS * n] = max(maxima[i - MEMBERS * n], row[i])


@compiled
def _members(row: Keys, maxima: Keys, least: int, groups: Bits, feature: Bits, found: int) -> int:
    """Add the columns whose key is not below ``least`` to the ``found`` features; how many there are then.

    Every entry is written and the next one overwrites it unless it is kept, so that no branch is guessed.
    """
    n, reach = len(maxima), 0
    for g in range(n):
        groups[reach] = g
        reach += maxima[g] >= least
    for i in range(reach):
        for f in range(groups[i], len(row), n):
            feature[found] = f
            found += row[f] >= least
    return found


@compiled
def find_largest(bits: Keys, k: int, slack: Floats, maxima: Keys, at: Ints, feature: Bits) -> int:
    """Features that may be among the k of largest pre-activation in their row; how many rows were looked at.

    Puts those of row r into ``feature``, from at[r] to at[r + 1]; stops at a row for which there may be no
    room. bits [n, d_sae], of upper bounds, become keys. ``slack``: how far below its bound any pre-activation
    of a row may be. k groups of ``MEMBERS`` features or more.

    The k-th largest of the groups' maxima is reached by k keys at least, so the k-th largest pre-activation
    is not further below it than ``slack`` and what rounding adds; whatever has a smaller bound is left out.
    """
    one = np.empty(1, np.float32)
    as_bits, width, found = one.view(np.int32), bits.shape[1], 0
    groups = np.empty(len(maxima) + 1, np.int32)
    for r in range(len(bits)):
        if found + width >= len(feature):
            return r
        row = bits[r]
        to_keys(row)
        _group_maxima(row, maxima)
        reached = kth_largest(maxima, k)
        as_bits[0] = reached << 16 if reached >= 0 else (-reached << 16) ^ ~_MAGNITUDE
        least = _floor(one[0] - abs(one[0]) * _HALF_A_STEP - slack[r], one, as_bits)
        found = _members(row, maxima, least, groups, feature, found)
        at[r + 1] = found
    return len(bits)


@compiled
def compute(
    at: Ints, feature: Bits, x: Floats, weights: Floats, bias: Floats, place: Bits, exact: Floats
) -> None:
    """Pre-activations of the features that were found in each row, which are put in ascending order.

    ``place`` is room for as many entries.
    """
    n, d_sae = len(x), len(weights)
    starts = np.zeros(d_sae + 1, np.int64)
    for i in range(at[n]):
        starts[feature[i] + 1] += 1
    for f in range(d_sae):
        starts[f + 1] += starts[f]
    for r in range(n):
        for i in range(at[r], at[r + 1]):
            f = feature[i]
            place[starts[f]] = r
            starts[f] += 1
    # starts[f] is now where the next feature's begin.
    filled, i = at[:n].copy(), 0
    for f in range(d_sae):
        while i < starts[f]:
            r = place[i]
            feature[filled[r]] = f
            exact[filled[r]] = _pre_activation(x[r], weights[f], bias[f])
            filled[r] += 1
            i += 1


@compiled
def choose_largest(at: Ints, feature: Bits, exact: Floats, index: Ints, value: Floats) -> None:
    """The k largest of each row, by feature, into ``index`` and ``value`` [n, k]; ties: the lower one."""
    n, k = index.shape
    most = 0
    for r in range(n):
        most = max(most, at[r + 1] - at[r])
    ordered, slot = np.empty(most + _LANES, np.int32), np.empty(most + _LANES, np.int64)
    bits, chosen = exact.view(np.int32), np.empty(k, np.int64)
    for r in range(n):
        found = at[r + 1] - at[r]
        for j in range(found):
            ordered[j], slot[j] = _ordered(bits[at[r] + j]), at[r] + j
        # Whole lanes leave no rest that would be counted one by one; what fills them loses every tie.
        whole = -(-found // _LANES) * _LANES
        ordered[found:whole] = -_MAGNITUDE
        keep(ordered[:whole], slot, k, chosen)
        for j in range(k):
            index[r, j], value[r, j] = feature[chosen[j]], exact[chosen[j]]


@compiled
def find_reaching(bits: Keys, least: Keys, at: Ints, feature: Bits) -> int:
    """Features whose key is not below their own ``least``; as ``find_largest``."""
    width, found = bits.shape[1], 0
    for r in range(len(bits)):
        if found + width >= len(feature):
            return r
        row = bits[r]
        to_keys(row)
        for start in range(0, width, MEMBERS):
            stop, some = min(start + MEMBERS, width), False
            for f in range(start, stop):
                some |= row[f] >= least[f]
            if some:
                for f in range(start, stop):
                    feature[found] = f
                    found += row[f] >= least[f]
        at[r + 1] = found
    return len(bits)


@compiled
def leave_out(keys: Keys, row: Ints, feature: Ints) -> None:
    """Mark where a feature fires."""
    for i in range(len(row)):
        keys[row[i], feature[i]] = FIRED


@compiled
def _nearest(
    keys: Keys, best: int, x: Floats, weights: Floats, bias: float, least: int, one: Floats, bits: Bits
) -> int:
    """Where a feature's largest pre-activation of a block first is; ``one`` has it afterwards.

    ``best`` is the largest key: what has it is computed first, and leaves few others to compute.
    """
    place = 0
    while keys[place] != best:
        place += 1
    first, largest = place, _pre_activation(x[place], weights, bias)
    least = max(least, _floor(float(largest), one, bits))
    for at in range(len(keys)):
        if keys[at] >= least and at != first:
            exact = _pre_activation(x[at], weights, bias)
            if exact > largest or (exact == largest and at < place):
                place, largest = at, exact
    one[0] = largest
    return place


@compiled
def add_blocks(
    keys: Keys,
    x: Floats,
    weights: Floats,
    bias: Floats,
    first_token: int,
    context: int,
    kept: Floats,
    token: Ints,
) -> None:
    """Put the largest pre-activation of each block that did not fire into its feature's list.

    keys [blocks, places, d_sae], x [blocks, places, d_in]; lists as in ``atlas.kernels.misses.add_blocks``.
    """
    d_sae, n = kept.shape
    one, best = np.empty(1, np.float32), np.empty(d_sae, np.int16)
    bits, least = one.view(np.int32), floors(kept[:, n - 1].copy())
    for b in range(len(keys)):
        best[:] = keys[b, 0]
        for at in range(1, keys.shape[1]):
            row = keys[b, at]
            for f in range(d_sae):
                best[f] = max(best[f], row[f])
        for f in range(d_sae):
            if best[f] >= least[f]:
                place = _nearest(keys[b, :, f], best[f], x[b], weights[f], bias[f], least[f], one, bits)
                put(kept[f], token[f], one[0], first_token + b * context + place)
                least[f] = _floor(float(kept[f, n - 1]), one, bits)
