"""Summaries of a feature's activations over the text: one function per table, arrays in, columns out.

Every function reads the canonical order of ``FeatureActs`` and sums in float64, so its rows are exact
and reproducible. Columns are named as in ``atlas.tables``, without ``sae``.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from atlas.analysis.acts import FeatureActs, Ints, first_of_runs, rank_in_runs

N_BINS, N_TOP, N_TOKENS, TOP_EXAMPLES = 50, 2000, 50, 20
N_GROUPS, PER_GROUP = 10, 5
GROUPS = np.array([*(f"q{g}" for g in range(N_GROUPS)), "top"])
DECILES = np.linspace(0, 1, 11)
Columns = dict[str, Any]


class Text(NamedTuple):
    """The summarised text: its token ids [blocks, context] and the size of the vocabulary."""

    tokens: npt.NDArray[np.int64]
    d_vocab: int

    @property
    def n_tokens(self) -> int:
        """Evaluated tokens: all but position 0."""
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)


def _sums(values: npt.NDArray, starts: Ints) -> npt.NDArray[np.float64]:
    """Float64 sums of the runs that begin at ``starts``."""
    if len(starts) == 0:
        return np.empty(0)
    return np.add.reduceat(values.astype(np.float64), starts)


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


def activation_histogram(acts: FeatureActs) -> Columns:
    """How are the activations spread? 50 equal bins on [0, max], the last one closed."""
    alive = np.flatnonzero(acts.counts)
    top = np.zeros(acts.d_sae, np.float32)
    top[alive] = np.maximum.reduceat(acts.value, acts.starts[alive]) if len(alive) else 0
    scaled = acts.value.astype(np.float64) * N_BINS / top[acts.feature].astype(np.float64)
    bins = np.minimum(scaled.astype(np.int64), N_BINS - 1)
    n = np.bincount(acts.feature * N_BINS + bins, minlength=acts.d_sae * N_BINS).reshape(-1, N_BINS)[alive]
    edges = top[alive, None].astype(np.float64) * np.arange(N_BINS + 1) / N_BINS
    return {
        "feature": np.repeat(alive, N_BINS),
        "bin": np.tile(np.arange(N_BINS), len(alive)),
        "low": edges[:, :-1].ravel(),
        "high": edges[:, 1:].ravel(),
        "n": n.ravel(),
    }


def positions(acts: FeatureActs) -> Columns:
    """Where in the context does it fire? Counts among its 2000 strongest tokens and among all."""
    key = acts.feature * acts.context + acts.position
    size = acts.d_sae * acts.context
    n_active = np.bincount(key, minlength=size)
    total = np.bincount(key, weights=acts.value.astype(np.float64), minlength=size)
    top = acts.strongest_first[acts.rank < N_TOP]
    n_top = np.bincount(key[top], minlength=size)
    rows = np.flatnonzero(n_active)
    return {
        "feature": rows // acts.context,
        "position": rows % acts.context,
        "n_top": n_top[rows],
        "n_active": n_active[rows],
        "sum_activation": total[rows],
    }


def token_stats(acts: FeatureActs, text: Text) -> Columns:
    """On which tokens does it fire, and which tokens follow? Strongest 50 by summed activation, per role.

    precision = firings with the token / firings; recall = firings with the token / the token's
    occurrences at the places where it was looked for.
    """
    flat = text.tokens.reshape(-1)
    has_next = acts.position < acts.context - 1
    everywhere = np.bincount(text.tokens[:, 1:].ravel(), minlength=text.d_vocab)
    as_next = np.bincount(text.tokens[:, 2:].ravel(), minlength=text.d_vocab)
    at = _token_rows(acts.feature, flat[acts.token], acts.value, everywhere, acts.d_sae)
    after = flat[acts.token[has_next] + 1]
    following = _token_rows(acts.feature[has_next], after, acts.value[has_next], as_next, acts.d_sae)
    role = np.repeat(["at", "next"], [len(at["feature"]), len(following["feature"])])
    both = {name: np.concatenate([at[name], following[name]]) for name in at}
    order = np.lexsort((both["rank"], role, both["feature"]))
    return {"role": role[order], **{name: column[order] for name, column in both.items()}}


def _token_rows(feature: Ints, token: Ints, value: npt.NDArray, occurrences: Ints, d_sae: int) -> Columns:
    d_vocab = len(occurrences)
    key = feature * d_vocab + token
    order = np.argsort(key, kind="stable")
    starts = first_of_runs(key[order])
    pair = key[order][starts]
    ordered = value[order]
    total = _sums(ordered, starts)
    largest = np.maximum.reduceat(ordered, starts) if len(starts) else ordered
    n = np.diff(np.concatenate([starts, [len(order)]]))
    firings = np.bincount(feature, minlength=d_sae)
    best = np.lexsort((pair % d_vocab, -total, pair // d_vocab))
    best = best[rank_in_runs(pair[best] // d_vocab) < N_TOKENS]
    of, token_id = pair[best] // d_vocab, pair[best] % d_vocab
    return {
        "feature": of,
        "rank": rank_in_runs(of),
        "token": token_id,
        "n_active": n[best],
        "sum_activation": total[best],
        "max_activation": largest[best],
        "precision": n[best] / firings[of],
        "recall": n[best] / np.maximum(occurrences[token_id], 1),
    }


def top_examples(acts: FeatureActs) -> Ints:
    """Indices of the 20 largest activations of each feature, at most one per block, strongest first.

    Ties go to the smaller (block, position).
    """
    key = acts.feature * (int(acts.block.max(initial=0)) + 1) + acts.block
    starts = first_of_runs(key)
    if len(starts) == 0:
        return starts
    best = np.repeat(np.maximum.reduceat(acts.value, starts), np.diff(np.concatenate([starts, [len(key)]])))
    at_best = np.flatnonzero(acts.value == best)
    first = at_best[first_of_runs(key[at_best])]
    bits = acts.value[first].view(np.uint32).astype(np.uint64)
    order = np.argsort(
        (acts.feature[first].astype(np.uint64) << np.uint64(32)) | (np.uint64(0xFFFFFFFF) - bits),
        kind="stable",
    )
    chosen = first[order]
    return chosen[rank_in_runs(acts.feature[chosen]) < TOP_EXAMPLES]


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: a fixed, well-spread function of 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def quantile_examples(acts: FeatureActs, seed: int) -> tuple[Ints, Ints]:
    """Indices and group (0 weakest to 9 strongest) of 5 examples drawn from each tenth of the active tokens.

    A token's group is floor(10 * (its rank from the bottom) / n). The draw keeps the 5 smallest of a
    seeded hash of (feature, token), a rule that does not depend on shards or their order.
    """
    index = acts.strongest_first
    feature, n = acts.feature[index], acts.counts[acts.feature[index]]
    group = (n - 1 - acts.rank) * N_GROUPS // np.maximum(n, 1)
    salt = _mix(np.array([seed], np.uint64))[0]
    mixed = _mix(_mix(feature.astype(np.uint64) ^ salt) + acts.token[index].astype(np.uint64))
    cell = (feature * N_GROUPS + group).astype(np.uint64)
    order = np.argsort((cell << np.uint64(36)) | (mixed >> np.uint64(28)), kind="stable")
    chosen = order[rank_in_runs(cell[order]) < PER_GROUP]
    chosen = np.sort(chosen)
    final = chosen[np.argsort(cell[chosen], kind="stable")]
    return index[final], group[final]


def examples(acts: FeatureActs, seed: int) -> Columns:
    """The kept examples of every feature with the feature's activations over the whole block."""
    top = top_examples(acts)
    drawn, group = quantile_examples(acts, seed)
    at = np.concatenate([top, drawn])
    code = np.concatenate([np.full(len(top), N_GROUPS), group])
    order = np.lexsort((np.arange(len(at)), code, acts.feature[at]))
    at, code = at[order], code[order]
    shown_positions, shown_values = _whole_block(acts, at)
    return {
        "feature": acts.feature[at],
        "example_group": GROUPS[code],
        "rank": rank_in_runs(acts.feature[at] * (N_GROUPS + 1) + code),
        "block": acts.block[at],
        "position": acts.position[at],
        "activation": acts.value[at],
        "active_positions": shown_positions,
        "active_values": shown_values,
    }


def _whole_block(acts: FeatureActs, at: Ints) -> tuple[pa.Array, pa.Array]:
    """For each example, the positions and values of its feature's activations in the same block."""
    key = acts.feature * (int(acts.block.max(initial=0)) + 1) + acts.block
    low, high = np.searchsorted(key, key[at], "left"), np.searchsorted(key, key[at], "right")
    offsets = np.concatenate([[0], np.cumsum(high - low)])
    inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - low, high - low)
    places = pa.array(acts.position[inside].astype(np.int16))
    offset_array = pa.array(offsets.astype(np.int32))
    values = pa.array(acts.value[inside])
    return pa.ListArray.from_arrays(offset_array, places), pa.ListArray.from_arrays(offset_array, values)
