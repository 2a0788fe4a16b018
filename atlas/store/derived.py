"""Tables that the build of a release computes from the others: one row per head, ``head_summary``.

They are part of a release like all tables (checked, digested, in the manifest), but no step makes them and
no parts of them are read, so they can never disagree with the evidence that they sum up.
"""

import duckdb

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
    """Every alive feature's row in every head, NaN as NULL."""
    columns = [*_MEASURES, *_MEANS.values()]
    clean = ", ".join(f"CASE WHEN NOT isnan(a.{c}) THEN a.{c}::DOUBLE END AS {c}" for c in columns)
    return f"""
    SELECT a.sae, a.head, f.top_head, {clean}
    FROM head_attribution a JOIN features f USING (sae, feature)
    WHERE f.alive ORDER BY a.sae, a.feature, a.head"""  # noqa: S608


def _ranks() -> str:
    """Twice the average rank of each measure among the rows that have both, for each pair of measures.

    Twice the average rank of tied rows is their first rank plus their last.
    """
    columns = []
    for name, pair in _CORRELATIONS.items():
        both = " AND ".join(f"{measure} IS NOT NULL" for measure in pair)
        for side, measure in zip("xy", pair, strict=True):
            over = f"OVER (PARTITION BY sae, head, {both} ORDER BY {measure})"
            columns.append(f"CASE WHEN {both} THEN rank() {over} + count(*) {over} END AS {name}_{side}")
    return f"SELECT sae, head, {', '.join(columns)} FROM shares"  # noqa: S608


def _correlations() -> str:
    """Spearman's rank correlation: Pearson's of the ranks, in whole numbers but for the last division."""
    columns = []
    for name in _CORRELATIONS:
        x, y = f"{name}_x::HUGEINT", f"{name}_y::HUGEINT"
        n, both = f"count({x})::HUGEINT", f"sum({x} * {y})"
        squares = [f"({n} * sum({v} * {v}) - sum({v}) * sum({v}))::DOUBLE" for v in (x, y)]
        columns.append(
            f"CASE WHEN {n} >= {_LEAST} THEN ({n} * {both} - sum({x}) * sum({y}))::DOUBLE "
            f"/ nullif(sqrt({squares[0]}) * sqrt({squares[1]}), 0) END AS {name}"
        )
    return f"SELECT sae, head, {', '.join(columns)} FROM ranks GROUP BY sae, head"  # noqa: S608


def _sums() -> str:
    weight = "greatest(fve, 0)"
    tops = ", ".join(f"list_avg(max({measure}, 10)) AS top10_{measure}" for measure in _MEASURES)
    means = ", ".join(
        f"sum({weight} * {column}) / nullif(sum({weight}) FILTER ({column} IS NOT NULL), 0) AS {name}"
        for name, column in _MEANS.items()
    )
    return f"""
    SELECT sae, head, count(*) AS n_features, count(*) FILTER (top_head = head) AS n_top,
      coalesce(sum(decoder_share) ** 2 / nullif(sum(decoder_share ** 2), 0), 0) AS effective_features,
      max(decoder_share) AS max_decoder_share, {tops}, {means}
    FROM shares GROUP BY sae, head"""  # noqa: S608


def _families() -> str:
    counts = ", ".join(f"count(*) FILTER (family = '{name}') AS n_{name}" for name in FAMILY_NAMES)
    return f"""
    SELECT sae, top_head AS head, {counts}
    FROM feature_families JOIN features USING (sae, feature)
    WHERE top_head IS NOT NULL GROUP BY ALL"""  # noqa: S608


def _head_summary() -> str:
    """One row per head of a z SAE of a whole layer, whether or not any feature fires."""
    counted = {"n_features", "n_top", "effective_features", *(f"n_{name}" for name in FAMILY_NAMES)}
    columns = [
        f"coalesce({c.name}, 0) AS {c.name}" if c.name in counted else c.name
        for c in TABLES["head_summary"].columns
    ]
    return f"""
    WITH shares AS MATERIALIZED ({_shares()}), ranks AS ({_ranks()}), correlations AS ({_correlations()}),
      sums AS ({_sums()}), members AS ({_families()}),
      heads AS (
        SELECT DISTINCT a.sae, s.model, s.layer, a.head FROM head_attribution a JOIN saes s USING (sae)
        WHERE s.site = 'z' AND s.head IS NULL)
    SELECT {", ".join(columns)}
    FROM heads LEFT JOIN sums USING (sae, head) LEFT JOIN correlations USING (sae, head)
      LEFT JOIN members USING (sae, head)"""  # noqa: S608


DERIVED: dict[str, str] = {"head_summary": _head_summary()}
"""Each derived table and the query that makes its rows, in the declared order of columns."""


def derive(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """Fill the derived table ``name``, empty so far, from the other tables of the release being built.

    On one thread: sums of floats depend on their order, and equal content has to give equal rows.
    """
    key = ", ".join(TABLES[name].key)
    ((threads,),) = connection.execute("SELECT current_setting('threads')").fetchall()
    connection.execute("SET threads = 1")
    try:
        connection.execute(f"INSERT INTO {name} {DERIVED[name]} ORDER BY {key}")  # noqa: S608
    finally:
        connection.execute(f"SET threads = {int(threads)}")
