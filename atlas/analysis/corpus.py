"""Summaries of features' activations over the text: one function per table, arrays in, columns out.

Every function reads the canonical order of ``FeatureActs`` and sums in float64, so its rows are exact,
reproducible, and those of the whole text however it was cut. Columns are named as in ``atlas.tables``,
without ``sae``; ``feature`` counts from the first feature of the range that was given.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from atlas.analysis.acts import FeatureActs, Floats, Ints, first_of_runs, sorted_within
from atlas.analysis.text import Text
from atlas.kernels.features import count_positions, strongest_labels

N_BINS, N_LOG_BINS, N_TOP, N_STRONG, N_TOKENS = 50, 30, 2000, 200, 50
DECILES = np.linspace(0, 1, 11)
Columns = dict[str, Any]


def _sums(values: npt.NDArray, starts: Ints) -> npt.NDArray[np.float64]:
    """Float64 sums of the runs that begin at ``starts``."""
    if len(starts) == 0:
        return np.empty(0)
    return np.add.reduceat(values.astype(np.float64), starts)


def _lists(lengths: Ints, values: npt.NDArray, kind: pa.DataType) -> pa.ListArray:
    """Lists of some lengths, one after the other."""
    edges = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(edges, pa.int32()), pa.array(values).cast(kind))


def feature_statistics(acts: FeatureActs, text: Text) -> Columns:
    """How often and how strongly does each feature fire? (n_active, density, max, mean, deciles)."""
    counts, alive = acts.counts, acts.counts > 0
    ordered = acts.value[acts.strongest_first].astype(np.float64)
    total = np.zeros(acts.d_sae)
    total[alive] = _sums(acts.value, acts.starts[:-1][alive])
    largest = np.zeros(acts.d_sae)
    largest[alive] = ordered[acts.starts[:-1][alive]]
    mean = pa.array(total / np.maximum(counts, 1), mask=~alive).cast(pa.float32())
    quantiles = [q.tolist() if a else None for q, a in zip(_deciles(acts, ordered), alive, strict=True)]
    return {
        "feature": np.arange(acts.d_sae),
        "n_active": counts,
        "density": counts / text.n_tokens,
        "max_activation": largest,
        "mean_activation": mean,
        "quantiles": pa.array(quantiles, pa.list_(pa.float32())),
        "alive": alive,
    }


def _deciles(acts: FeatureActs, ordered: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Linearly interpolated deciles [d_sae, 11] of the active values; rows of dead features are junk."""
    if len(ordered) == 0:
        return np.zeros((acts.d_sae, len(DECILES)))
    last = np.maximum(acts.counts - 1, 0)[:, None]
    place = (1 - DECILES) * last
    low, share = np.floor(place).astype(np.int64), place % 1
    at = np.minimum(acts.starts[:-1, None] + low, len(ordered) - 1)
    after = np.minimum(acts.starts[:-1, None] + np.minimum(low + 1, last), len(ordered) - 1)
    return ordered[at] * (1 - share) + ordered[after] * share


def activation_counts(acts: FeatureActs) -> Columns:
    """How are the activations spread?

    ``linear``: 50 equal bins on [0, max]; ``log``: 30 bins of equal ratio on [min, max]. A bin holds its
    lower edge and not its upper one, both as stored (float32); the last bin holds both.
    """
    alive = np.flatnonzero(acts.counts)
    ordered = acts.value[acts.strongest_first]
    top, least = (ordered[at].astype(np.float64) for at in (acts.starts[alive], acts.starts[alive + 1] - 1))
    steps = np.arange(N_LOG_BINS + 1) / N_LOG_BINS
    linear = top[:, None] * np.arange(N_BINS + 1) / N_BINS
    log = least[:, None] * (top / least)[:, None] ** steps
    log[:, 0], log[:, -1] = least, top
    edges = {"linear": linear.astype(np.float32), "log": log.astype(np.float32)}
    # One after the other for each feature, as the table is sorted.
    n = np.concatenate([_in_bins(acts, ordered, alive, e) for e in edges.values()], 1)
    low, high = (np.stack([e[:, cut] for e in edges.values()], 1) for cut in (0, -1))
    sizes = np.tile([N_BINS, N_LOG_BINS], len(alive))
    return {
        "feature": np.repeat(alive, len(edges)),
        "scale": np.tile(list(edges), len(alive)),
        "low": low.ravel(),
        "high": high.ravel(),
        "n": _lists(sizes, n.ravel(), pa.int32()),
    }


def _in_bins(acts: FeatureActs, ordered: Floats, alive: Ints, edges: Floats) -> Ints:
    """How many activations lie between neighbouring edges [alive, n_edges]; a search per edge."""
    bits = np.uint64(32)
    weakness = (acts.feature.astype(np.uint64) << bits) | (0x7FFFFFFF - ordered.view(np.uint32))
    wanted = (alive.astype(np.uint64)[:, None] << bits) | (0x7FFFFFFF - edges.view(np.uint32))
    reaching = np.searchsorted(weakness, wanted.ravel(), side="right").reshape(wanted.shape)
    reaching -= acts.starts[alive, None]
    reaching[:, -1] = 0
    reaching[:, 0] = acts.counts[alive]
    return reaching[:, :-1] - reaching[:, 1:]


