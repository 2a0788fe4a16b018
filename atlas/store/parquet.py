"""Tables as Parquet files: checked against their declaration, sorted, written whole or not at all."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from atlas.errors import StoreError
from atlas.store.atomic import atomic_file
from atlas.store.shorten import shortened
from atlas.tables import Table, table

Batches: TypeAlias = pa.Table | Iterable[pa.Table | pa.RecordBatch]
Key: TypeAlias = tuple[str | int, ...]

_ENDS = "atlas.ends"
"""In a file's metadata: the first and the last key, so that nobody has to read rows for them."""


def conform(batch: pa.Table | pa.RecordBatch, declared: Table) -> pa.Table:
    """The batch in the declared column order and types.

    Raises StoreError for a missing or unknown column, a value that does not fit its type, or a NULL where
    the declaration allows none.
    """
    data = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
    schema = declared.schema
    missing = [c for c in schema.names if c not in data.column_names]
    unknown = [c for c in data.column_names if c not in schema.names]
    if missing or unknown:
        parts = [
            f"{what} {', '.join(names)}" for what, names in (("lacks", missing), ("has", unknown)) if names
        ]
        raise StoreError(
            f"table {declared.name!r} {' and '.join(parts)}; its columns: {', '.join(schema.names)}"
        )
    if len(data.column_names) != len(schema.names):
        raise StoreError(f"table {declared.name!r} has a column twice: {', '.join(data.column_names)}")
    arrays = [_cast(data.column(field.name), field, declared.name) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _cast(values: pa.ChunkedArray, field: pa.Field, name: str) -> pa.ChunkedArray:
    if not field.nullable and values.null_count:
        raise StoreError(f"table {name!r}: column {field.name!r} has {values.null_count} NULL; allowed: none")
    try:
        return values if values.type == field.type else values.cast(field.type)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise StoreError(f"table {name!r}: column {field.name!r} is not {field.type}: {reason}") from None


class KeyOrder:
    """Checks that rows come strictly ascending in a table's key, across any number of batches."""

    def __init__(self, declared: Table) -> None:
        self._name, self._key = declared.name, declared.key
        self._first: Key | None = None
        self._last: pa.Table | None = None
        self._row = 0

    def check(self, batch: pa.Table) -> None:
        """Raise StoreError naming the first row whose key is not above the key before it."""
        keys = batch.select(list(self._key))
        if keys.num_rows == 0:
            return
        joined = keys if self._last is None else pa.concat_tables([self._last, keys])
        ascending = self._ascending(joined)
        if not pc.all(ascending, min_count=0).as_py():
            at = pc.index(ascending, pa.scalar(False)).as_py() + 1
            row = self._row + at - (0 if self._last is None else 1)
            before, here = (joined.slice(i, 1).to_pylist()[0] for i in (at - 1, at))
            raise StoreError(self._complaint(row, before, here))
        self._row += keys.num_rows
        self._first = self._first or _key_of(keys.slice(0, 1))
        self._last = keys.slice(keys.num_rows - 1)

    @property
    def ends(self) -> tuple[Key, Key] | None:
        """The first and the last key; None without rows."""
        if self._first is None or self._last is None:
            return None
        return self._first, _key_of(self._last)

    def _ascending(self, keys: pa.Table) -> pa.ChunkedArray:
        """Per row but the first: is it above the row before it, column by column from the last."""
        result = pa.chunked_array([pa.repeat(pa.scalar(False), keys.num_rows - 1)])
        for column in reversed(self._key):
            values = keys.column(column).combine_chunks()
            before, after = values.slice(0, len(values) - 1), values.slice(1)
            result = pc.or_(pc.less(before, after), pc.and_(pc.equal(before, after), result))
        return result

    def _complaint(self, row: int, before: dict[str, object], here: dict[str, object]) -> str:
        what = "repeats a key" if before == here else "is out of order"
        shown = ", ".join(f"{k}={v!r}" for k, v in here.items())
        return (
            f"table {self._name!r}: row {row} {what} ({shown}); allowed: ascending by {', '.join(self._key)}"
        )


def ends_of(file: pq.ParquetFile, key: Sequence[str]) -> tuple[Key, Key] | None:
    """Keys of the first and the last row of a sorted table; None if it has no rows."""
    noted = (file.metadata.metadata or {}).get(_ENDS.encode())
    if noted is not None:
        ends = json.loads(noted)
        return None if ends is None else (tuple(ends[0]), tuple(ends[1]))
    groups = [i for i in range(file.num_row_groups) if file.metadata.row_group(i).num_rows]
    if not groups:
        return None
    head, tail = (file.read_row_group(i, list(key)).select(list(key)) for i in (groups[0], groups[-1]))
    return _key_of(head.slice(0, 1)), _key_of(tail.slice(tail.num_rows - 1))


def _key_of(row: pa.Table) -> Key:
    return tuple(column[0].as_py() for column in row.columns)


class TableWriter:
    """Takes batches of rows sorted by the table's key, and cuts them into row groups of the declared size."""

    def __init__(self, declared: Table, writer: pq.ParquetWriter, *, as_is: bool = False) -> None:
        self.rows = 0
        self._declared, self._writer, self._as_is = declared, writer, as_is
        self._order = KeyOrder(declared)
        self._held: list[pa.Table] = []
        self._n_held = 0

    def write(self, batch: pa.Table | pa.RecordBatch) -> None:
        """Add rows that come after those already written."""
        checked = conform(batch, self._declared)
        if not self._as_is:
            checked = shortened(checked, self._declared)
        self._order.check(checked)
        self._held.append(checked)
        self._n_held += checked.num_rows
        self.rows += checked.num_rows
        if self._n_held >= self._declared.row_group:
            self._flush(self._declared.row_group)

    def close(self) -> None:
        """Write what is still held, and into the file's metadata the keys at both ends."""
        self._flush(1)
        self._writer.add_key_value_metadata({_ENDS: json.dumps(self._order.ends)})

    def _flush(self, unit: int) -> None:
        """Write what is held in row groups, but keep back a remainder below ``unit`` rows."""
        if not self._n_held:
            return
        joined, size = pa.concat_tables(self._held), self._declared.row_group
        whole = self._n_held - self._n_held % unit
        for start in range(0, whole, size):
            group = joined.slice(start, min(size, whole - start))
            self._writer.write_table(group.combine_chunks(), row_group_size=size)
        self._held, self._n_held = [joined.slice(whole)], self._n_held - whole


def _integers(kind: pa.DataType, path: str) -> list[str]:
    """Parquet's names of the integers in a column.

    >>> _integers(pa.list_(pa.struct([("head", pa.int16()), ("value", pa.float32())])), "sources")
    ['sources.list.element.head']
    """
    if pa.types.is_list(kind):
        return _integers(kind.value_type, f"{path}.list.element")
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return [leaf for f in fields for leaf in _integers(f.type, f"{path}.{f.name}")]
    return [path] if pa.types.is_integer(kind) else []


@contextmanager
def open_table(path: Path, name: str, *, flush: bool = True, as_is: bool = False) -> Iterator[TableWriter]:
    """Write table ``name`` to ``path`` (Parquet, zstd) batch by batch, or not at all; ``flush``: see atomic.

    Numbers are rounded as declared, but for ``as_is``: rows of a release, which may be an older one. Rows
    must come sorted by the table's key and unique in it, across all batches. Raises StoreError for anything
    else, and for a disk that refuses; then no file is left and an old one stays as it was.
    """
    declared = table(name)
    # Dictionaries of numbers that hardly repeat cost half the time of writing, and space.
    texts = [field.name for field in declared.schema if pa.types.is_string(field.type)]
    # Integers are packed before they are compressed: in lists of sources that takes a third less time again.
    packed = {leaf: "DELTA_BINARY_PACKED" for f in declared.schema for leaf in _integers(f.type, f.name)}
    how = {"compression": "zstd", "use_dictionary": texts, "column_encoding": packed}
    with (
        atomic_file(Path(path), flush=flush) as work,
        pq.ParquetWriter(work, declared.schema, **how) as writer,
    ):
        rows = TableWriter(declared, writer, as_is=as_is)
        yield rows
        rows.close()


def write_table(path: Path, name: str, data: Batches, *, flush: bool = True, as_is: bool = False) -> int:
    """Write table ``name`` to ``path`` as ``open_table`` does; return the number of rows."""
    with open_table(path, name, flush=flush, as_is=as_is) as writer:
        for batch in [data] if isinstance(data, pa.Table) else data:
            writer.write(batch)
    return writer.rows


def check_schema(path: Path, declared: Table) -> None:
    """Raise StoreError unless ``path`` is a readable Parquet file with the declared columns and types."""
    try:
        found = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise StoreError(f"cannot read {path} as table {declared.name!r}: {reason}") from None
    wanted = declared.schema
    if found.names != wanted.names or found.types != wanted.types:
        raise StoreError(
            f"{path} holds the columns {', '.join(found.names)}; "
            f"table {declared.name!r} of this version is {', '.join(wanted.names)}"
        )


def read_table(path: Path, name: str) -> pa.Table:
    """Read what write_table wrote; StoreError for a missing, damaged or differently shaped file."""
    declared = table(name)
    check_schema(Path(path), declared)
    try:
        return pq.read_table(path, schema=declared.schema)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise StoreError(f"cannot read {path} as table {name!r}: {reason}") from None
