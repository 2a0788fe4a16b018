"""Finding features: a question gives candidates, filters narrow them, facets say what is among them.

A question (a token, a text, a label, another feature) gives a table ``sae, feature, score``; without one
every feature is a candidate. Filters are families, ranges of columns, SAEs and the head of largest decoder
share. Everything is answered from the tables as they are; nothing is indexed beforehand.
"""

from dataclasses import dataclass, field
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from atlas.errors import QueryError, one_of
from atlas.store.families import FAMILIES
from atlas.store.queries.rows import arrow
from atlas.tables import DFA_SHARES, FAMILY_NAMES, TABLES

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
_FEATURE_COLUMNS = (
    "density", "n_active", "max_activation", "mean_activation", "encoder_norm", "decoder_norm",
    "encoder_decoder_cosine", "bias", "top_position", "top_position_share", "effective_positions",
    "top_token_share", "top_pair_share", "loss_effect", "n_loss", "logit_std", "logit_skew", "logit_kurtosis",
)  # fmt: skip
_DFA_COLUMNS = (*DFA_SHARES, "local", "long_range", "distance", "matched", "matched_prefix")
COLUMNS = {
    **{name: ("features", name) for name in _FEATURE_COLUMNS},
    **{f"dfa_{name}": ("dfa_summary", name) for name in _DFA_COLUMNS},
}
"""Columns that can be bounded and sorted by: the name here, its table and its column."""


