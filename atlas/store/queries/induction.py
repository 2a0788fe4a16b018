"""What a release says about induction and tasks, head by head; nothing in one made before these tables."""

from typing import Any

import duckdb
import pyarrow as pa

from atlas.store.queries.quality import missing
from atlas.store.queries.rows import arrow
from atlas.tables import TABLES

MEASURED = ("head_prefixes", "head_text_prefixes", "head_corruption")


def has_induction(con: duckdb.DuckDBPyConnection, model: str) -> bool:
    """Whether the heads of a model were measured."""
    return bool(not missing(con, "head_prefixes") and _any(con, "head_prefixes", model))


def has_tasks(con: duckdb.DuckDBPyConnection, model: str) -> bool:
    """Whether the heads of a model were ablated on tasks."""
    return bool(not missing(con, "tasks") and _any(con, "tasks", model))


def _any(con: duckdb.DuckDBPyConnection, table: str, model: str) -> bool:
    return con.execute(f"SELECT 1 FROM {table} WHERE model = ? LIMIT 1", [model]).fetchall() != []  # noqa: S608


def head_induction(con: duckdb.DuckDBPyConnection, model: str) -> pa.Table:
    """The rows of the view ``head_induction``: kinds of head and their evidence, strongest first."""
    return arrow(
        con,
        "SELECT * FROM head_induction WHERE model = ? "
        "ORDER BY kind NULLS LAST, attention_long DESC, layer, head",
        [model],
    )


def of_head(con: duckdb.DuckDBPyConnection, table: str, model: str, layer: int, head: int) -> pa.Table:
    """The rows of one head in a table whose key begins with model, layer and head."""
    key = ", ".join(TABLES[table].key)
    return arrow(
        con,
        f"SELECT * FROM {table} WHERE model = ? AND layer = ? AND head = ? ORDER BY {key}",  # noqa: S608
        [model, layer, head],
    )


def prefix_curves(con: duckdb.DuckDBPyConnection, model: str) -> pa.Table:
    """Attention and direct logit attribution of every head against the length of the repeated stretch."""
    return arrow(con, "SELECT * FROM head_prefixes WHERE model = ? ORDER BY layer, head, prefix", [model])


def tasks(con: duckdb.DuckDBPyConnection, model: str) -> list[dict[str, Any]]:
    """The tasks: template, first prompt, how many, and the loss of the model as it is."""
    rows: list[dict[str, Any]] = arrow(
        con, "SELECT * FROM tasks WHERE model = ? ORDER BY task", [model]
    ).to_pylist()
    return rows


def task_effects(con: duckdb.DuckDBPyConnection, model: str, layer: int | None = None) -> pa.Table:
    """A row per head: layer, head, task, ablation, effect, standard_error; of one layer, or of all."""
    where = "" if layer is None else "AND layer = $layer"
    given = {"model": model} if layer is None else {"model": model, "layer": layer}
    return arrow(
        con,
        f"SELECT layer, head, task, ablation, effect, standard_error FROM head_task_effects "  # noqa: S608
        f"WHERE model = $model {where} ORDER BY layer, head, task, ablation",
        given,
    )
