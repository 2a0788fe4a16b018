"""What a HeadVis tree says of one head: some of its patterns, and what they add up to."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from atlas.interop.dashboards.headvis_metrics import PATTERN_METRICS

if TYPE_CHECKING:
    from atlas.heads.samples import Kept, PatternPass

N_INTERVALS, PER_INTERVAL = 5, 3
HISTOGRAM_BINS, TOP_TOKENS = 50, 50
DISTANCES = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
"""Edges of the bins of destination - source."""
Ints = npt.NDArray[np.int64]
Blocks = Mapping[int, list[int]]
Others = Mapping[str, Mapping[tuple[int, int], float]]


def head_object(
    work: "PatternPass", layer: int, head: int, blocks: Blocks, words: Sequence[str]
) -> dict[str, Any]:
    """The file of one head."""
    chosen = chosen_samples(work, layer, head)
    shown = [kept.values.astype(np.float64).round(4) for _, kept in chosen]
    sequences = [
        {
            "sequence_id": kept.block,
            "interval": interval,
            "tokens": [words[token] for token in blocks[kept.block]],
            "attention_indices": kept.indices.tolist(),
            "attention_values": values.tolist(),
            "seq_len": len(blocks[kept.block]),
            "max_activation": round(kept.max_attention, 4),
        }
        for (interval, kept), values in zip(chosen, shown, strict=True)
    ]
    counts = work.statistics.max_attention[layer, head]
    middles = (np.arange(len(counts)) + 0.5) / len(counts)
    mean = float(counts @ middles / counts.sum()) if counts.sum() else None
    entries = Entries.of([kept for _, kept in chosen], shown, blocks)
    return {
        "sequences": sequences,
        "qk_distance_histogram": _distances(entries),
        "top_query_tokens": _top_tokens(entries.query, entries.value, words),
        "top_key_tokens": _top_tokens(entries.key, entries.value, words),
        "histogram": {
            "bin_edges": [round(i / HISTOGRAM_BINS, 4) for i in range(HISTOGRAM_BINS + 1)],
            "bin_values": counts.reshape(HISTOGRAM_BINS, -1).sum(1).tolist(),
        },
        "statistics": {
            "n_samples": len(sequences),
            "mean_max_activation": None if mean is None else round(mean, 4),
        },
    }


class Entries(NamedTuple):
    """Every entry of a head's patterns that is shown: distance, tokens of both ends, and attention."""

    distance: Ints
    query: Ints
    key: Ints
    value: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls, kept: "Sequence[Kept]", values: Sequence[npt.NDArray[np.float64]], blocks: Blocks
    ) -> "Entries":
        """The entries of some patterns, one after another."""
        parts = []
        for one in kept:
            tokens = np.array(blocks[one.block], np.int64)
            query, key = np.divmod(one.indices.astype(np.int64), len(tokens))
            parts.append((query - key, tokens[query], tokens[key]))
        none = np.empty(0, np.int64)
        distance, query, key = (np.concatenate([none, *(p[i] for p in parts)]) for i in range(3))
        return cls(distance, query, key, np.concatenate([np.empty(0), *values]))


def chosen_samples(work: "PatternPass", layer: int, head: int) -> list[tuple[int, "Kept"]]:
    """Interval and pattern: a few drawn of each interval from 1, and of the last one the strongest."""
    from atlas.heads.samples import intervals

    edges = intervals(work.statistics.max_attention[layer, head], N_INTERVALS)
    samples = work.heads[layer][head]
    found: dict[int, list[Kept]] = defaultdict(list)
    for _, kept in samples.drawn:
        interval = 1 + int(np.searchsorted(edges, kept.max_attention, "right"))
        if interval < N_INTERVALS and len(found[interval]) < PER_INTERVAL:
            found[interval].append(kept)
    top = [kept for _, kept in samples.top]
    found[N_INTERVALS] = [kept for kept in top if kept.max_attention >= edges[-1]] or top[:1]
    return [(interval, kept) for interval in sorted(found) for kept in found[interval]]


def _distances(entries: Entries) -> dict[str, list[Any]]:
    """Attention by distance between destination and source, over the entries shown."""
    n_bins = len(DISTANCES) - 1
    place = np.minimum(np.searchsorted(DISTANCES, entries.distance, "right") - 1, n_bins - 1)
    total = np.bincount(place, weights=entries.value, minlength=n_bins)
    return {"bin_edges": DISTANCES, "bin_values": np.round(total, 4).tolist()}


def _top_tokens(tokens: Ints, values: npt.NDArray[np.float64], words: Sequence[str]) -> list[dict[str, Any]]:
    """Texts of tokens by the attention that they give or get in the entries shown; ties by the text."""
    ids, place = np.unique(tokens, return_inverse=True)
    total: dict[str, float] = defaultdict(float)
    for token, weight in zip(ids, np.bincount(place, weights=values, minlength=len(ids)), strict=True):
        total[words[token]] += float(weight)
    ranked = sorted(total.items(), key=lambda item: (-item[1], item[0]))[:TOP_TOKENS]
    return [{"token": token, "weight": round(weight, 4)} for token, weight in ranked]


def scatter_rows(
    work: "PatternPass", heads: Sequence[tuple[int, int]], others: Others
) -> list[dict[str, Any]]:
    """A row per head: HeadVis's metrics, and the others that are known of it."""
    means = work.statistics.means()
    rows = []
    for layer, head in heads:
        row: dict[str, Any] = {"layer": layer, "head": head}
        row |= {name: _number(means[ours][layer, head]) for name, ours in PATTERN_METRICS.items()}
        row |= {name: _number(values.get((layer, head))) for name, values in others.items()}
        rows.append(row)
    return rows


def _number(value: float | None) -> float | None:
    if value is None or not np.isfinite(value):
        return None
    return value if isinstance(value, int) else round(float(value), 6)
