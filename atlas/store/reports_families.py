"""Heads by what their features read: families beside attention scores, and how well the two agree.

A head's evidence is the share of its positive DFA, BOS left out, that comes from the previous position, from
earlier copies of the token, or from the positions after them (``head_summary``). It is made from features
alone; the attention scores (``head_scores``) never look at a feature. Source: rows B6 and C2.
"""

from collections.abc import Sequence
from typing import Any

import duckdb
import pyarrow as pa

from atlas.store.queries.quality import missing
from atlas.store.queries.ranks import rank_correlation
from atlas.store.queries.rows import arrow
from atlas.store.reports_shown import Part, Shown
from atlas.tables import FAMILY_NAMES

EVIDENCE = {
    "previous": ("previous_token",),
    "same_token": ("duplicate", "duplicate_text"),
    "after_match": ("induction", "induction_text"),
}
"""Each share of DFA, and the attention scores of the heads that it should be large in."""
_PAIRS = tuple((share, score) for share, scores in EVIDENCE.items() for score in scores)
_SHOWN_FAMILIES = 3


def families(con: duckdb.DuckDBPyConnection, model: str, split: str = "eval") -> list[Part]:  # noqa: ARG001
    """A row per head, and the rank correlation of evidence by features with attention scores."""
    if missing(con, "head_summary"):
        return []
    rows = _rows(con, model)
    if not rows.num_rows:
        return []
    share = {"previous": "Previous", "same_token": "Same token", "after_match": "After match"}
    columns = (
        Shown("head_name", "Head"), Shown("n_top", "Features", "d", "whose largest decoder share it has"),
        Shown("largest", "Families", "", "the commonest among these features"),
        Shown("distance", "Distance", ".1f", "mean distance to the source, tokens; BOS left out"),
        *(Shown(name, title, ".1%", "share of positive DFA, BOS left out") for name, title in share.items()),
        *(Shown(score, score.replace("_", " "), ".3f", "attention score") for score, *_ in EVIDENCE.values()),
    )  # fmt: skip
    return [Part("Heads by their features", columns, rows), _agreement(rows)]


def _rows(con: duckdb.DuckDBPyConnection, model: str) -> pa.Table:
    shares = ", ".join(f"h.{name} / nullif(1 - h.bos, 0) AS {name}" for name in EVIDENCE)
    scores = ", ".join(f"max(s.value) FILTER (s.score = '{score}') AS {score}" for _, score in _PAIRS)
    columns = ", ".join([*(score for _, score in _PAIRS), *(f"n_{name}" for name in FAMILY_NAMES)])
    found = arrow(
        con,
        f"""
        WITH scores AS (SELECT layer, head, {scores} FROM head_scores s WHERE model = $model GROUP BY ALL)
        SELECT h.layer, h.head, h.sae, n_top, distance, {shares}, {columns}
        FROM head_summary h LEFT JOIN scores USING (layer, head)
        WHERE model = $model ORDER BY h.layer, h.head, h.sae
        """,  # noqa: S608
        {"model": model},
    )
    rows = found.to_pylist()
    named = pa.array([f"L{row['layer']}H{row['head']}" for row in rows], pa.string())
    largest = pa.array([_largest(row) for row in rows], pa.string())
    return found.append_column("head_name", named).append_column("largest", largest)


def _largest(row: dict[str, Any]) -> str:
    counts = {name: row[f"n_{name}"] for name in FAMILY_NAMES if row[f"n_{name}"]}
    first = sorted(counts, key=lambda name: -counts[name])[:_SHOWN_FAMILIES]
    return ", ".join(f"{name.replace('_', ' ')} {counts[name]}" for name in first)


def _agreement(rows: pa.Table) -> Part:
    """Spearman's correlation over heads, and the place of the highest-scoring heads by features alone."""
    columns = (
        Shown("evidence", "Evidence by features"), Shown("score", "Attention score"),
        Shown("heads", "Heads", "d"), Shown("spearman", "Rank correlation", ".3f", "Spearman"),
        Shown("auc", "AUC", ".3f", "chance that a head of the top tenth by score is above another"),
        Shown("best", "Best by features"), Shown("best_by_score", "Best by score"),
    )  # fmt: skip
    lines = [_line(rows, share, score) for share, score in _PAIRS if rows[score].null_count < rows.num_rows]
    kinds = {"heads": pa.int64(), "spearman": pa.float64(), "auc": pa.float64()}
    data = {
        c.name: pa.array([line[c.name] for line in lines], kinds.get(c.name, pa.string())) for c in columns
    }
    return Part("Features against attention", columns, pa.table(data))


def _line(rows: pa.Table, share: str, score: str) -> dict[str, Any]:
    both = [row for row in rows.to_pylist() if row[share] is not None and row[score] is not None]
    first = _best(both, score, max(1, len(both) // 10))
    return {
        "evidence": share,
        "score": score,
        "heads": len(both),
        "spearman": rank_correlation(rows, share, score),
        "auc": area_under_curve(
            [row[share] for row in both if row in first], [row[share] for row in both if row not in first]
        ),
        "best": ", ".join(row["head_name"] for row in _best(both, share, 5)),
        "best_by_score": ", ".join(row["head_name"] for row in _best(both, score, 5)),
    }


def _best(rows: Sequence[dict[str, Any]], name: str, n: int) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -row[name])[:n]


def area_under_curve(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """The chance that a value of the first kind is above one of the second, ties counting half.

    >>> area_under_curve([3.0, 1.0], [2.0, 1.0])
    0.625
    """
    if not positive or not negative:
        return None
    won = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return won / (len(positive) * len(negative))
