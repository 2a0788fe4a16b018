"""What a HeadVis tree says of one head: some of its patterns, and what they add up to."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from atlas.interop.dashboards.headvis_metrics import PATTERN_METRICS

if TYPE_CHECKING:
    from atlas.heads.samples import Kept, PatternPass

N_INTERVALS, PER_INTERVAL = 5, 3
HISTOGRAM_BINS, TOP_TOKENS = 50, 50
DISTANCES = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
"""Edges of the bins of destination - source."""
Sequences = list[dict[str, Any]]
Blocks = Mapping[int, list[int]]
Others = Mapping[str, Mapping[tuple[int, int], float]]


def head_object(
    work: "PatternPass", layer: int, head: int, blocks: Blocks, words: Sequence[str]
) -> dict[str, Any]:
    """The file of one head."""
    sequences = [
        {
            "sequence_id": kept.block,
            "interval": interval,
            "tokens": [words[token] for token in blocks[kept.block]],
            "attention_indices": kept.indices.tolist(),
            "attention_values": [round(value, 4) for value in kept.values.astype(np.float64).tolist()],
            "seq_len": len(blocks[kept.block]),
            "max_activation": round(kept.max_attention, 4),
        }
        for interval, kept in chosen_samples(work, layer, head)
    ]
    counts = work.statistics.max_attention[layer, head]
    middles = (np.arange(len(counts)) + 0.5) / len(counts)
    mean = float(counts @ middles / counts.sum()) if counts.sum() else None
    return {
        "sequences": sequences,
        "qk_distance_histogram": _distances(sequences),
        "top_query_tokens": _top_tokens(sequences, of_queries=True),
        "top_key_tokens": _top_tokens(sequences, of_queries=False),
        "histogram": {
            "bin_edges": [round(i / HISTOGRAM_BINS, 4) for i in range(HISTOGRAM_BINS + 1)],
            "bin_values": counts.reshape(HISTOGRAM_BINS, -1).sum(1).tolist(),
        },
        "statistics": {
            "n_samples": len(sequences),
            "mean_max_activation": None if mean is None else round(mean, 4),
        },
    }


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


def _distances(sequences: Sequences) -> dict[str, list[Any]]:
    """Attention by distance between destination and source, over the entries shown."""
    total = [0.0] * (len(DISTANCES) - 1)
    for one in sequences:
        for index, value in zip(one["attention_indices"], one["attention_values"], strict=True):
            destination, source = divmod(index, one["seq_len"])
            place = bisect_right(DISTANCES, destination - source) - 1
            total[min(place, len(total) - 1)] += value
    return {"bin_edges": DISTANCES, "bin_values": [round(value, 4) for value in total]}


def _top_tokens(sequences: Sequences, *, of_queries: bool) -> list[dict[str, Any]]:
    """Tokens by the attention that they give or get in the entries shown; ties by the token's text."""
    total: dict[str, float] = defaultdict(float)
    for one in sequences:
        for index, value in zip(one["attention_indices"], one["attention_values"], strict=True):
            places = divmod(index, one["seq_len"])
            total[one["tokens"][places[0 if of_queries else 1]]] += value
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
    return None if value is None or not np.isfinite(value) else round(float(value), 6)
