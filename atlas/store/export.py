"""Query results as text, CSV, JSON and Parquet.

What a format cannot hold is written as text: lists and structs in a CSV cell as JSON, bytes as hexadecimal,
and intervals in Parquet as words. JSON has no NaN or infinity; they become null.
"""

import base64
import datetime
import decimal
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq
from rich.cells import cell_len, set_cell_size

from atlas.store.atomic import atomic_file

_PLAIN = (bool, int, float, str, type(None))


def plain(value: Any) -> Any:
    """A value as JSON can hold it.

    >>> plain({"a": [float("nan"), b"hi", datetime.date(2020, 1, 2)]})
    {'a': [None, '6869', '2020-01-02']}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, bytes):
        return base64.b16encode(value).decode().lower()
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime.date | datetime.datetime | datetime.time):
        return value.isoformat()
    return str(value)


def to_json(table: pa.Table, sink: BinaryIO) -> None:
    """A JSON array of one object per row, one row per line."""
    names = table.column_names
    for index, row in enumerate(_rows(table)):
        line = json.dumps(dict(zip(names, map(plain, row), strict=True)), ensure_ascii=False)
        sink.write(("[\n" if index == 0 else ",\n").encode() + line.encode("utf-8"))
    sink.write(b"\n]\n" if table.num_rows else b"[]\n")


def to_csv(table: pa.Table, sink: BinaryIO) -> None:
    """CSV in UTF-8 with a header; NULL is an empty cell, an empty text is ``""``."""
    columns = [_csv_column(column) for column in table.columns]
    pc_csv.write_csv(pa.table(columns, names=table.column_names), sink)


def to_parquet(table: pa.Table, sink: BinaryIO) -> None:
    """Parquet with zstd; types stay, except for those that Parquet lacks."""
    columns = [
        _as_text(column, str) if pa.types.is_interval(column.type) else column for column in table.columns
    ]
    pq.write_table(pa.table(columns, names=table.column_names), sink, compression="zstd")


WRITERS: dict[str, Callable[[pa.Table, BinaryIO], None]] = {
    "csv": to_csv,
    "json": to_json,
    "parquet": to_parquet,
}


def write_file(table: pa.Table, path: Path, kind: str) -> None:
    """Write ``table`` to ``path`` as csv, json or parquet, whole or not at all; StoreError if it cannot."""
    with atomic_file(Path(path)) as work, work.open("wb") as sink:
        WRITERS[kind](table, sink)


def to_text(table: pa.Table, *, width: int | None = None, cell: int = 48) -> str:
    """A table for the terminal: at most ``cell`` columns per cell, and as many columns as fit in ``width``.

    Control characters are shown as escapes, so that no text of a corpus or a note can act on the terminal.
    """
    columns = [_text_column(table, index, cell) for index in range(table.num_columns)]
    shown: list[list[str]] = []
    used = 0
    for lines in columns:
        used += cell_len(lines[0]) + 2
        if shown and width is not None and used - 2 > width:
            break
        shown.append(lines)
    text = "\n".join("  ".join(parts).rstrip() for parts in zip(*shown, strict=True))
    hidden = len(columns) - len(shown)
    return (
        text if not hidden else f"{text}\n({hidden} more columns: {', '.join(table.column_names[-hidden:])})"
    )


def _rows(table: pa.Table) -> Any:
    return zip(*(column.to_pylist() for column in table.columns), strict=True)


def _as_text(column: pa.ChunkedArray, form: Callable[[Any], str]) -> pa.Array:
    return pa.array([None if v is None else form(v) for v in column.to_pylist()], pa.string())


def _csv_column(column: pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    kind = column.type
    if pa.types.is_nested(kind):
        return _as_text(column, lambda v: json.dumps(plain(v), ensure_ascii=False))
    simple = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if simple or pa.types.is_string(kind):
        return column
    return _as_text(column, lambda v: str(plain(v)))


def _text_column(table: pa.Table, index: int, cell: int) -> list[str]:
    """Header, rule and cells of one column, all equally wide; numbers to the right."""
    column = table.column(index)
    cells = [_cut(_cell(value), cell) for value in column.to_pylist()]
    header = _cut(_visible(table.column_names[index]), cell)
    width = max(map(cell_len, [header, *cells]))
    number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    lines = [header, "-" * width, *cells]
    return [" " * (width - cell_len(line)) + line if number else set_cell_size(line, width) for line in lines]


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        more = ", ..." if len(value) > 12 else ""
        return f"[{', '.join(map(_cell, value[:12]))}{more}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_visible(str(k))}: {_cell(v)}" for k, v in value.items()) + "}"
    return _visible(str(plain(value)))


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"
