"""The one way in which queries give back a table."""

from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa


def arrow(
    con: duckdb.DuckDBPyConnection, sql: str, values: Sequence[Any] | Mapping[str, Any] | None = None
) -> pa.Table:
    """The result of one statement as an Arrow table, without a copy of the rows."""
    return con.sql(sql, params=values).to_arrow_table()
