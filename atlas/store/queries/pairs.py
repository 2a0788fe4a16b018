"""What a release says about heads with SAEs on their queries and their keys; nothing in one without them."""

from typing import Any

import duckdb
import pyarrow as pa

from atlas.errors import one_of
from atlas.store.queries.quality import missing
from atlas.store.queries.rows import arrow
from atlas.tables import TABLES

OF_PAIRS = ("qk_targets", "qk_curves", "qk_prompts", "qk_outcomes", "qk_scans", "qk_feature_pairs")
_ONE_EACH = """
    SELECT top_position AS position, arg_max(feature, (top_position_share, -feature)) AS feature FROM features
    WHERE sae = ? AND n_active >= 10 AND top_position_share >= ? GROUP BY top_position
"""


def pairs(con: duckdb.DuckDBPyConnection, model: str) -> list[dict[str, Any]]:
    """Every pair of a model with its numbers, and how well its pattern is rebuilt on the evaluation text."""
    if missing(con, "qk_heads"):
        return []
    rows: list[dict[str, Any]] = arrow(
        con,
        """
        SELECT h.*, m.pattern_kl, m.pattern_top1, m.score_correlation FROM qk_heads h
        LEFT JOIN sae_metrics m ON m.sae = h.q_sae AND m.split = 'eval'
        WHERE h.model = ? ORDER BY layer, head, q_sae
        """,
        [model],
    ).to_pylist()
    return rows


def of_pair(con: duckdb.DuckDBPyConnection, table: str, q_sae: str, k_sae: str) -> pa.Table:
    """The rows of one pair in a table about pairs, in the order of its key."""
    one_of("table", table, OF_PAIRS)
    key = ", ".join(TABLES[table].key)
    return arrow(
        con,
        f"SELECT * FROM {table} WHERE q_sae = ? AND k_sae = ? ORDER BY {key}",  # noqa: S608
        [q_sae, k_sae],
    )


def by_position(con: duckdb.DuckDBPyConnection, q_sae: str, k_sae: str, least: float) -> pa.Table:
    """Products of query with key features, one feature for each position: the clearest.

    Columns q_position, k_position, q_feature, k_feature, product. ``least`` is the share of a feature's
    strongest tokens that are at its position. Source: seed 000, row A7.
    """
    return arrow(
        con,
        f"""
        WITH q AS ({_ONE_EACH}), k AS ({_ONE_EACH})
        SELECT q.position AS q_position, k.position AS k_position, q.feature AS q_feature,
               k.feature AS k_feature, p.products[k.feature + 1] AS product
        FROM q JOIN qk_products p ON p.sae = ? AND p.other_sae = ? AND p.feature = q.feature CROSS JOIN k
        ORDER BY ALL
        """,  # noqa: S608
        [q_sae, least, k_sae, least, q_sae, k_sae],
    )


def with_positions(con: duckdb.DuckDBPyConnection, sae: str, least: float) -> pa.Table:
    """Products of the features of positions with the positional embeddings, their mean taken out.

    Columns position (the feature's own), feature, embedding (a position), product. Source: row A8.
    """
    return arrow(
        con,
        f"""
        WITH one AS ({_ONE_EACH})
        SELECT position, feature, unnest(range(len(centred))) AS embedding, unnest(centred) AS product
        FROM one JOIN position_products p USING (feature) WHERE p.sae = ? ORDER BY ALL
        """,  # noqa: S608
        [sae, least, sae],
    )
