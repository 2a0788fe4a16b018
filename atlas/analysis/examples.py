"""Which tokens of the text stand for a feature: its strongest, a draw from each tenth, any, and near misses.

Tokens are references (block, position) into the text. Ties and draws follow rules that do not depend on
shards or their order: ties go to the smaller (block, position), draws keep the smallest of a seeded hash of
(feature, token).
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from atlas.analysis.acts import FeatureActs, Floats, Ints, first_of_runs, rank_in_runs, sorted_within
from atlas.kernels.draws import draw, mixed_all

TOP_EXAMPLES, N_GROUPS, PER_GROUP, N_RANDOM, N_NEGATIVE = 20, 10, 5, 5, 5
GROUPS = np.array(["negative", *(f"q{g}" for g in range(N_GROUPS)), "random", "top"])
"""Groups of examples, in the order of their names, by which tables are sorted."""
NEGATIVE, RANDOM, TOP = 0, N_GROUPS + 1, N_GROUPS + 2
Columns = dict[str, Any]


class Misses(NamedTuple):
    """Near misses, sorted by feature and then from the largest pre-activation: where and how large."""

    feature: Ints
    token: Ints
    pre_activation: Floats


def top_examples(acts: FeatureActs) -> Ints:
    """Indices of the 20 largest activations of each feature, at most one per block, strongest first."""
    kept: list[Ints] = []
    features, width = np.arange(acts.d_sae), 4 * TOP_EXAMPLES
    while len(features):
        found, enough = _strongest_blocks(acts, features, width)
        kept.append(found)
        features, width = features[~enough], 8 * width
    chosen = np.concatenate([*kept, np.empty(0, np.int64)])
    return chosen[np.argsort(acts.feature[chosen], kind="stable")]


def _strongest_blocks(acts: FeatureActs, features: Ints, width: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Top examples among the ``width`` strongest activations of features, and for which that is enough."""
    counts = np.minimum(acts.counts[features], width)
    of = np.repeat(np.arange(len(features)), counts)
    place = np.arange(len(of)) - np.repeat(counts.cumsum() - counts, counts)
    at = acts.strongest_first[acts.starts[features][of] + place]
    block = acts.block[at]
    bits = int(block.max(initial=1)).bit_length()
    order = sorted_within(of, block, len(features), bits)
    first = np.sort(order[first_of_runs((of << bits | block)[order])])
    of_first = of[first]
    found = np.bincount(of_first, minlength=len(features))
    enough = (found >= TOP_EXAMPLES) | (acts.counts[features] <= width)
    chosen = (rank_in_runs(of_first) < TOP_EXAMPLES) & enough[of_first]
    return at[first[chosen]], enough


def drawn_examples(acts: FeatureActs, seed: int) -> tuple[Ints, Ints]:
    """Indices and group codes of the examples drawn from each tenth of the active tokens, and from all.

    A token's tenth is floor(10 * (its rank from the bottom) / n). Five of each tenth are drawn, and five of
    all. Strongest first within a group.
    """
    salt = mixed_all(np.array([seed], np.uint64))[0]
    of_feature = mixed_all((np.arange(acts.d_sae) + acts.first).astype(np.uint64) ^ salt)
    by_tenth = np.empty((acts.d_sae, N_GROUPS, PER_GROUP), np.int64)
    of_all = np.empty((acts.d_sae, N_RANDOM), np.int64)
    counts = np.empty((acts.d_sae, N_GROUPS + 1), np.int64)
    draw(acts.starts, acts.strongest_first, acts.token, of_feature, by_tenth, of_all, counts)
    drawn = np.arange(PER_GROUP) < counts[:, :N_GROUPS, None]
    place = np.concatenate([by_tenth[drawn], of_all[np.arange(N_RANDOM) < counts[:, N_GROUPS:]]])
    code = np.concatenate([np.nonzero(drawn)[1] + 1, np.full(len(place) - drawn.sum(), RANDOM)])
    return acts.strongest_first[place], code


def examples(acts: FeatureActs, misses: Misses, seed: int) -> Columns:
    """The kept examples of every feature, with the feature's activations over the whole block."""
    top = top_examples(acts)
    drawn, drawn_code = drawn_examples(acts, seed)
    fires = np.concatenate([top, drawn])
    feature = np.concatenate([misses.feature, acts.feature[fires]])
    token = np.concatenate([misses.token, acts.token[fires]])
    code = np.concatenate([np.full(len(misses.feature), NEGATIVE), np.full(len(top), TOP), drawn_code])
    order = np.argsort(feature * len(GROUPS) + code, kind="stable")
    value = np.concatenate([np.zeros(len(misses.feature), np.float32), acts.value[fires]])
    pre = np.concatenate([misses.pre_activation, np.full(len(fires), np.nan, np.float32)])
    feature, token, code = feature[order], token[order], code[order]
    shown_positions, shown_values = _whole_block(acts, feature, token // acts.context)
    return {
        "feature": feature,
        "example_group": GROUPS[code],
        "rank": rank_in_runs(feature * len(GROUPS) + code),
        "block": token // acts.context,
        "position": token % acts.context,
        "activation": value[order],
        "near_miss": pre[order],
        "active_positions": shown_positions,
        "active_values": shown_values,
    }


def _whole_block(acts: FeatureActs, feature: Ints, block: Ints) -> tuple[pa.Array, pa.Array]:
    """For each example, the positions and values of its feature's activations in the same block."""
    span = max(int(acts.block.max(initial=0)), int(block.max(initial=0))) + 1
    key, wanted = acts.feature * span + acts.block, feature * span + block
    low, high = np.searchsorted(key, wanted, "left"), np.searchsorted(key, wanted, "right")
    offsets = np.concatenate([[0], np.cumsum(high - low)])
    inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - low, high - low)
    places = pa.array(acts.position[inside].astype(np.int16))
    offset_array = pa.array(offsets.astype(np.int32))
    values = pa.array(acts.value[inside])
    return pa.ListArray.from_arrays(offset_array, places), pa.ListArray.from_arrays(offset_array, values)
