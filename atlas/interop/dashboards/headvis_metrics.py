"""The numbers about each head that a HeadVis tree shows: of its patterns, its scores, and its features."""

from collections.abc import Sequence

import duckdb

from atlas.interop.dashboards.rows import columns_of
from atlas.interop.dashboards.selection import Part
from atlas.tables import TABLES

PATTERN_METRICS = {
    "self_attention_score": "self_attention",
    "prev_token_score": "previous_token",
    "pattern_entropy": "entropy",
    "qk_distance": "distance",
    "qk_distance_variance": "distance_variance",
    "induction_score": "induction",
}
"""HeadVis's own metrics, and the statistics of patterns that they are."""
_SUMMARY = {
    column.name: column.meaning
    for column in TABLES["head_summary"].columns
    if column.name not in TABLES["head_summary"].key
}
DESCRIPTIONS = {
    "self_attention_score": "Mean attention of a token to itself; position 0 left out as a destination.",
    "prev_token_score": "Mean attention to the token before.",
    "pattern_entropy": "Mean entropy of a destination's attention, in nats; position 0 left out.",
    "qk_distance": "Mean distance from destination to source, weighted by attention.",
    "qk_distance_variance": "Variance of that distance.",
    "induction_score": "Mean attention to the tokens that follow earlier copies of a token, where there are.",
    **_SUMMARY,
}


def other_metrics(
    con: duckdb.DuckDBPyConnection, model: str, parts: Sequence[Part]
) -> dict[str, dict[tuple[int, int], float]]:
    """Head scores of the release by their names, and the columns of head_summary, by (layer, head).

    Where a layer has several z SAEs among ``parts``, the first of them is summarised.
    """
    found: dict[str, dict[tuple[int, int], float]] = {}
    sql = "SELECT score, layer, head, value FROM head_scores WHERE model = ? ORDER BY ALL"
    for score, layer, head, value in con.execute(sql, [model]).fetchall():
        found.setdefault(f"score_{score}", {})[layer, head] = value
    if columns_of(con).get("head_summary", frozenset()).issuperset(_SUMMARY):
        first: dict[int, str] = {}
        for part in parts:
            if part.site.kind == "z" and part.site.head is None:
                first.setdefault(part.site.layer, part.sae)
        sql = f"SELECT layer, head, {', '.join(_SUMMARY)} FROM head_summary WHERE sae = ?"  # noqa: S608
        for sae in first.values():
            for layer, head, *values in con.execute(sql, [sae]).fetchall():
                for name, value in zip(_SUMMARY, values, strict=True):
                    found.setdefault(name, {})[layer, head] = value
    return found