def position_counts(acts: FeatureActs, n_top: Ints) -> Columns:
    """Where in the context does it fire? Counts among its 2000 strongest tokens and among all.

    ``n_top`` is what :func:`strongest_positions` gives, which :func:`position_traits` reads, too.
    """
    key = acts.feature * acts.context + acts.position
    size = acts.d_sae * acts.context
    n_active = np.bincount(key, minlength=size)
    total = np.bincount(key, weights=acts.value.astype(np.float64), minlength=size)
    found = np.flatnonzero(n_active)
    lengths = np.count_nonzero(n_active.reshape(acts.d_sae, acts.context), axis=1)
    columns = {
        "position": (found % acts.context, pa.int16()),
        "n_top": (n_top.ravel()[found], pa.int32()),
        "n_active": (n_active[found], pa.int32()),
        "sum_activation": (total[found], pa.float32()),
    }
    alive = np.flatnonzero(lengths)
    lists = {name: _lists(lengths[alive], values, kind) for name, (values, kind) in columns.items()}
    return {"feature": alive, **lists}


def strongest_positions(acts: FeatureActs) -> Ints:
    """How many of a feature's 2000 strongest tokens are at each position, [d_sae, context]."""
    n = np.zeros((acts.d_sae, acts.context), np.int64)
    count_positions(acts.starts, acts.strongest_first, acts.position, N_TOP, n)
    return n


def position_traits(acts: FeatureActs, n_top: Ints) -> Columns:
    """Does it fire at one position? The commonest, its share, and how many positions that amounts to.

    effective_positions = (sum n)^2 / sum n^2 over the positions of its 2000 strongest tokens: 1 if all are
    at one position (seed 000: the features of a previous-token head). Ties go to the smaller position.
    """
    n = n_top.astype(np.float64)
    total, silent = n.sum(1), acts.counts == 0
    best = n.argmax(1)
    with np.errstate(invalid="ignore"):
        share, effective = n.max(1) / total, total**2 / (n**2).sum(1)
    return {
        "top_position": pa.array(best, mask=silent),
        "top_position_share": share,
        "effective_positions": effective,
    }


def token_traits(acts: FeatureActs, text: Text) -> Columns:
    """Does it fire on one token, after one token, on one pair? Shares among its 200 strongest tokens.

    Seed 000's "I am X" and "I follow X" (row A16). Ties go to the smaller token id.
    """
    strong = acts.strongest_first[acts.rank < N_STRONG]
    feature = acts.feature[strong]
    at = text.token(acts.token[strong])
    before = text.token(acts.token[strong] - 1)
    token, share = _commonest(feature, at, acts.d_sae, text.d_vocab)
    previous, after = _commonest(feature, before, acts.d_sae, text.d_vocab)
    _, pair = _commonest(feature, before * text.d_vocab + at, acts.d_sae, text.d_vocab**2)
    return {
        "top_token": pa.array(token, mask=acts.counts == 0),
        "top_token_share": share,
        "top_previous_token": pa.array(previous, mask=acts.counts == 0),
        "top_previous_share": after,
        "top_pair_share": pair,
    }


def _commonest(feature: Ints, label: Ints, d_sae: int, n_labels: int) -> tuple[Ints, npt.NDArray[np.float64]]:
    """The commonest label of each feature and its share; NaN for a feature without any."""
    bits = max(n_labels - 1, 1).bit_length()
    order = sorted_within(feature, label, d_sae, bits)
    label, of = label[order], feature[order]
    starts = _first_of_pairs(of, label)
    n = np.diff(np.concatenate([starts, [len(label)]]))
    best = np.lexsort((-n, of[starts]))
    best = best[first_of_runs(of[starts][best])]
    found, share = np.zeros(d_sae, np.int64), np.full(d_sae, np.nan)
    found[of[starts][best]] = label[starts][best]
    share[of[starts][best]] = n[best] / np.bincount(feature, minlength=d_sae)[of[starts][best]]
    return found, share


def token_stats(acts: FeatureActs, text: Text) -> Columns:
    """On which tokens does it fire, and which tokens follow? Strongest 50 by summed activation, per role.

    Ranked by the sum as it is stored (float32); ties go to the smaller token id.
    precision = firings with the token / firings; recall = firings with the token / the token's
    occurrences at the places where it was looked for.
    """
    has_next = acts.position < acts.context - 1
    after = np.full(len(acts.token), -1)
    after[has_next] = text.token(acts.token[has_next] + 1)
    at = _token_rows(acts, text.token(acts.token), text.occurrences(1))
    following = _token_rows(acts, after, text.occurrences(2))
    role = np.repeat(["at", "next"], [len(at["feature"]), len(following["feature"])])
    both = {name: np.concatenate([at[name], following[name]]) for name in at}
    order = np.argsort(both["feature"] * 2 + (role == "next"), kind="stable")
    return {"role": role[order], **{name: column[order] for name, column in both.items()}}


def _token_rows(acts: FeatureActs, label: Ints, occurrences: Ints) -> Columns:
    """The strongest tokens of every feature, each activation labelled with a token, or -1 for none."""
    shape = (acts.d_sae, N_TOKENS)
    token, n = np.empty(shape, np.int64), np.empty(shape, np.int64)
    total, largest = np.empty(shape, np.float32), np.empty(shape, np.float32)
    strongest_labels(acts.starts, label, acts.value, len(occurrences), token, n, total, largest)
    feature, rank = np.nonzero(n)
    token, n = token[feature, rank], n[feature, rank]
    firings = np.bincount(acts.feature[label >= 0], minlength=acts.d_sae)
    return {
        "feature": feature,
        "rank": rank,
        "token": token,
        "n_active": n,
        "sum_activation": total[feature, rank],
        "max_activation": largest[feature, rank],
        "precision": n / firings[feature],
        "recall": n / np.maximum(occurrences[token], 1),
    }


def _first_of_pairs(one: Ints, other: Ints) -> Ints:
    """Indices at which a new pair of values begins in two arrays sorted by both."""
    if len(one) == 0:
        return np.empty(0, np.int64)
    return np.flatnonzero(np.concatenate([[True], (other[1:] != other[:-1]) | (one[1:] != one[:-1])]))
