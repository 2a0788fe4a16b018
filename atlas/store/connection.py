"""Read-only connections to a published release."""

from pathlib import Path

import duckdb

from atlas.errors import StoreError

ALIAS = "atlas"
_NO_SURPRISES = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    # A table that an older release lacks must be missing, not a Python object of the same name.
    "python_enable_replacements": "false",
}


def literal(text: object) -> str:
    """A SQL string literal.

    >>> literal("it's")
    "'it''s'"
    """
    return "'" + str(text).replace("'", "''") + "'"


def open_release(path: Path, *, threads: int | None = None) -> duckdb.DuckDBPyConnection:
    """A connection in memory to which the release is attached read-only; plain table names work.

    For another thread take ``cursor(connection)``. Raises StoreError if the file is missing or is not a
    release of a DuckDB that this version reads.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"release {path} does not exist")
    connection = duckdb.connect(":memory:", config=dict(_NO_SURPRISES))
    try:
        if threads is not None:
            connection.execute(f"SET threads = {int(threads)}")
        connection.execute(f"ATTACH {literal(path)} AS {ALIAS} (READ_ONLY)")
        connection.execute(f"USE {ALIAS}")
        connection.execute("SELECT 1 FROM manifest LIMIT 1").fetchall()
    except duckdb.Error as error:
        connection.close()
        raise StoreError(f"cannot open release {path}: {str(error).splitlines()[0]}") from None
    return connection


def cursor(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """A second connection to the same open release, for use in another thread."""
    other = connection.cursor()
    other.execute(f"USE {ALIAS}")
    return other
