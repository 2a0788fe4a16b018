"""How did the training go? Logs, density histograms and watched features, and where each SAE ended."""

from collections.abc import Sequence

import duckdb
import pyarrow as pa

from atlas.store.queries.quality import present
from atlas.store.queries.rows import arrow
from atlas.tables import TABLES

LOGS = ("training_log", "training_density", "training_watched")


def trained(con: duckdb.DuckDBPyConnection, model: str) -> pa.Table:
    """SAEs of a model that have a training log, with their settings and the last row's step and tokens."""
    return arrow(
        con,
        """
        SELECT s.sae, s.site, s.layer, s.head, s.architecture, s.d_sae, s.k, s.l1_coefficient,
               max(t.step) AS step, max(t.tokens) AS tokens
        FROM saes s JOIN training_log t USING (sae) WHERE s.model = ?
        GROUP BY ALL ORDER BY s.layer, s.site, s.head NULLS FIRST, s.d_sae, s.l1_coefficient, s.k, s.sae
        """,
        [model],
    )


def rows_of(con: duckdb.DuckDBPyConnection, table: str, saes: Sequence[str]) -> pa.Table:
    """The rows of one of the training tables for some SAEs, in its declared order and columns.

    Columns that an older release lacks are NULL; a table that it lacks is empty.
    """
    declared, found_columns = TABLES[table], present(con, table)
    if not found_columns:
        return declared.schema.empty_table()
    columns = ", ".join(
        column.name if column.name in found_columns else f"NULL AS {column.name}"
        for column in declared.columns
    )
    # Releases are stored in the order of the key and DuckDB keeps that of what it reads; a sort costs thrice.
    found = arrow(con, f"SELECT {columns} FROM {table} WHERE list_contains(?, sae)", [list(saes)])  # noqa: S608
    return found.cast(pa.schema([pa.field(field.name, field.type) for field in declared.schema]))


def endings(con: duckdb.DuckDBPyConnection, model: str) -> pa.Table:
    """The last row of every training log, with the median rate of training, one row per SAE."""
    known = present(con, "training_log")
    speed = objective = "NULL::DOUBLE"
    if "tokens_per_second" in known:
        speed = "(SELECT median(tokens_per_second) FROM training_log r WHERE r.sae = t.sae)"
    if "objective_loss" in known:
        objective = "t.objective_loss"
    return arrow(
        con,
        f"""
        SELECT s.layer, s.head, s.site, t.sae, t.step, t.tokens, t.loss, t.mse_loss, t.sparsity_loss,
               t.aux_loss, {objective} AS objective_loss, t.l0, t.variance_explained, t.dead_fraction,
               {speed} AS tokens_per_second
        FROM training_log t JOIN saes s USING (sae) WHERE s.model = ?
        QUALIFY row_number() OVER (PARTITION BY t.sae ORDER BY t.step DESC) = 1
        ORDER BY s.layer, s.head NULLS FIRST, s.site, s.d_sae, s.l1_coefficient, s.k, t.sae
        """,  # noqa: S608
        [model],
    )
