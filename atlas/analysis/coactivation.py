"""Which features of an SAE fire together?

For every feature its 10 partners of the same SAE, ranked by the Jaccard index of the two sets of tokens:

    jaccard = n_both / (n_a + n_b - n_both)
    pearson = (n S_ab - S_a S_b) / sqrt((n S_aa - S_a^2) (n S_bb - S_b^2))
    pmi     = log(n_both n / (n_a n_b))                                        nats

n: tokens counted; n_a, n_b: tokens on which each fires; S: sums of activations and of their products over all
tokens counted. Jaccard ranks because neither features that fire everywhere nor rare ones that happened to
meet come first under it, as they do under counts and under PMI; both still stand beside it. Pairs that met
once are left out: one token says nothing of two features. Ties: the larger n_both, then the lower index.

Counts are exact. Every token holds the list of its features, and what the tokens of a feature list is
counted, one feature after the other: the work is the sum over tokens of L0 squared, and no matrix of
d_sae x d_sae is held.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from atlas.analysis.acts import FeatureActs, Ints, first_of_runs, rank_in_runs
from atlas.errors import StoreError

N_PARTNERS, LEAST_BOTH = 10, 2
_WIDTH = 32
_DIGIT = 16
Columns = dict[str, Any]


class Pairs(NamedTuple):
    """Features and their partners, and on how many tokens both fire; sorted by feature and rank."""

    feature: Ints
    other: Ints
    n_both: Ints
    jaccard: npt.NDArray[np.float64]


class TokenLists:
    """The features of every token, in tables of 32 columns; what is left over of a token is in the next one.

    Tokens are numbered from the one with most features down, so each table is as long as it has to be.

    >>> acts = FeatureActs.collect([([0, 0, 1], [1, 2, 2], [0.5, 0.5, 0.5])], d_sae=2, context=4)
    >>> lists = TokenLists(acts)
    >>> lists.number.tolist(), [t.tolist() for t in lists.tables], lists.counts(0).tolist()
    ([1, 0, 0], [[[0, 1], [0, 2]]], [2, 1])
    """

    def __init__(self, acts: FeatureActs) -> None:
        self.acts, d_sae = acts, acts.d_sae
        order = _stable_order(acts.token)
        token = acts.token[order]
        lengths = np.diff(np.append(first_of_runs(token), len(token)))
        rank = np.empty_like(lengths)
        rank[np.argsort(-lengths, kind="stable")] = np.arange(len(lengths))
        row, slot = np.repeat(rank, lengths), rank_in_runs(token)
        feature = acts.feature[order].astype(np.uint16 if d_sae < 1 << 16 else np.int32)
        self.number = np.empty_like(row)
        self.number[order] = row
        self.tables, longest = [], int(lengths.max(initial=0))
        for start in range(0, longest, _WIDTH):
            width = min(longest - start, _WIDTH)
            table = np.full((np.count_nonzero(lengths > start), width), d_sae, feature.dtype)
            here = (slot >= start) & (slot < start + width)
            table[row[here], slot[here] - start] = feature[here]
            self.tables.append(table)

    def counts(self, feature: int) -> Ints:
        """On how many tokens does this feature fire together with each feature? [d_sae]."""
        d_sae, starts = self.acts.d_sae, self.acts.starts
        total = np.zeros(d_sae, np.int64)
        tokens = self.number[starts[feature] : starts[feature + 1]]
        for i, table in enumerate(self.tables):
            tokens = tokens[tokens < len(table)] if i else tokens
            if not len(tokens):
                break
            total += np.bincount(table.take(tokens, axis=0).ravel(), minlength=d_sae + 1)[:d_sae]
        return total


def _stable_order(keys: Ints) -> Ints:
    """Indices that sort nonnegative keys stably; two bytes at a time, as that is a radix sort."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    for shift in range(_DIGIT, int(keys.max(initial=0)).bit_length(), _DIGIT):
        digit = (keys >> shift).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
    return order


def partners(acts: FeatureActs, n: int = N_PARTNERS) -> Pairs:
    """The ``n`` partners of each feature with the largest Jaccard index; fewer where fewer met twice.

    >>> token = [1, 2, 3, 1, 2, 2, 3]
    >>> acts = FeatureActs.collect([([0, 0, 0, 1, 1, 2, 2], token, np.ones(7))], d_sae=3, context=4)
    >>> found = partners(acts)
    >>> found.feature.tolist(), found.other.tolist(), found.n_both.tolist()
    ([0, 0, 1, 2], [1, 2, 0, 0], [2, 2, 2, 2])
    """
    lists, alone = TokenLists(acts), acts.counts
    often = np.flatnonzero(alone >= LEAST_BOTH)
    found = [_best(lists.counts(f), alone, f, n) for f in often.tolist()]
    nothing = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    other, n_both, jaccard = (np.concatenate(parts) for parts in zip(*found, nothing, strict=True))
    return Pairs(np.repeat(often, [len(part[0]) for part in found]), other, n_both, jaccard)


