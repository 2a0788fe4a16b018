"""Lists of numbers that lie in a release's file as small integers, and the views that give them back.

Where a table declares a column to ``bits`` (``atlas.tables``), each of its lists holds whole multiples of a
power of two (``atlas.store.shorten``). They are stored in a table ``NAME_packed``, as the multiples and the
row's exponent, in two thirds of the space; the table's own name is a view that multiplies them again, to the
bit. What a view is not asked for, DuckDB does not read.
"""

from collections.abc import Callable, Iterator

from atlas.tables import Column, Table


def is_packed(table: Table) -> bool:
    """Whether a table's own name is a view."""
    return any(column.bits is not None for column in table.columns)


def stored_name(table: Table) -> str:
    """The table that holds the rows.

    >>> from atlas.tables import TABLES
    >>> stored_name(TABLES["dfa"]), stored_name(TABLES["docs"])
    ('dfa_packed', 'docs')
    """
    return f"{table.name}_packed" if is_packed(table) else table.name


def exponent_of(column: Column) -> str:
    """The stored column that says what one step of a packed column is."""
    return f"{column.name}_exponent"


def stored_columns(table: Table) -> Iterator[tuple[str, Column]]:
    """Stored columns by name, each with the declared column that it is, or is a part of."""
    for column in table.columns:
        yield column.name, column
        if column.bits is not None:
            yield exponent_of(column), column


def packed_rows(table: Table, source: str) -> str:
    """The query for the stored columns of declared rows that ``source`` gives."""
    return _scaled(table, _packed, lambda column: _steps_in_one(column.name, column.bits or 0), source)


def _packed(column: Column) -> str:
    if column.bits is None:
        return f'"{column.name}"'
    steps = f'list_transform("{column.name}", lambda x: (x * {_scale(column)})::SMALLINT)'
    return f"{steps}, (-log2({_scale(column)}))::SMALLINT"


def _steps_in_one(name: str, bits: int) -> str:
    """How many steps are 1, a power of two."""
    largest = f'greatest(list_max("{name}"), -list_min("{name}"))'
    return f"pow(2::DOUBLE, CASE WHEN {largest} > 0 THEN {bits - 1} - floor(log2({largest})) ELSE 0 END)"


def unpacking_view(table: Table) -> str:
    """The statement that makes the view with the table's own name and columns."""
    rows = _scaled(table, _unpacked, lambda c: f"pow(2::DOUBLE, {exponent_of(c)})", stored_name(table))
    return f"CREATE VIEW {table.name} AS {rows}"


def _unpacked(column: Column) -> str:
    if column.bits is None:
        return f'"{column.name}"'
    return f'list_transform("{column.name}", lambda x: (x * {_scale(column)})::FLOAT) AS "{column.name}"'


def _scaled(table: Table, given: Callable[[Column], str], scale: Callable[[Column], str], source: str) -> str:
    """The query for each column as ``given`` says, beside the scales of those that are packed."""
    columns = ", ".join(given(column) for column in table.columns)
    scales = "".join(f", {scale(c)} AS {_scale(c)}" for c in table.columns if c.bits is not None)
    return f"SELECT {columns} FROM (SELECT *{scales} FROM {source})"  # noqa: S608


def _scale(column: Column) -> str:
    """What numbers are multiplied by, worked out once for a row and not for each of them."""
    return f"{column.name}_scale"
