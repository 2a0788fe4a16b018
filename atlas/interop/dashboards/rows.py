"""Rows of a release for a few features of one SAE, and numbers as other programs' JSON holds them."""

from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from atlas.errors import StoreError
from atlas.store.queries.rows import arrow


class Runs:
    """Rows sorted by feature, of which those of one feature are taken at a time."""

    def __init__(self, rows: pa.Table) -> None:
        self._rows = rows.combine_chunks()
        self._feature = rows["feature"].to_numpy()

    def of(self, feature: int) -> pa.Table:
        """The rows of one feature."""
        low, high = np.searchsorted(self._feature, [feature, feature + 1])
        return self._rows.slice(low, high - low)

    def columns(self, feature: int) -> dict[str, list[Any]]:
        """The rows of one feature as lists."""
        found: dict[str, list[Any]] = self.of(feature).to_pydict()
        return found

    def all(self, column: str) -> npt.NDArray[np.int64]:
        """A column of whole numbers, of all rows."""
        return self._rows[column].to_numpy().astype(np.int64)


def columns_of(con: duckdb.DuckDBPyConnection) -> dict[str, frozenset[str]]:
    """The columns of every table of the release."""
    found = con.execute("SELECT table_name, list(column_name) FROM duckdb_columns() GROUP BY 1").fetchall()
    return {table: frozenset(names) for table, names in found}


def rows_of(
    con: duckdb.DuckDBPyConnection,
    there: Mapping[str, frozenset[str]],
    table: str,
    columns: Sequence[str],
    sae: str,
    features: npt.NDArray[np.int64],
    more: str = "",
    order: str = "",
) -> Runs:
    """Some columns of a table for some features (ascending) of one SAE, by feature and then by ``order``.

    ``there`` is what the release has, ``more`` narrows the rows in SQL. A table that the release lacks has
    no rows; StoreError for a column that it lacks.
    """
    names = ["feature", *columns]
    if table not in there:
        return Runs(pa.table({name: pa.array([], pa.int32()) for name in names}))
    if not there[table].issuperset(names):
        raise StoreError(
            f"table {table!r} of this release lacks a column of {', '.join(names)}; "
            "it was made by an older version: build it again"
        )
    sql = f"""
        SELECT {", ".join(names)} FROM {table}
        WHERE sae = $sae AND feature BETWEEN $low AND $high
        AND feature IN (SELECT unnest($features::INTEGER[])) {more}
        ORDER BY {", ".join(["feature", *([order] if order else [])])}
    """  # noqa: S608
    values = {"sae": sae, "low": int(features[0]), "high": int(features[-1]), "features": features.tolist()}
    return Runs(arrow(con, sql, values))


def short(values: Any) -> list[float]:
    """Numbers with as few digits as tell them apart in float32, which is what the tables hold.

    >>> short(np.array([0.1, 3.0], np.float32))
    [0.1, 3.0]
    """
    return [float(str(value)) for value in np.asarray(values, np.float32)]


def one_short(value: float) -> float:
    """One number in the same way.

    >>> one_short(0.10000000149011612)
    0.1
    """
    return float(str(np.float32(value)))


def block_tokens(
    con: duckdb.DuckDBPyConnection, blocks: npt.NDArray[np.int64]
) -> dict[int, tuple[list[int], str]]:
    """Token ids and source of some blocks; StoreError if the release lacks one of them."""
    wanted = np.unique(blocks).tolist()
    sql = "SELECT block, tokens, source FROM docs WHERE block IN (SELECT unnest($1::INTEGER[]))"
    rows = arrow(con, sql, [wanted]).combine_chunks()
    lengths = pc.list_value_length(rows["tokens"]).to_numpy()
    # By way of numpy, which makes lists of numbers some ten times as fast as Arrow does.
    tokens = np.split(pc.list_flatten(rows["tokens"]).to_numpy(), lengths.cumsum()[:-1])
    each = zip(rows["block"].to_pylist(), tokens, rows["source"].to_pylist(), strict=False)
    found = {block: (ids.tolist(), source) for block, ids, source in each}
    lost = [block for block in wanted if block not in found]
    if lost:
        raise StoreError(f"the release lacks the text of block {lost[0]}, which an example is in")
    return found


def token_strings(con: duckdb.DuckDBPyConnection, model: str) -> list[str]:
    """Every token of a model as text with real spaces; bytes that are no UTF-8 become U+FFFD.

    Ids that the release leaves out read ``<id>``.
    """
    rows = con.execute("SELECT token, bytes FROM vocab WHERE model = ? ORDER BY token", [model]).fetchall()
    texts = [f"<{i}>" for i in range(rows[-1][0] + 1 if rows else 0)]
    for token, raw in rows:
        texts[token] = raw.decode("utf8", "replace")
    return texts
