"""The kept examples of a feature as activations of SAEDashboard's format."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from atlas.interop.dashboards.rows import Runs, one_short, short

Blocks = dict[int, tuple[list[int], str]]
"""Token ids and document of each block."""


class Example(NamedTuple):
    """A kept example: which one it is in the release, and what the format says of it."""

    group: str
    rank: int
    block: int
    position: int
    source: str
    activation: dict[str, Any]


def examples_of(
    examples: Runs, dfa: Runs, blocks: Blocks, feature: int, row: dict[str, Any], words: list[str]
) -> list[Example]:
    """The kept examples of a feature in the order of their rows; ``row`` is the feature's own."""
    kept = examples.columns(feature)
    context = max((len(blocks[block][0]) for block in kept["block"]), default=0)
    by_source = _by_source(dfa, feature, context)
    bins = {group: _bin(group, row) for group in dict.fromkeys(kept["example_group"])}
    found = []
    for i, (group, rank) in enumerate(zip(kept["example_group"], kept["rank"], strict=True)):
        block, position = kept["block"][i], kept["position"][i]
        tokens, source = blocks[block]
        values = [0.0] * len(tokens)
        own = kept["activation"][i]
        # The others are rounded; a top example is its block's strongest.
        limit = own if group == "top" else float("inf")
        for place, value in zip(kept["active_positions"][i], kept["active_values"][i], strict=True):
            values[place] = one_short(min(value, limit))
        values[position] = one_short(own)
        activation = bins[group] | {
            "tokens": [words[token] for token in tokens],
            "values": values,
            "qualifying_token_index": position,
        }
        if (group, rank) in by_source:
            parts = by_source[group, rank]
            activation |= {"dfa_values": parts, "dfa_maxValue": max(parts), "dfa_targetIndex": position}
        found.append(Example(group, rank, block, position, source, activation))
    return found


def _bin(group: str, row: dict[str, Any]) -> dict[str, float]:
    """The interval of activations that a group was drawn from, and the share of all tokens in it."""
    if group == "top":
        low, high, share = -1.0, one_short(row["max_activation"]), -1.0
    elif group == "random":
        low, high, share = 0.0, 0.0, 0.0
    else:
        tenth = int(group[1:])
        low, high = short(row["quantiles"][tenth : tenth + 2])
        share = row["density"] / 10
    return {"bin_min": low, "bin_max": high, "bin_contains": share}


def _by_source(dfa: Runs, feature: int, context: int) -> dict[tuple[str, int], list[float]]:
    """Each example's contributions by source position, summed over heads, [context]."""
    rows = dfa.of(feature)
    if rows.num_rows == 0:
        return {}
    lists = rows["sources"].combine_chunks()
    lengths = np.diff(lists.offsets.to_numpy())
    sources = lists.flatten()
    of = np.repeat(np.arange(len(lengths)), lengths)
    units = rows["unit"].to_numpy().astype(np.float64)
    weights = sources.field("weight").to_numpy().astype(np.float64)
    total = np.zeros((len(lengths), context))
    np.add.at(total, (of, sources.field("source").to_numpy()), weights * units[of])
    keys = zip(rows["example_group"].to_pylist(), rows["rank"].to_pylist(), strict=True)
    return {key: _sparse(one) for key, one in zip(keys, total, strict=True)}


def _sparse(values: npt.NDArray[np.float64]) -> list[float]:
    """Short numbers of an array that is mostly zero."""
    found = [0.0] * len(values)
    for place in np.flatnonzero(values):
        found[place] = one_short(values[place])
    return found
