"""Pairs of features that fire on the same tokens: on how many, and what their activations multiply to."""

import numpy as np
import numpy.typing as npt

from atlas.kernels.compiled import compiled

Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


@compiled
def best_partners(
    starts: Ints,
    number: Numbers,
    token_starts: Ints,
    on_token: Numbers,
    least: int,
    other: Ints,
    n_both: Ints,
    jaccard: Floats,
    counts: Ints,
) -> None:
    """Fill each feature's partners [d_sae, n] by Jaccard index, then n_both, then the lower number.

    ``number`` says on which token each activation is, feature by feature (``starts``); ``on_token`` which
    features each token has (``token_starts``). Partners met on fewer than ``least`` tokens do not count;
    ``counts`` [d_sae] says how many are kept.
    """
    d_sae, n = other.shape
    met, both = np.empty(d_sae + 1, np.int64), np.zeros(d_sae, np.int64)
    for f in range(d_sae):
        alone, n_met, kept = starts[f + 1] - starts[f], 0, 0
        for i in range(starts[f], starts[f + 1]):
            for j in range(token_starts[number[i]], token_starts[number[i] + 1]):
                g = on_token[j]
                met[n_met] = g
                n_met += both[g] == 0
                both[g] += 1
        for g in met[:n_met]:
            together, both[g] = both[g], 0
            if g != f and together >= least:
                # Quotients of different fractions of integers below 2**26 differ in float64.
                index = together / (alone + starts[g + 1] - starts[g] - together)
                slot = kept
                while slot > 0 and (
                    index > jaccard[f, slot - 1]
                    or (index == jaccard[f, slot - 1] and together > n_both[f, slot - 1])
                    or (
                        index == jaccard[f, slot - 1]
                        and together == n_both[f, slot - 1]
                        and g < other[f, slot - 1]
                    )
                ):
                    slot -= 1
                if slot < n:
                    for later in range(min(kept, n - 1), slot, -1):
                        other[f, later], n_both[f, later] = other[f, later - 1], n_both[f, later - 1]
                        jaccard[f, later] = jaccard[f, later - 1]
                    other[f, slot], n_both[f, slot], jaccard[f, slot] = g, together, index
                    kept = min(kept + 1, n)
        counts[f] = kept


@compiled
def add_products(
    starts: Ints, number: Numbers, value: Floats, large: Ints, small: Ints, spread: Floats, out: Floats
) -> None:
    """Fill ``out`` with sums over tokens of the products of pairs' activations, sorted by ``large``.

    ``spread`` [n_tokens] is zero before and after: the activations of ``large`` are laid out in it, and
    those of ``small`` look them up.
    """
    for i in range(len(large)):
        f, g = large[i], small[i]
        if i == 0 or large[i - 1] != f:
            for j in range(starts[f], starts[f + 1]):
                spread[number[j]] = value[j]
        total = 0.0
        for j in range(starts[g], starts[g + 1]):
            total += spread[number[j]] * value[j]
        out[i] = total
        if i + 1 == len(large) or large[i + 1] != f:
            for j in range(starts[f], starts[f + 1]):
                spread[number[j]] = 0.0
