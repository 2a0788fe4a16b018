"""What a query can name: the columns that a release really has, and the functions of DuckDB."""

from typing import NamedTuple

import duckdb

from atlas.store.packing import is_packed, stored_name
from atlas.tables import TABLES


class Columns(NamedTuple):
    """A table or view of the release with its columns: name and type."""

    name: str
    columns: tuple[tuple[str, str], ...]


class Function(NamedTuple):
    """A function: its name, how it is called, and what it gives."""

    name: str
    call: str
    meaning: str


def columns(con: duckdb.DuckDBPyConnection) -> tuple[Columns, ...]:
    """Tables and views of the release in the order of their names, columns in the order of SELECT *.

    What packed tables are stored in is left out: their views have the same rows, with the numbers.
    """
    packed = [stored_name(table) for table in TABLES.values() if is_packed(table)]
    rows = con.execute(
        "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE NOT internal "
        "AND NOT list_contains(?, table_name) ORDER BY table_name, column_index",
        [packed],
    ).fetchall()
    found: dict[str, list[tuple[str, str]]] = {}
    for table, column, kind in rows:
        found.setdefault(table, []).append((column, kind))
    return tuple(Columns(name, tuple(parts)) for name, parts in found.items())


def functions(con: duckdb.DuckDBPyConnection) -> tuple[Function, ...]:
    """Functions that DuckDB describes, by name: of values, groups, windows; of several forms the longest."""
    rows = con.execute(
        "SELECT function_name, arg_max(parameters, (len(parameters), parameters)), min(description) "
        "FROM duckdb_functions() WHERE function_type IN ('scalar', 'aggregate', 'window') "
        "AND description IS NOT NULL AND regexp_full_match(function_name, '[a-z][a-z0-9_]*') "
        "GROUP BY function_name ORDER BY function_name"
    ).fetchall()
    return tuple(Function(name, f"{name}({', '.join(given or ())})", said) for name, given, said in rows)


def keywords(con: duckdb.DuckDBPyConnection) -> frozenset[str]:
    """Every word with a meaning of its own in DuckDB's SQL, in lower case."""
    return frozenset(word for (word,) in con.execute("SELECT keyword_name FROM duckdb_keywords()").fetchall())
