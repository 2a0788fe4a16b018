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

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from atlas.analysis.acts import FeatureActs, Ints, first_of_runs, rank_in_runs
from atlas.errors import StoreError
from atlas.kernels.pairs import add_products, best_partners

N_PARTNERS, LEAST_BOTH = 10, 2
_DIGIT = 16
Columns = dict[str, Any]


class Pairs(NamedTuple):
    """Features and their partners, and on how many tokens both fire; sorted by feature and rank."""

    feature: Ints
    other: Ints
    n_both: Ints
    jaccard: npt.NDArray[np.float64]


class Tokens(NamedTuple):
    """The tokens on which any feature fires, numbered in their order, and the features of each."""

    number: npt.NDArray[np.int32]
    """The token of each activation, feature by feature."""
    starts: Ints
    feature: npt.NDArray[np.int32]
    """``feature[starts[t]:starts[t + 1]]`` fire on token t."""


def by_token(acts: FeatureActs) -> Tokens:
    """The same activations by token.

    >>> acts = FeatureActs.collect([([0, 0, 1], [1, 2, 2], [0.5, 0.5, 0.5])], d_sae=2, context=4)
    >>> [column.tolist() for column in by_token(acts)]
    [[0, 1, 1], [0, 1, 3], [0, 0, 1]]
    """
    order = _stable_order(acts.token)
    token = acts.token[order]
    starts = np.append(first_of_runs(token), len(token))
    number = np.empty(len(token), np.int32)
    number[order] = np.repeat(np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts))
    return Tokens(number, starts, acts.feature[order].astype(np.int32))


def _stable_order(keys: Ints) -> Ints:
    """Indices that sort nonnegative keys stably; two bytes at a time, as that is a radix sort."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    for shift in range(_DIGIT, int(keys.max(initial=0)).bit_length(), _DIGIT):
        digit = (keys >> shift).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
    return order


def partners(acts: FeatureActs, tokens: Tokens, n: int = N_PARTNERS) -> Pairs:
    """The ``n`` partners of each feature with the largest Jaccard index; fewer where fewer met twice.

    >>> token = [1, 2, 3, 1, 2, 2, 3]
    >>> acts = FeatureActs.collect([([0, 0, 0, 1, 1, 2, 2], token, np.ones(7))], d_sae=3, context=4)
    >>> found = partners(acts, by_token(acts))
    >>> found.feature.tolist(), found.other.tolist(), found.n_both.tolist()
    ([0, 0, 1, 2], [1, 2, 0, 0], [2, 2, 2, 2])
    """
    other, n_both = np.empty((acts.d_sae, n), np.int64), np.empty((acts.d_sae, n), np.int64)
    jaccard, counts = np.empty((acts.d_sae, n)), np.empty(acts.d_sae, np.int64)
    best_partners(acts.starts, *tokens, LEAST_BOTH, other, n_both, jaccard, counts)
    kept = np.arange(n) < counts[:, None]
    return Pairs(np.nonzero(kept)[0], other[kept], n_both[kept], jaccard[kept])


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
    tokens = by_token(acts)
    pairs = partners(acts, tokens, n)
    feature, other, n_both, jaccard = pairs
    return {
        "feature": feature,
        "rank": rank_in_runs(feature),
        "other": other,
        "n_both": n_both,
        "jaccard": jaccard,
        "pearson": _pearson(acts, tokens, pairs, n_tokens),
        "pmi": np.log(n_both * float(n_tokens) / (alone[feature] * alone[other])),
        "n_tokens": n_tokens,
    }


def _pearson(acts: FeatureActs, tokens: Tokens, pairs: Pairs, n_tokens: int) -> npt.NDArray[np.float64]:
    value = acts.value.astype(np.float64)
    total, square = (np.bincount(acts.feature, v, acts.d_sae).astype(np.float64) for v in (value, value**2))
    variance = n_tokens * square - total**2
    variance[variance <= 1e-12 * n_tokens * square] = np.nan
    a, b = pairs.feature, pairs.other
    covariance = n_tokens * products(acts, tokens, a, b) - total[a] * total[b]
    return covariance / np.sqrt(variance[a] * variance[b])


def products(acts: FeatureActs, tokens: Tokens, one: Ints, other: Ints) -> npt.NDArray[np.float64]:
    """Sum over tokens of the product of two features' activations, for each pair; the same both ways round.

    >>> acts = FeatureActs.collect([([0, 0, 1], [1, 2, 2], [0.5, 3.0, 2.0])], d_sae=2, context=4)
    >>> products(acts, by_token(acts), np.array([0, 1]), np.array([1, 0])).tolist()
    [6.0, 6.0]
    """
    alone = acts.counts
    # Of each pair the feature with more tokens is spread out, and the tokens of the other look it up.
    swap = (alone[one] < alone[other]) | ((alone[one] == alone[other]) & (one > other))
    key = np.where(swap, other, one) * acts.d_sae + np.where(swap, one, other)
    unique, place = np.unique(key, return_inverse=True)
    large, small = np.divmod(unique, max(acts.d_sae, 1))
    out, spread = np.empty(len(unique)), np.zeros(len(tokens.starts))
    add_products(acts.starts, tokens.number, acts.value.astype(np.float64), large, small, spread, out)
    return out[place]