def meaning(name: str) -> str:
    """What a column of COLUMNS is, with its unit.

    >>> meaning("density")
    'n_active / evaluated tokens'
    """
    table, column = COLUMNS[name]
    found = next(c for c in TABLES[table].columns if c.name == column)
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
    ``down`` the largest logit effect's size, for ``from`` the share of its stored positive DFA.
    QueryError names an unknown role.
    """
    one_of("role", role, ROLES, QueryError)
    if not tokens:
        return _empty()
    source = {
        "at": ("token_stats", "sum(precision)", "AND role = 'at'"),
        "next": ("token_stats", "sum(precision)", "AND role = 'next'"),
        "up": ("logit_effects", "max(value)", "AND sign = 1"),
        "down": ("logit_effects", "max(-value)", "AND sign = -1"),
        "from": ("dfa_tokens", "sum(share)", ""),
    }
    table, score, where = source[role]
    return _candidates(
        con,
        f"SELECT sae, feature, {score} AS score FROM {table} "  # noqa: S608
        f"WHERE token IN (SELECT unnest($tokens::INTEGER[])) {where} GROUP BY ALL",
        {"tokens": list(tokens)},
    )


def by_places(con: duckdb.DuckDBPyConnection, places: pa.Table, reach: int = 0) -> pa.Table:
    """Features with a top example on a place of the text; the score is the number of such examples.

    An example is on a place if it lies at one of its tokens, or at most ``reach`` tokens after it.
    """
    if not places.num_rows:
        return _empty()
    con.register("search_places", _hits(places, reach))
    try:
        return _candidates(
            con,
            """
            SELECT sae, feature, count(*) AS score FROM examples e JOIN search_places p USING (block)
            WHERE example_group = 'top' AND p.hits[e.position + 1] GROUP BY ALL
            """,
            {},
        )
    finally:
        con.unregister("search_places")


def _hits(places: pa.Table, reach: int) -> pa.Table:
    """One row per block: whether each of its positions is on a place. A join by ranges would cost thrice."""
    low, high = (places[name].to_numpy().astype(np.int64) for name in ("low", "high"))
    blocks, row = np.unique(places["block"].to_numpy(), return_inverse=True)
    width = int(high.max()) + reach + 2
    steps = np.zeros((len(blocks), width), np.int32)
    np.add.at(steps, (row, low), 1)
    np.add.at(steps, (row, high + reach + 1), -1)
    hits = pa.array((steps.cumsum(axis=1) > 0).ravel())
    edges = pa.array(np.arange(0, len(hits) + 1, width, dtype=np.int32))
    return pa.table({"block": blocks, "hits": pa.ListArray.from_arrays(edges, hits)})


def like(con: duckdb.DuckDBPyConnection, sae: str, feature: int) -> pa.Table:
    """Features like one feature: near it by direction, firing with it, or promoting the same tokens.

    The score is the largest of: the cosine with its decoder or encoder direction (where either is among the
    other's nearest), the Jaccard index of their firing, and the share of its 20 most promoted tokens that the
    other promotes, too (at least 5 of 20).
    """
    return _candidates(
        con,
        """
        WITH found AS (
            SELECT other_sae AS sae, other AS feature, cosine AS score
            FROM neighbours WHERE sae = $sae AND feature = $feature
            UNION ALL
            SELECT sae, feature, cosine FROM neighbours WHERE other_sae = $sae AND other = $feature
            UNION ALL
            SELECT $sae, other, jaccard FROM coactivation WHERE sae = $sae AND feature = $feature
            UNION ALL
            SELECT sae, feature, count(*) / 20 FROM logit_effects
            WHERE sign = 1 AND token IN (
                SELECT token FROM logit_effects WHERE sae = $sae AND feature = $feature AND sign = 1)
            GROUP BY ALL HAVING count(*) >= 5
        )
        SELECT sae, feature, max(score) AS score FROM found
        WHERE NOT (sae = $sae AND feature = $feature) GROUP BY ALL
        """,
        {"sae": sae, "feature": feature},
    )


def _candidates(con: duckdb.DuckDBPyConnection, sql: str, given: dict[str, Any]) -> pa.Table:
    """Candidates by SAE and feature; none in a release made before the table existed."""
    try:
        return arrow(con, f"{sql} ORDER BY sae, feature", given).cast(CANDIDATES)
    except duckdb.CatalogException:
        return _empty()


def _has_dfa(con: duckdb.DuckDBPyConnection) -> bool:
    found = con.execute("SELECT count(*) FROM duckdb_tables() WHERE table_name = 'dfa_summary'").fetchall()
    return bool(found[0][0])


class _Found:
    """The features found, as a CTE ``found`` over candidates and filters, with its parameters."""

    def __init__(self, con: duckdb.DuckDBPyConnection, filters: Filters, *, scored: bool) -> None:
        self.given: dict[str, Any] = {"saes": list(filters.saes)}
        self.dfa = _has_dfa(con)
        needed = [COLUMNS[name][0] for name, _, _ in filters.ranges]
        needed += [FAMILIES[name].table for name in filters.families]
        order = filters.order.removeprefix("-")
        needed += [COLUMNS[order][0]] if order in COLUMNS else []
        if "dfa_summary" in needed and not self.dfa:
            raise QueryError("this release was made before dfa_summary; build it anew to search by DFA")
        self.where = ["f.sae IN (SELECT unnest($saes::VARCHAR[]))"]
        self._narrow(filters)
        self.source = "features f"
        if scored:
            self.source += " JOIN search_candidates c USING (sae, feature)"

    def _narrow(self, filters: Filters) -> None:
        if not filters.dead and "dead" not in filters.families:
            self.where.append("f.alive")
        if filters.head is not None:
            self.where.append("f.top_head = $head")
            self.given["head"] = filters.head
        self.where += [f"({FAMILIES[name].rule})" for name in filters.families]
        for i, (name, low, high) in enumerate(filters.ranges):
            column = COLUMNS[name][1]
            for key, sign, bound in ((f"low{i}", ">=", low), (f"high{i}", "<=", high)):
                if bound is not None:
                    self.where.append(f"{_place(name)}.{column} {sign} ${key}")
                    self.given[key] = bound
            if low is None and high is None:
                self.where.append(f"{_place(name)}.{column} IS NOT NULL")

    def sql(self, *, with_dfa: bool) -> str:
        """FROM and WHERE; joined with dfa_summary where its columns are needed."""
        joined = " LEFT JOIN dfa_summary d USING (sae, feature)" if with_dfa and self.dfa else ""
        return f"FROM {self.source}{joined} WHERE {' AND '.join(self.where)}"


def _place(name: str) -> str:
    return "f" if COLUMNS[name][0] == "features" else "d"


def _needs_dfa(filters: Filters) -> bool:
    order = filters.order.removeprefix("-")
    names = [name for name, _, _ in filters.ranges] + ([order] if order in COLUMNS else [])
    return any(_place(name) == "d" for name in names) or any(
        FAMILIES[name].table == "dfa_summary" for name in filters.families
    )


def page(
    con: duckdb.DuckDBPyConnection, filters: Filters, candidates: pa.Table | None = None, start: int = 0
) -> pa.Table:
    """Fifty features of those found, from ``start`` on: sae, feature, score, value, density, and so on.

    ``value`` is the column of the order (NULL last). Ties go by SAE and feature.
    """
    found = _Found(con, filters, scored=candidates is not None)
    order = filters.order.removeprefix("-")
    by_score = order == "score"
    score = "c.score" if candidates is not None else "NULL::DOUBLE"
    value = score if by_score else f"{_place(order)}.{COLUMNS[order][1]}::DOUBLE"
    way = "ASC" if filters.order.startswith("-") else "DESC"
    sql = f"""
        SELECT f.sae, f.feature, {score} AS score, {value} AS value, f.density, f.max_activation, f.top_head,
               f.top_token {found.sql(with_dfa=_needs_dfa(filters))}
        ORDER BY value {way} NULLS LAST, f.sae, f.feature LIMIT {PAGE} OFFSET $start
    """
    return _asked(con, sql, {**found.given, "start": start}, candidates)


def facets(con: duckdb.DuckDBPyConnection, filters: Filters, candidates: pa.Table | None = None) -> Facets:
    """How many features were found, by SAE, head and family."""
    found = _Found(con, filters, scored=candidates is not None)
    known = [f for f in FAMILIES.values() if f.table == "features" or found.dfa]
    counts = ", ".join(f"count(*) FILTER ({f.rule})" for f in known)
    sql = (
        f"SELECT f.sae, f.top_head, count(*), {counts} {found.sql(with_dfa=True)} "
        "GROUP BY f.sae, f.top_head ORDER BY f.sae, f.top_head"
    )
    rows = _asked(con, sql, found.given, candidates).to_pylist()
    saes: dict[str, int] = {}
    heads: dict[tuple[str, int], int] = {}
    families = dict.fromkeys((f.name for f in known), 0)
    for row in rows:
        sae, head, n, *each = row.values()
        saes[sae] = saes.get(sae, 0) + n
        if head is not None:
            heads[sae, head] = n
        for family, count in zip(known, each, strict=True):
            families[family.name] += count
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
