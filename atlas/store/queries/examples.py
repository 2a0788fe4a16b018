"""Kept examples of features with the text around them and, for z SAEs, their direct feature attribution."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from atlas.store.queries.rows import arrow

GROUPS = ("top", "q9", "q8", "q7", "q6", "q5", "q4", "q3", "q2", "q1", "q0")


@dataclass(frozen=True)
class Attribution:
    """The DFA of one example: exact per head, and the largest (head, source, contribution) entries.

    Contributions are as stored, rounded to 1/2047 of the largest.
    """

    by_head: tuple[float, ...]
    bias_term: float
    pre_activation: float
    sources: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class Example:
    """One kept example: where it is, the block's tokens, and where in the block the feature fires."""

    feature: int
    group: str
    rank: int
    block: int
    position: int
    activation: float
    active: tuple[tuple[int, float], ...]
    tokens: tuple[int, ...]
    source: str
    dfa: Attribution | None


def _attribution(row: dict[str, Any]) -> Attribution | None:
    if row["by_head"] is None:
        return None
    unit = row["unit"]
    sources = tuple((s["head"], s["source"], s["weight"] * unit) for s in row["sources"] or ())
    return Attribution(tuple(row["by_head"]), row["bias_term"], row["sum_and_bias"], sources)


def _example(row: dict[str, Any], blocks: dict[int, tuple[tuple[int, ...], str]]) -> Example:
    tokens, source = blocks.get(row["block"], ((), "text not in this release"))
    return Example(
        feature=row["feature"],
        group=row["example_group"],
        rank=row["rank"],
        block=row["block"],
        position=row["position"],
        activation=row["activation"],
        active=tuple(zip(row["active_positions"], row["active_values"], strict=True)),
        tokens=tokens,
        source=source,
        dfa=_attribution(row),
    )


def block_tokens(
    con: duckdb.DuckDBPyConnection, blocks: Sequence[int]
) -> dict[int, tuple[tuple[int, ...], str]]:
    """Token ids and source of some blocks, by block."""
    rows = con.execute(
        "SELECT block, tokens, source FROM docs WHERE block IN (SELECT unnest(?::INTEGER[]))",
        [sorted(set(blocks))],
    ).fetchall()
    return {block: (tuple(tokens), source) for block, tokens, source in rows}


def examples(
    con: duckdb.DuckDBPyConnection,
    sae: str,
    features: Sequence[int],
    groups: Sequence[str] = ("top",),
    k: int = 20,
) -> tuple[Example, ...]:
    """The first k examples of each group of some features, by feature, group (as asked) and rank."""
    rows = arrow(
        con,
        """
        SELECT e.*, d.by_head, d.bias_term, d.pre_activation AS sum_and_bias, d.unit, d.sources
        FROM (
            SELECT * FROM examples WHERE sae = $sae AND rank < $k
            AND feature IN (SELECT unnest($features::INTEGER[]))
            AND example_group IN (SELECT unnest($groups::VARCHAR[]))
        ) e LEFT JOIN (
            SELECT * FROM dfa WHERE sae = $sae AND rank < $k
            AND feature IN (SELECT unnest($features::INTEGER[]))
        ) d USING (feature, example_group, rank)
        """,
        {"sae": sae, "features": list(features), "groups": list(groups), "k": k},
    )
    found = rows.to_pylist()
    blocks = block_tokens(con, [row["block"] for row in found])
    order = {group: i for i, group in enumerate(groups)}
    found.sort(key=lambda row: (row["feature"], order[row["example_group"]], row["rank"]))
    return tuple(_example(row, blocks) for row in found)
