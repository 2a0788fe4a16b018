"""Finding features: a question gives candidates, filters narrow them, facets say what is among them.

A question (a token, a text, a label, another feature) gives a table ``sae, feature, score``; without one
every feature is a candidate. Filters are families, ranges of columns, SAEs and the head of largest decoder
share; they are asked of one table in memory (``search_index.py``).
"""

from dataclasses import dataclass, field
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from atlas.errors import QueryError, one_of
from atlas.store.families import FAMILIES
from atlas.store.indexes import INDEXES
from atlas.store.queries import search_index
from atlas.store.queries.quality import present
from atlas.store.queries.rows import arrow
from atlas.store.queries.search_index import BITS, COLUMNS
from atlas.tables import FAMILY_NAMES, TABLES

CANDIDATES = pa.schema([("sae", pa.string()), ("feature", pa.int32()), ("score", pa.float64())])
ROLES = {
    "at": "fires on",
    "next": "fires before",
    "up": "promotes",
    "down": "suppresses",
    "from": "reads from",
}
"""What a feature may have to do with a token."""
PAGE = 50


def meaning(name: str) -> str:
    """What a column of COLUMNS is, with its unit.

    >>> meaning("density")
    'n_active / evaluated tokens'
    """
    table, column = COLUMNS[name]
    found = TABLES[table].column(column)
    of = "DFA: " if table == "dfa_summary" else ""
    return f"{of}{found.meaning}{f' [{found.unit}]' if found.unit else ''}"


@dataclass(frozen=True)
class Filters:
    """What narrows the candidates, and in which order they come.

    ``ranges`` holds (column, low, high), either bound None; a feature without a value is outside every
    range. ``order`` is score or a column of COLUMNS, with a minus before it for smallest first.
    """

    saes: tuple[str, ...]
    head: int | None = None
    families: tuple[str, ...] = ()
    ranges: tuple[tuple[str, float | None, float | None], ...] = ()
    order: str = "max_activation"
    dead: bool = field(default=False)
    """Whether features that never fire are found, too."""

    def __post_init__(self) -> None:
        for family in self.families:
            one_of("family", family, FAMILY_NAMES, QueryError)
        for name, low, high in self.ranges:
            one_of("column", name, COLUMNS, QueryError)
            if low is not None and high is not None and low > high:
                raise QueryError(f"range of {name}: {low:g} to {high:g} is empty; the first is the smaller")
        one_of("order", self.order.removeprefix("-"), ("score", *COLUMNS), QueryError)


@dataclass(frozen=True)
class Facets:
    """How many features were found, by SAE, by SAE and top head, and by family."""

    n: int
    saes: dict[str, int]
    heads: dict[tuple[str, int], int]
    families: dict[str, int]


def _empty() -> pa.Table:
    return CANDIDATES.empty_table()


def by_token(con: duckdb.DuckDBPyConnection, tokens: tuple[int, ...], role: str) -> pa.Table:
    """Features that have to do with any of some tokens; the score says how much.

    The score: for ``at`` and ``next`` the share of its firings that have these tokens, for ``up`` and
    ``down`` the largest logit effect's size, for ``from`` the share of its stored positive DFA, rounded.
    QueryError names an unknown role.
    """
    one_of("role", role, ROLES, QueryError)
    if not tokens:
        return _empty()
    score = "max(score)" if role in ("up", "down") else "sum(score)"
    return _candidates(
        con,
        f"SELECT sae, feature, {score} AS score FROM {_indexed(con, 'token_index')} "  # noqa: S608
        "WHERE role = $role AND token IN (SELECT unnest($tokens::INTEGER[])) GROUP BY ALL",
        {"role": role, "tokens": list(tokens)},
    )


def _indexed(con: duckdb.DuckDBPyConnection, name: str) -> str:
    """A table in the order of searches, or the query of its rows in a release made before it was."""
    return name if present(con, name) else f"({INDEXES[name]})"


