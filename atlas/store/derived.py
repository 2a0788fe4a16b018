"""Tables that the build of a release computes from the others: ``head_summary``, and those of ``indexes.py``.

They are part of a release like all tables (checked, digested, in the manifest), but no step makes them and
no parts of them are read, so they can never disagree with the evidence that they sum up.
"""

from typing import NamedTuple

import duckdb

from atlas.store.indexes import INDEXES
from atlas.tables import DFA_SHARES, FAMILY_NAMES, TABLES

_CORRELATIONS = {
    "corr_decoder_fve": ("decoder_share", "fve"),
    "corr_decoder_dfa": ("decoder_share", "dfa_share"),
    "corr_fve_dfa": ("fve", "dfa_share"),
}
_LEAST = 3
"""Rows below which there is no rank correlation."""
_MEANS = {"distance": "dfa_distance"} | {name: f"dfa_{name}" for name in DFA_SHARES}
"""Columns of head_summary that are means of a column of head_attribution, weighted by FVE."""
_MEASURES = ("decoder_share", "fve", "dfa_share")


def _shares() -> str:
    """Every alive feature's row in every head of one SAE, NaN as NULL."""
    columns = [*_MEASURES, *_MEANS.values()]
    clean = ", ".join(f"CASE WHEN NOT isnan(a.{c}) THEN a.{c}::DOUBLE END AS {c}" for c in columns)
    return f"""
    SELECT a.head, f.top_head, {clean}
    FROM head_attribution a JOIN features f USING (sae, feature)
    WHERE a.sae = $sae AND f.sae = $sae AND f.alive"""  # noqa: S608


def _ranks() -> str:
    """Twice the average rank of each measure: the first rank of the rows tied with it, plus the last.

    Only features that have all three measures are ranked, which are all but degenerate ones.
    """
    columns = ", ".join(
        f"rank() OVER by_{measure} + count(*) OVER by_{measure} AS {measure}" for measure in _MEASURES
    )
    windows = ", ".join(f"by_{m} AS (PARTITION BY head ORDER BY {m})" for m in _MEASURES)
    complete = " AND ".join(f"{measure} IS NOT NULL" for measure in _MEASURES)
    return f"SELECT head, {columns} FROM shares WHERE {complete} WINDOW {windows}"  # noqa: S608


def _correlations() -> str:
    """Spearman's rank correlation: Pearson's of the ranks, in whole numbers up to the last division."""
    columns = []
    for name, (one, other) in _CORRELATIONS.items():
        x, y = f"{one}::HUGEINT", f"{other}::HUGEINT"
        covariance = f"(count(*) * sum({x} * {y}) - sum({x}) * sum({y}))::DOUBLE"
        deviations = [f"sqrt((count(*) * sum({v} * {v}) - sum({v}) * sum({v}))::DOUBLE)" for v in (x, y)]
        columns.append(
            f"CASE WHEN count(*) >= {_LEAST} THEN "
            f"{covariance} / nullif({deviations[0]} * {deviations[1]}, 0) END AS {name}"
        )
    return f"SELECT head, {', '.join(columns)} FROM ranks GROUP BY head"  # noqa: S608


def _sums() -> str:
    weight = "greatest(fve, 0)"
    tops = ", ".join(f"list_avg(max({measure}, 10)) AS top10_{measure}" for measure in _MEASURES)
    means = ", ".join(
        f"sum({weight} * {column}) / nullif(sum({weight}) FILTER ({column} IS NOT NULL), 0) AS {name}"
        for name, column in _MEANS.items()
    )
    return f"""
    SELECT head, count(*) AS n_features, count(*) FILTER (top_head = head) AS n_top,
      coalesce(sum(decoder_share) ** 2 / nullif(sum(decoder_share ** 2), 0), 0) AS effective_features,
      max(decoder_share) AS max_decoder_share, {tops}, {means}
    FROM shares GROUP BY head"""  # noqa: S608


def _families() -> str:
    counts = ", ".join(f"count(*) FILTER (family = '{name}') AS n_{name}" for name in FAMILY_NAMES)
    return f"""
    SELECT f.top_head AS head, {counts}
    FROM feature_families m JOIN features f USING (sae, feature)
    WHERE m.sae = $sae AND f.sae = $sae AND f.top_head IS NOT NULL GROUP BY f.top_head"""  # noqa: S608


def _head_summary() -> str:
    """The rows of one z SAE, one per head, whether or not any feature fires."""
    counted = {"n_features", "n_top", "effective_features", *(f"n_{name}" for name in FAMILY_NAMES)}
    columns = [
        f"coalesce({c.name}, 0) AS {c.name}" if c.name in counted else c.name
        for c in TABLES["head_summary"].columns
    ]
    return f"""
    WITH shares AS MATERIALIZED ({_shares()}), ranks AS ({_ranks()}), correlations AS ({_correlations()}),
      sums AS ({_sums()}), members AS ({_families()}),
      heads AS (
        SELECT s.sae, s.model, s.layer, h.head
        FROM saes s, (SELECT DISTINCT head FROM head_attribution WHERE sae = $sae) h WHERE s.sae = $sae)
    SELECT {", ".join(columns)}
    FROM heads LEFT JOIN sums USING (head) LEFT JOIN correlations USING (head)
      LEFT JOIN members USING (head)"""  # noqa: S608


_Z_SAES = "SELECT sae FROM saes WHERE site = 'z' AND head IS NULL ORDER BY sae"


class Derived(NamedTuple):
    """How a table is derived: the query that makes its rows, of one ``$sae`` of those named or of all."""

    rows: str
    saes: str | None = None


DERIVED: dict[str, Derived] = {
    "head_summary": Derived(_head_summary(), _Z_SAES),
    **{name: Derived(rows) for name, rows in INDEXES.items()},
}
"""The derived tables; the columns of ``rows`` come in the declared order."""


def derive(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """Fill the derived table ``name``, empty so far, from the other tables of the release being built."""
    rows, saes = DERIVED[name]
    if saes is None:
        _derive_sorted(connection, name, rows)
    else:
        _derive_each(connection, name, rows, saes)


def _derive_sorted(connection: duckdb.DuckDBPyConnection, name: str, rows: str) -> None:
    """All rows at once. SAEs are sorted by their place among all: names that begin alike sort slowly."""
    key = ", ".join("place" if column == "sae" else column for column in TABLES[name].key)
    columns = ", ".join(TABLES[name].schema.names)
    connection.execute(
        f"INSERT INTO {name} SELECT {columns} FROM ({rows}) JOIN "  # noqa: S608
        f"(SELECT sae, row_number() OVER (ORDER BY sae) AS place FROM saes) USING (sae) ORDER BY {key}"
    )


def _derive_each(connection: duckdb.DuckDBPyConnection, name: str, rows: str, saes: str) -> None:
    """SAE by SAE, so that memory does not grow with their number.

    On one thread: sums of floats depend on their order, and equal content has to give equal rows.
    """
    key = ", ".join(TABLES[name].key)
    ((threads,),) = connection.execute("SELECT current_setting('threads')").fetchall()
    connection.execute("SET threads = 1")
    try:
        connection.execute(f"CREATE TEMP TABLE unsorted AS SELECT * FROM {name} LIMIT 0")  # noqa: S608
        for (sae,) in connection.execute(saes).fetchall():
            connection.execute(f"INSERT INTO unsorted {rows}", {"sae": sae})
        connection.execute(f"INSERT INTO {name} SELECT * FROM unsorted ORDER BY {key}")  # noqa: S608
        connection.execute("DROP TABLE unsorted")
    finally:
        connection.execute(f"SET threads = {int(threads)}")
