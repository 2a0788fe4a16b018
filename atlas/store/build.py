"""Builds the DuckDB file of a release from Parquet parts: sorted tables, comments, views, a manifest."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from atlas.errors import StoreError
from atlas.store.connection import literal, open_release
from atlas.store.derived import DERIVED, derive
from atlas.store.digest import ContentDigest
from atlas.store.packing import (
    exponent_of,
    is_packed,
    packed_rows,
    stored_columns,
    stored_name,
    unpacking_view,
)
from atlas.store.parquet import Key, KeyOrder, conform, ends_of
from atlas.store.view_columns import RECORDS, VIEW_COLUMNS
from atlas.store.views import VIEWS
from atlas.tables import TABLES, Column, Table

_BATCH = 65_536
_MANY_ROWS = 1_000_000
_MEMORY = "2GB"  # beyond it, DuckDB sorts on the disk
_SCALARS = {
    pa.string(): "VARCHAR",
    pa.bool_(): "BOOLEAN",
    pa.int8(): "TINYINT",
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.binary(): "BLOB",
}


def sql_type(kind: pa.DataType) -> str:
    """DuckDB's name of an Arrow type.

    >>> sql_type(pa.list_(pa.struct([("head", pa.int16()), ("x", pa.float32())])))
    'STRUCT("head" SMALLINT, "x" FLOAT)[]'
    """
    if pa.types.is_list(kind):
        return f"{sql_type(kind.value_type)}[]"
    if pa.types.is_struct(kind):
        fields = ", ".join(f'"{field.name}" {sql_type(field.type)}' for field in kind)
        return f"STRUCT({fields})"
    if kind not in _SCALARS:
        raise StoreError(f"type {kind} has no DuckDB type here; allowed: {', '.join(map(str, _SCALARS))}")
    return _SCALARS[kind]


def column_comment(column: Column) -> str:
    """The meaning with its unit, as it is stored in the file and printed by the documentation."""
    return f"{column.said} [{column.unit}]" if column.unit else column.said


def build_file(
    path: Path,
    tables: Mapping[str, Sequence[Path]],
    provenance: Mapping[str, str],
    stamp: Mapping[str, str],
) -> str:
    """Write a new release file at ``path``; return its digest (over tables and provenance, not ``stamp``).

    DuckDB sorts beside ``path`` if the memory does not suffice. Raises StoreError for a key that occurs
    twice, or what the disk or DuckDB refuses.
    """
    try:
        connection = duckdb.connect(str(path))
        try:
            connection.execute("SET enable_progress_bar = false")  # DuckDB draws one where it sees no script
            connection.execute(f"SET memory_limit = '{_MEMORY}'")
            connection.execute(f"SET temp_directory = {literal(path.with_suffix('.tmp'))}")
            _declare(connection)
            manifest = _build_tables(connection, tables)
            digest = release_digest(manifest, provenance)
            _write_manifest(connection, manifest)
            _write_provenance(connection, {**provenance, **stamp, "release_digest": digest})
            connection.execute("CHECKPOINT")
        finally:
            connection.close()
    except duckdb.Error as error:
        raise StoreError(f"cannot build release {path.name}: {str(error).splitlines()[0]}") from error
    return digest


def release_digest(manifest: Sequence[tuple[str, int, str]], provenance: Mapping[str, str]) -> str:
    """SHA-256 over every table's rows and digest and over the provenance; no clock, no path."""
    content = {"tables": sorted(manifest), "provenance": sorted(provenance.items())}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_provenance(path: Path) -> dict[str, str]:
    """The provenance of a release file, with the name, version, date and digest it was published under."""
    connection = open_release(path)
    try:
        return dict(connection.execute("SELECT key, value FROM provenance").fetchall())
    finally:
        connection.close()


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Rows and digest of every table of a release file."""
    connection = open_release(path)
    try:
        found = connection.execute("SELECT table_name, rows, digest FROM manifest").fetchall()
    finally:
        connection.close()
    return {name: (rows, digest) for name, rows, digest in found}


def _declare(connection: duckdb.DuckDBPyConnection) -> None:
    """Every table and view with its comments, empty, in one transaction (each alone would sync the disk)."""
    connection.execute("BEGIN")
    for table in TABLES.values():
        columns = ", ".join(
            f'"{name}" {_stored_type(name, c)}{"" if c.nullable else " NOT NULL"}'
            for name, c in stored_columns(table)
        )
        connection.execute(f"CREATE TABLE {stored_name(table)} ({columns})")
        if is_packed(table):
            connection.execute(unpacking_view(table))
            _describe_packed(connection, table)
        kind = "VIEW" if is_packed(table) else "TABLE"
        _describe(connection, kind, table.name, f"One row per {table.row}", _comments(table.columns))
    for view in VIEWS:
        connection.execute(view.create)
        _describe(connection, "VIEW", view.name, view.meaning, _comments(VIEW_COLUMNS[view.name]))
    for record in RECORDS:
        columns = ", ".join(f"{c.name} {sql_type(c.type)}" for c in record.columns)
        connection.execute(f"CREATE TABLE {record.name} ({columns})")
        _describe(connection, "TABLE", record.name, f"One row per {record.row}", _comments(record.columns))
    connection.execute("COMMIT")


def _comments(columns: Sequence[Column]) -> dict[str, str]:
    return {column.name: column_comment(column) for column in columns}


def _describe(
    connection: duckdb.DuckDBPyConnection, kind: str, name: str, meaning: str, columns: Mapping[str, str]
) -> None:
    connection.execute(f"COMMENT ON {kind} {name} IS {literal(meaning)}")
    for column, said in columns.items():
        connection.execute(f'COMMENT ON COLUMN {name}."{column}" IS {literal(said)}')


def _describe_packed(connection: duckdb.DuckDBPyConnection, table: Table) -> None:
    comments = {}
    for name, column in stored_columns(table):
        comments[name] = column_comment(column)
        if name != column.name:
            comments[name] = f"log2 of one step of {column.name}"
        elif column.bits is not None:
            comments[name] = f"in steps of 2^{exponent_of(column)}: {comments[name]}"
    said = f"How {table.name} is stored: ask {table.name}, which has the numbers of packed lists again"
    _describe(connection, "TABLE", stored_name(table), said, comments)


def _stored_type(name: str, column: Column) -> str:
    if column.bits is None:
        return sql_type(column.type)
    return "SMALLINT[]" if name == column.name else "SMALLINT"


def _build_tables(
    connection: duckdb.DuckDBPyConnection, tables: Mapping[str, Sequence[Path]]
) -> list[tuple[str, int, str]]:
    """Fill every table; name, rows and digest of each. They are read back while later ones are filled."""
    checks: list[Future[tuple[str, int, str]]] = []
    with ThreadPoolExecutor(1) as beside:
        for name, declared in sorted(TABLES.items(), key=lambda item: item[0] in DERIVED):
            _build_table(connection, declared, tables.get(name, ()))
            if _n_rows(connection, declared) >= _MANY_ROWS:
                wait(checks)  # nobody may read meanwhile
                connection.execute("CHECKPOINT")  # what it frees, the tables after this one fill
            checks.append(beside.submit(_verify, connection.cursor(), declared))
        return [check.result() for check in checks]


def _build_table(connection: duckdb.DuckDBPyConnection, declared: Table, parts: Sequence[Path]) -> None:
    if declared.name in DERIVED:
        derive(connection, declared.name)
    elif parts:
        _load(connection, declared, parts)


def _n_rows(connection: duckdb.DuckDBPyConnection, declared: Table) -> int:
    found = connection.execute(f"SELECT count(*) FROM {stored_name(declared)}").fetchone()  # noqa: S608
    return 0 if found is None else int(found[0])


def _load(connection: duckdb.DuckDBPyConnection, declared: Table, parts: Sequence[Path]) -> None:
    """Insert the parts, one after the other where their keys allow it: a sort of all rows costs far more."""
    one_after_another = in_key_order(parts, declared)
    order = "" if one_after_another else "ORDER BY " + ", ".join(f'"{name}"' for name in declared.key)
    files = ", ".join(literal(part) for part in one_after_another or parts)
    rows = packed_rows(declared, f"read_parquet([{files}])")
    connection.execute(f"INSERT INTO {stored_name(declared)} {rows} {order}")


def in_key_order(parts: Sequence[Path], declared: Table) -> list[Path] | None:
    """The parts such that each one's keys lie above those of the part before; None where keys interleave.

    Parts are sorted, so the first and the last row of each tell; empty parts are left out.
    """
    ends = sorted((*found, part) for part in parts if (found := _ends(part, declared)) is not None)
    if any(last >= first for (_, last, _), (first, _, _) in pairwise(ends)):
        return None
    return [part for _, _, part in ends]


def _ends(part: Path, declared: Table) -> tuple[Key, Key] | None:
    """Keys of the first and the last row of a part; None if it has no rows."""
    with pq.ParquetFile(part) as file:
        return ends_of(file, declared.key)


def _verify(connection: duckdb.DuckDBPyConnection, declared: Table) -> tuple[str, int, str]:
    """Read a stored table back and close: is it sorted and unique? Its name, how many rows, which digest."""
    content, order = ContentDigest(declared.lasting), KeyOrder(declared)
    with closing(connection):
        reader = connection.sql(f"SELECT * FROM {declared.name}").to_arrow_reader(_BATCH)  # noqa: S608
        for batch in reader:
            rows = conform(batch, declared)
            order.check(rows)
            content.update(rows)
    return declared.name, content.rows, content.hexdigest()


def _write_manifest(connection: duckdb.DuckDBPyConnection, manifest: Sequence[tuple[str, int, str]]) -> None:
    connection.executemany("INSERT INTO manifest VALUES (?, ?, ?)", [list(row) for row in manifest])


def _write_provenance(connection: duckdb.DuckDBPyConnection, entries: Mapping[str, str]) -> None:
    connection.executemany("INSERT INTO provenance VALUES (?, ?)", [list(e) for e in sorted(entries.items())])