def by_places(con: duckdb.DuckDBPyConnection, places: pa.Table, reach: int = 0) -> pa.Table:
    """Features with a top example on a place of the text; the score is the number of such examples.

    An example is on a place if it lies at one of its tokens, or at most ``reach`` tokens after it.
    """
    if not places.num_rows:
        return _empty()
    con.register("search_places", _positions(places, reach))
    try:
        return _candidates(
            con,
            # First by block alone, which leaves few rows: a join by both costs twice as much of all of them.
            "SELECT sae, feature, count(*) AS score FROM ("  # noqa: S608
            f"SELECT * FROM {_indexed(con, 'example_places')} SEMI JOIN search_places USING (block)"
            ") JOIN search_places USING (block, position) GROUP BY ALL",
            {},
        )
    finally:
        con.unregister("search_places")


def _positions(places: pa.Table, reach: int) -> pa.Table:
    """Every block and position that is on a place, once."""
    block, low, high = (places[name].to_numpy().astype(np.int64) for name in ("block", "low", "high"))
    lengths = high - low + 1 + reach
    row = np.repeat(np.arange(len(block)), lengths)
    position = low[row] + np.arange(len(row)) - np.repeat(lengths.cumsum() - lengths, lengths)
    found = np.unique(np.stack([block[row], position]), axis=1)
    return pa.table({"block": pa.array(found[0], pa.int32()), "position": pa.array(found[1], pa.int16())})


def like(con: duckdb.DuckDBPyConnection, sae: str, feature: int) -> pa.Table:
    """Features like one feature: near it by direction, firing with it, or promoting the same tokens.

    The score is the largest of: the cosine with its decoder or encoder direction (where either is among the
    other's nearest), the Jaccard index of their firing, and the share of its 20 most promoted tokens that the
    other promotes, too (at least 5 of 20).
    """
    return _candidates(
        con,
        f"""
        WITH found AS (
            SELECT other_sae AS sae, other AS feature, cosine AS score
            FROM neighbours WHERE sae = $sae AND feature = $feature
            UNION ALL
            SELECT sae, feature, cosine FROM neighbours WHERE other_sae = $sae AND other = $feature
            UNION ALL
            SELECT $sae, other, jaccard FROM coactivation WHERE sae = $sae AND feature = $feature
            UNION ALL
            SELECT sae, feature, count(*) / 20 FROM {_indexed(con, "token_index")}
            WHERE role = 'up' AND token IN (
                SELECT token FROM logit_effects WHERE sae = $sae AND feature = $feature AND sign = 1)
            GROUP BY ALL HAVING count(*) >= 5
        )
        SELECT sae, feature, max(score) AS score FROM found
        WHERE NOT (sae = $sae AND feature = $feature) GROUP BY ALL
        """,  # noqa: S608
        {"sae": sae, "feature": feature},
    )


def _candidates(con: duckdb.DuckDBPyConnection, sql: str, given: dict[str, Any]) -> pa.Table:
    """Candidates by SAE and feature; none in a release made before the table existed."""
    try:
        return arrow(con, f"{sql} ORDER BY sae, feature", given).cast(CANDIDATES)
    except duckdb.CatalogException:
        return _empty()


