"""The largest of each example's contributions, and where its strongest source repeats the text before it."""

import numpy as np
import numpy.typing as npt

from atlas.kernels.compiled import compiled

MOST_SOURCES, COVERED = 32, 0.95
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Room = tuple[npt.NDArray[np.int32], Ints, Ints]

_STEP, _FEW, _ENOUGH = 16, 256, 40
_NEAR = 8 << 23  # in bits of a float: what is so far below another is 256 times smaller
_MAGNITUDE = np.int32(0x7FFFFFFF)
_LOW = np.int64(0xFFFFFFFF)


@compiled
def _measure(row: Floats, bits: npt.NDArray[np.int32]) -> tuple[int, float]:
    """Fill ``bits`` with the magnitudes of a row's entries; the largest of them, and the sum of all."""
    signed, largest, total = row.view(np.int32), np.int32(0), 0.0
    for j in range(len(row)):
        bits[j] = signed[j] & _MAGNITUDE
        largest = max(largest, bits[j])
    for j in range(len(row)):  # by itself, each of the two loops runs in lanes
        total += abs(row[j])
    return int(largest), total


@compiled
def _bound(bits: npt.NDArray[np.int32], largest: int) -> int:
    """A magnitude that at least 32 entries reach, and few more; the smallest one if fewer are not zero.

    Magnitudes of floats are ordered like their bits. Between one that 32 reach and one that fewer do, the
    middle is tried, again and again; each time all entries are counted, in lanes.
    """
    low, high, middle = 1, largest + 1, max(1, largest - _NEAR)
    while high - low > 1:
        tried, reaching = np.int32(middle), np.float32(0)
        for j in range(len(bits)):
            reaching += np.float32(1) if bits[j] >= tried else np.float32(0)
        if reaching >= MOST_SOURCES:
            low = middle
            if reaching <= _ENOUGH:
                break
        else:
            high = middle
        middle = (low + high) >> 1
    return low


