"""Kept examples of features with the text around them and, for z SAEs, their direct feature attribution.

A page may show hundreds of examples with thirty sources each: lists come out of Arrow as columns, for a
Python object per list element costs more than the query. The two tables are asked side by side; that takes a
quarter of the time away.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlas.store.connection import cursor
from atlas.store.queries.rows import arrow

GROUPS = ("top", "q9", "q8", "q7", "q6", "q5", "q4", "q3", "q2", "q1", "q0")
"""The strongest examples and those of each tenth of the activations, strongest first."""
MORE_GROUPS = ("random", "negative")
"""Examples drawn from all firings, and near misses: where it almost fired."""


@dataclass(frozen=True)
class Attribution:
    """The DFA of one example: the part of each head, and the largest (head, source, contribution) entries.

    Parts are as stored, to 12 bits of the largest, and contributions to 1/511 of it. ``matched_prefix``
    counts the tokens before ``top_source``, the source of the largest positive one, that repeat those up to
    the example's.
    """

    by_head: tuple[float, ...]
    bias_term: float
    pre_activation: float
    sources: tuple[tuple[int, int, float], ...]
    top_source: int | None = None
    matched_prefix: int = 0


@dataclass(frozen=True)
class Example:
    """One kept example: where it is, the block's tokens, and where in the block the feature fires.

    ``near_miss`` is that of a near miss, and None for an example on which the feature fires.
    """

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
    near_miss: float | None = None


Key: TypeAlias = tuple[int, str, int]


def _cut(values: Sequence[Any], column: pa.ListArray) -> list[tuple[Any, ...]]:
    """The flat values of a list column, cut into its rows; NULL is empty."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    edges = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    whole = tuple(values)
    return [whole[start:stop] for start, stop in pairwise(edges)]


def _flat(column: pa.ListArray) -> list[tuple[Any, ...]]:
    return _cut(column.flatten().to_numpy(zero_copy_only=False).tolist(), column)


def _attributions(rows: pa.Table) -> dict[Key, Attribution]:
    listed = rows["sources"].combine_chunks()
    triples = listed.flatten()
    unit = np.repeat(rows["unit"].to_numpy(), pc.list_value_length(listed).to_numpy())
    contribution = triples.field("weight").to_numpy() * unit
    whole = [triples.field(name).to_numpy().tolist() for name in ("head", "source")]
    columns = [
        _flat(rows["by_head"].combine_chunks()),
        *(rows[name].to_pylist() for name in ("bias_term", "pre_activation")),
        _cut(list(zip(*whole, contribution.tolist(), strict=True)), listed),
        *(rows[name].to_pylist() for name in ("top_source", "matched_prefix")),
    ]
    return {key: Attribution(*values) for key, *values in zip(_keys(rows), *columns, strict=True)}


def _keys(rows: pa.Table) -> list[Key]:
    return list(zip(*(rows[name].to_pylist() for name in ("feature", "example_group", "rank")), strict=True))


def block_tokens(
    con: duckdb.DuckDBPyConnection, blocks: Sequence[int]
) -> dict[int, tuple[tuple[int, ...], str]]:
    """Token ids and source of some blocks, by block."""
    rows = arrow(
        con,
        "SELECT block, tokens, source FROM docs WHERE block IN (SELECT unnest(?::INTEGER[]))",
        [sorted(set(blocks))],
    )
    tokens = _flat(rows["tokens"].combine_chunks())
    return dict(
        zip(rows["block"].to_pylist(), zip(tokens, rows["source"].to_pylist(), strict=True), strict=True)
    )


def examples(
    con: duckdb.DuckDBPyConnection,
    sae: str,
    features: Sequence[int],
    groups: Sequence[str] = ("top",),
    k: int = 20,
) -> tuple[Example, ...]:
    """The first k examples of each group of some features, by feature, group (as asked) and rank."""
    asked = {"sae": sae, "features": list(features), "groups": list(groups), "k": k}
    with ThreadPoolExecutor(1) as beside:
        attributed = beside.submit(lambda: _attributions(_asked(cursor(con), "dfa", asked)))
        rows = _asked(con, "examples", asked)
        block = rows["block"].to_pylist()
        texts = block_tokens(con, block)
    dfa, names = attributed.result(), ("position", "activation", "near_miss")
    keys, (position, activation, near) = _keys(rows), (rows[name].to_pylist() for name in names)
    lists = (rows[name].combine_chunks() for name in ("active_positions", "active_values"))
    places, values = map(_flat, lists)
    order = {name: i for i, name in enumerate(groups)}
    found = [
        Example(
            *key, block[i], position[i], activation[i], tuple(zip(places[i], values[i], strict=True)),
            *texts.get(block[i], ((), "text not in this release")), dfa.get(key), near[i],
        )
        for i, key in enumerate(keys)
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda one: (one.feature, order[one.group], one.rank)))


def _asked(con: duckdb.DuckDBPyConnection, table: str, asked: dict[str, Any]) -> pa.Table:
    """Rows of one table. The two are not joined in SQL: a join reads far more of them than it gives.

    Features come through ``unnest`` because DuckDB filters what it reads by a joined list, not by IN (...); a
    second join, of a few groups, would cost more than it spares.
    """
    return arrow(
        con,
        f"""
        SELECT * FROM {table} WHERE sae = $sae AND rank < $k
        AND feature IN (SELECT unnest($features::INTEGER[]))
        AND list_contains($groups::VARCHAR[], example_group)
        """,  # noqa: S608
        asked,
    )