def _best(both: Ints, alone: Ints, feature: int, n: int) -> tuple[Ints, Ints, npt.NDArray[np.float64]]:
    both[feature] = 0
    other = np.flatnonzero(both >= LEAST_BOTH)
    n_both = both[other]
    # Quotients of different fractions of integers below 2**26 differ in float64, those of equal ones do not.
    jaccard = n_both / (alone[feature] + alone[other] - n_both)
    if len(other) > n:
        kept = np.flatnonzero(jaccard >= np.partition(jaccard, -n)[-n])
        other, n_both, jaccard = other[kept], n_both[kept], jaccard[kept]
    order = np.lexsort((other, -n_both, -jaccard))[:n]
    return other[order], n_both[order], jaccard[order]


def coactivation(acts: FeatureActs, n_tokens: int, n: int = N_PARTNERS) -> Columns:
    """The ``coactivation`` table of an SAE from its activations on ``n_tokens`` evaluated tokens.

    pearson is NaN where an activation does not vary.

    Raises:
        StoreError: a feature fires on more tokens than there are.

    >>> acts = FeatureActs.collect([([0, 0, 1, 1], [1, 2, 1, 2], [1.0, 2.0, 1.0, 2.0])], d_sae=2, context=5)
    >>> columns = coactivation(acts, n_tokens=4)
    >>> [columns[c].tolist() for c in ("other", "n_both", "jaccard", "pearson")]
    [[1, 0], [2, 2], [1.0, 1.0], [1.0, 1.0]]
    >>> columns["pmi"].tolist() == [np.log(2)] * 2
    True
    """
    alone = acts.counts
    if alone.max(initial=0) > n_tokens:
        raise StoreError(f"n_tokens {n_tokens} is too small; a feature fires on {alone.max()} tokens")
    pairs = partners(acts, n)
    feature, other, n_both, jaccard = pairs
    return {
        "feature": feature,
        "rank": rank_in_runs(feature),
        "other": other,
        "n_both": n_both,
        "jaccard": jaccard,
        "pearson": _pearson(acts, pairs, n_tokens),
        "pmi": np.log(n_both * float(n_tokens) / (alone[feature] * alone[other])),
        "n_tokens": n_tokens,
    }


def _pearson(acts: FeatureActs, pairs: Pairs, n_tokens: int) -> npt.NDArray[np.float64]:
    value = acts.value.astype(np.float64)
    total, square = (np.bincount(acts.feature, v, acts.d_sae).astype(np.float64) for v in (value, value**2))
    variance = n_tokens * square - total**2
    variance[variance <= 1e-12 * n_tokens * square] = np.nan
    a, b = pairs.feature, pairs.other
    covariance = n_tokens * products(acts, value, a, b) - total[a] * total[b]
    return covariance / np.sqrt(variance[a] * variance[b])


def products(
    acts: FeatureActs, value: npt.NDArray[np.float64], one: Ints, other: Ints
) -> npt.NDArray[np.float64]:
    """Sum over tokens of the product of two features' activations, for each pair; the same both ways round.

    >>> acts = FeatureActs.collect([([0, 0, 1], [1, 2, 2], [0.5, 3.0, 2.0])], d_sae=2, context=4)
    >>> products(acts, acts.value.astype(float), np.array([0, 1]), np.array([1, 0])).tolist()
    [6.0, 6.0]
    """
    alone = acts.counts
    # Of each pair the feature with more tokens is spread out, and the tokens of the other look it up.
    swap = (alone[one] < alone[other]) | ((alone[one] == alone[other]) & (one > other))
    key = np.where(swap, other, one) * acts.d_sae + np.where(swap, one, other)
    unique, place = np.unique(key, return_inverse=True)
    large, small = unique // acts.d_sae, unique % acts.d_sae
    out = np.empty(len(unique))
    spread = np.zeros(int(acts.token.max(initial=0)) + 1)
    for low, high in _runs(large):
        mine = slice(*acts.starts[large[low] : large[low] + 2])
        spread[acts.token[mine]] = value[mine]
        theirs = [slice(*acts.starts[f : f + 2]) for f in small[low:high]]
        parts = [spread[acts.token[s]] * value[s] for s in theirs]
        out[low:high] = [part.sum() for part in parts]
        spread[acts.token[mine]] = 0
    return out[place]


def _runs(keys: Ints) -> Iterator[tuple[int, int]]:
    return pairwise(np.append(first_of_runs(keys), len(keys)).tolist())