class _Found:
    """The features found: FROM and WHERE over the table of all features and candidates, with parameters."""

    def __init__(self, con: duckdb.DuckDBPyConnection, filters: Filters, *, scored: bool) -> None:
        needed = [COLUMNS[name][0] for name, _, _ in filters.ranges]
        needed += [FAMILIES[name].table for name in filters.families]
        order = filters.order.removeprefix("-")
        needed += [COLUMNS[order][0]] if order in COLUMNS else []
        if "dfa_summary" in needed and not present(con, "dfa_summary"):
            raise QueryError("this release was made before dfa_summary; build it anew to search by DFA")
        search_index.make_ready(con)
        self.given: dict[str, Any] = {"saes": list(filters.saes)}
        self.where = [f"f.sae IN (SELECT TRY_CAST(unnest($saes::VARCHAR[]) AS {search_index.SAE}))"]
        self._narrow(filters)
        self.source = f"{search_index.NAME} f"
        if scored:
            of = f"TRY_CAST(c.sae AS {search_index.SAE}) = f.sae AND c.feature = f.feature"
            self.source += f" JOIN search_candidates c ON {of}"

    def _narrow(self, filters: Filters) -> None:
        if not filters.dead and "dead" not in filters.families:
            self.where.append("f.alive")
        if filters.head is not None:
            self.where.append("f.top_head = $head")
            self.given["head"] = filters.head
        self.where += [f"f.families & {BITS[name]} > 0" for name in filters.families]
        for i, (name, low, high) in enumerate(filters.ranges):
            for key, sign, bound in ((f"low{i}", ">=", low), (f"high{i}", "<=", high)):
                if bound is not None:
                    self.where.append(f"f.{name} {sign} ${key}")
                    self.given[key] = bound
            if low is None and high is None:
                self.where.append(f"f.{name} IS NOT NULL")

    @property
    def sql(self) -> str:
        return f"FROM {self.source} WHERE {' AND '.join(self.where)}"


def page(
    con: duckdb.DuckDBPyConnection, filters: Filters, candidates: pa.Table | None = None, start: int = 0
) -> pa.Table:
    """Fifty features of those found, from ``start`` on: sae, feature, score, value, families, and so on.

    ``value`` is the column of the order (NULL last), ``families`` their bits (:func:`families_in`). Ties go
    by SAE and feature.
    """
    found = _Found(con, filters, scored=candidates is not None)
    order = filters.order.removeprefix("-")
    score = "c.score" if candidates is not None else "NULL::DOUBLE"
    value = score if order == "score" else f"f.{order}::DOUBLE"
    way = "ASC" if filters.order.startswith("-") else "DESC"
    sql = f"""
        SELECT f.sae::VARCHAR AS sae, f.feature, {score} AS score, {value} AS value, f.density,
               f.max_activation, f.top_head, f.top_token, f.families {found.sql}
        ORDER BY value {way} NULLS LAST, f.sae, f.feature LIMIT {PAGE} OFFSET $start
    """
    return _asked(con, sql, {**found.given, "start": start}, candidates)


def families_in(bits: int) -> list[str]:
    """The names of families out of the bits of a page, in the order of the rules.

    >>> families_in(0b10000010)
    ['dense', 'induction']
    """
    return [name for name, bit in BITS.items() if bits & bit]


def facets(con: duckdb.DuckDBPyConnection, filters: Filters, candidates: pa.Table | None = None) -> Facets:
    """How many features were found, by SAE, head and family."""
    found = _Found(con, filters, scored=candidates is not None)
    counts = ", ".join(f"count(*) FILTER (f.families & {bit} > 0) AS {name}" for name, bit in BITS.items())
    sql = (
        f"SELECT f.sae::VARCHAR AS sae, f.top_head, count(*) AS n, {counts} {found.sql} "
        "GROUP BY f.sae, f.top_head ORDER BY f.sae, f.top_head"
    )
    saes: dict[str, int] = {}
    heads: dict[tuple[str, int], int] = {}
    families = dict.fromkeys(BITS, 0)
    for row in _asked(con, sql, found.given, candidates).to_pylist():
        saes[row["sae"]] = saes.get(row["sae"], 0) + row["n"]
        if row["top_head"] is not None:
            heads[row["sae"], row["top_head"]] = row["n"]
        for family in families:
            families[family] += row[family]
    return Facets(sum(saes.values()), saes, heads, {name: n for name, n in families.items() if n})


def _asked(
    con: duckdb.DuckDBPyConnection, sql: str, given: dict[str, Any], candidates: pa.Table | None
) -> pa.Table:
    if candidates is None:
        return arrow(con, sql, given)
    con.register("search_candidates", candidates)
    try:
        return arrow(con, sql, given)
    finally:
        con.unregister("search_candidates")