@compiled
def _descending(packed: Ints, n: int, order: Ints) -> int:
    """Put the largest of the first n numbers, largest first, into ``order``; how many there are.

    Counting for each number how many are larger takes no branch that a processor has to guess. What lies
    after the first n is overwritten.
    """
    kept = min(n, MOST_SOURCES)
    if n > _FEW:
        packed[:n].sort()
        for rank in range(kept):
            order[rank] = packed[n - 1 - rank]
        return kept
    whole = -(-n // _STEP) * _STEP
    packed[n:whole] = -1
    for i in range(n):
        here, larger = packed[i], 0
        for start in range(0, whole, _STEP):
            for j in range(_STEP):
                larger += packed[start + j] > here
        if larger < MOST_SOURCES:
            order[larger] = here
    return kept


@compiled
def keep_largest(dense: Floats, last: Ints, place: Ints, value: Floats, count: Ints, best: Ints) -> None:
    """Fill each row of ``place`` and ``value`` with the example's largest contributions, largest first.

    dense [n, heads, key]; place = head * key + source. Only sources up to ``last`` are read. Ties go to the
    lower place. ``count`` says how many reach 95 % of the absolute sum, zeros left out, at most 32. ``best``
    is the place of the largest positive one, -1 where there is none.
    """
    n, heads, key = dense.shape
    row, room = np.empty(heads * key, np.float32), room_to_keep(heads * key)
    for i in range(n):
        sources = last[i] + 1
        for h in range(heads):
            row[h * sources : (h + 1) * sources] = dense[i, h, :sources]
        used = row[: heads * sources]
        count[i], best[i] = keep_of_one(used, sources, key, place[i], value[i], room)


@compiled
def room_to_keep(size: int) -> Room:
    """What ``keep_of_one`` works in, for ``size`` contributions."""
    return np.empty(size, np.int32), np.empty(size + _STEP, np.int64), np.empty(MOST_SOURCES, np.int64)


@compiled
def keep_of_one(
    row: Floats, sources: int, key: int, place: Ints, value: Floats, room: Room
) -> tuple[int, int]:
    """``keep_largest`` of one example, ``sources`` entries of each head after the other's: count and best."""
    packed, order = room[1:]
    bits = room[0][: len(row)]
    largest, total = _measure(row, bits)
    bound, found = _bound(bits, largest), 0
    for j in range(len(bits)):
        packed[found] = (np.int64(bits[j]) << 32) | (_LOW - j)
        found += bits[j] >= bound
    kept = _descending(packed, found, order)
    covered, count, best = 0.0, 0, -1
    for rank in range(kept):
        at = _LOW - (order[rank] & _LOW)
        head = np.int64(np.uint32(at) // np.uint32(sources))  # a division of 64 bits takes longer
        place[rank], value[rank] = head * key + at - head * sources, row[at]
        count += covered < COVERED * total
        covered += abs(row[at])
        if row[at] > 0 and best < 0:
            best = place[rank]
    place[kept:], value[kept:] = 0, 0.0
    if best < 0:  # whatever is kept is negative
        best = _largest_positive(row, sources, key)
    return count, best


@compiled
def _largest_positive(row: Floats, sources: int, key: int) -> int:
    """The place of the largest positive entry, the first of equals; -1 if there is none."""
    best, place = np.float32(0.0), -1
    for j in range(len(row)):
        if row[j] > best:
            best, place = row[j], j // sources * key + j % sources
    return place


@compiled
def write_down(
    place: Ints,
    value: Floats,
    count: Ints,
    unit: Floats,
    heads: Ints,
    key: int,
    out: npt.NDArray[np.int16],
) -> None:
    """Write what is kept of each example, one after the other, as head, source and weight [kept, 3].

    A weight is how many times the example's ``unit`` (1 where that is 0), to whole ones.
    """
    at = 0
    for i in range(len(place)):
        step = unit[i] if unit[i] > 0 else np.float32(1)
        for rank in range(count[i]):
            head = np.int64(np.uint32(place[i, rank]) // np.uint32(key))
            out[at, 0], out[at, 1] = heads[head], place[i, rank] - head * key
            out[at, 2] = np.rint(value[i, rank] / step)
            at += 1


@compiled
def count_matched(tokens: npt.NDArray, position: Ints, source: Ints, out: Ints) -> None:
    """How many tokens before each source repeat those up to each position; tokens [n, pos]."""
    for i in range(len(position)):
        p, s, n = position[i], source[i], 0
        if 2 <= s < p:
            while s - 1 - n >= 1 and tokens[i, s - 1 - n] == tokens[i, p - n]:
                n += 1
        out[i] = n


@compiled
def gather_runs(
    values: npt.NDArray[np.int16], starts: Ints, counts: Ints, out: npt.NDArray[np.int16]
) -> None:
    """Write runs of values one after the other: ``counts[i]`` of them from ``starts[i]`` on."""
    at = 0
    for i in range(len(starts)):
        for j in range(counts[i]):
            out[at + j] = values[starts[i] + j]
        at += counts[i]


@compiled
def strongest_tokens(
    starts: Ints,
    first: Ints,
    counts: Ints,
    unit: npt.NDArray[np.float64],
    tokens: Ints,
    sources: npt.NDArray[np.int16],
    d_vocab: int,
    found: Ints,
    n: Ints,
    share: npt.NDArray[np.float64],
) -> None:
    """Fill in each feature's tokens [features, k] with the largest sums of positive contributions.

    Examples ``starts[f]`` to ``starts[f + 1]`` are a feature's; ``sources`` [n, 3] (head, source, weight)
    hold ``counts`` of each from ``first`` on, in steps of ``unit``; ``tokens`` [examples, context] is their
    text. The largest sum comes first. ``n`` counts the examples in which a token is a source (0: the row ends
    before), ``share`` is of the feature's whole sum. Ties go to the smaller token.
    """
    k = found.shape[1]
    total, examples = np.zeros(d_vocab, np.float64), np.zeros(d_vocab, np.int64)
    last, seen = np.full(d_vocab, -1), np.empty(d_vocab, np.int64)
    for f in range(len(found)):
        n_seen, whole = 0, 0.0
        for e in range(starts[f], starts[f + 1]):
            for j in range(first[e], first[e] + counts[e]):
                if sources[j, 2] > 0:
                    token, value = tokens[e, sources[j, 1]], sources[j, 2] * unit[e]
                    if examples[token] == 0:
                        seen[n_seen] = token
                        n_seen += 1
                    examples[token] += last[token] != e
                    last[token] = e
                    total[token] += value
                    whole += value
        kept = 0
        for token in seen[:n_seen]:
            slot = kept
            while slot > 0 and (
                total[token] > total[found[f, slot - 1]]
                or (total[token] == total[found[f, slot - 1]] and token < found[f, slot - 1])
            ):
                slot -= 1
            if slot < k:
                for later in range(min(kept, k - 1), slot, -1):
                    found[f, later] = found[f, later - 1]
                found[f, slot] = token
                kept = min(kept + 1, k)
        for rank in range(k):
            n[f, rank] = examples[found[f, rank]] if rank < kept else 0
            share[f, rank] = total[found[f, rank]] / whole if rank < kept else 0.0
        for token in seen[:n_seen]:
            total[token], examples[token], last[token] = 0.0, 0, -1
