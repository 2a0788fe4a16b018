"""Tables and views of a release, or part of their rows, as JSON lines or Parquet; and back."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from atlas.errors import StoreError, one_of
from atlas.interop.dashboards.rows import columns_of
from atlas.interop.dashboards.selection import Part, Wanted
from atlas.progress import Progress
from atlas.store.connection import literal
from atlas.store.export import plain
from atlas.store.indexes import INDEXES
from atlas.store.parquet import conform, read_table, write_table
from atlas.store.views import VIEWS
from atlas.tables import TABLES, Table

KINDS = ("jsonl", "parquet")
BATCH_ROWS = 8192


def write_plain(
    con: duckdb.DuckDBPyConnection,
    parts: Sequence[Part],
    wanted: Wanted,
    tables: Sequence[str],
    folder: Path,
    kind: str,
    progress: Progress,
) -> None:
    """Write ``TABLE.jsonl`` or ``TABLE.parquet`` for each of some tables and views.

    By default they are all tables but those that repeat others' rows in another order (``store/indexes.py``).

    A table with a column ``sae`` gives the rows of the wanted SAEs, one with ``feature`` those of the wanted
    features, one with ``layer`` alone those of the wanted layers. Tables are sorted by their key; views come
    in the order in which the database makes them. Rows are read a few thousand at a time.

    Raises:
        StoreError: a table or view that the release does not have.
    """
    there = columns_of(con)
    views = [view.name for view in VIEWS if view.name in there]
    known = [name for name in TABLES if name in there]
    for name in tables:
        one_of("table", name, [*known, *views], StoreError)
    asked = list(dict.fromkeys(tables)) or [name for name in known if name not in INDEXES]
    folder.mkdir(parents=True, exist_ok=True)
    for done, name in enumerate(asked):
        progress.update(done, len(asked), name)
        where = _where(there[name], parts, wanted)
        schema, batches = _read(con, name, where)
        path = folder / f"{name}.{kind}"
        if kind == "jsonl":
            _write_lines(path, batches)
        elif name in TABLES and set(schema.names) == set(TABLES[name].schema.names):
            write_table(path, name, batches, as_is=True)
        else:
            _write_parquet(path, schema, batches)
    progress.update(len(asked), len(asked))


def _where(columns: frozenset[str], parts: Sequence[Part], wanted: Wanted) -> str:
    """The rows that belong to the part of the release that is wanted."""
    terms = []
    narrowed = wanted != Wanted()
    if "sae" in columns and narrowed:
        terms.append(f"sae IN ({', '.join(literal(part.sae) for part in parts)})")
    if "feature" in columns and wanted.features:
        ranges = (f"feature BETWEEN {r.start} AND {r.stop - 1}" for r in wanted.features)
        terms.append(f"({' OR '.join(ranges)})")
    if {"sae", "feature"} <= columns and wanted.alive:
        terms.append("(sae, feature) IN (SELECT (sae, feature) FROM features WHERE alive)")
    if "layer" in columns and wanted.layers:
        terms.append(f"layer IN ({', '.join(map(str, wanted.layers))})")
    return " AND ".join(terms) or "true"


def _read(
    con: duckdb.DuckDBPyConnection, name: str, where: str
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    reader = con.sql(f"SELECT * FROM {name} WHERE {where}").to_arrow_reader(BATCH_ROWS)  # noqa: S608
    return reader.schema, iter(reader)


def _write_lines(path: Path, batches: Iterator[pa.RecordBatch]) -> None:
    with path.open("w", encoding="utf8") as sink:
        for batch in batches:
            sink.writelines(
                json.dumps(plain(row), ensure_ascii=False, separators=(",", ":")) + "\n"
                for row in batch.to_pylist()
            )


def _write_parquet(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_plain(folder: Path, name: str) -> pa.Table:
    """A table that ``write_plain`` wrote, in its declared types; views in those that the file holds.

    Raises:
        StoreError: the folder has no file of that table, or it is damaged.
    """
    parquet, lines = folder / f"{name}.parquet", folder / f"{name}.jsonl"
    if parquet.is_file():
        return read_table(parquet, name) if name in TABLES else pq.read_table(parquet)
    if not lines.is_file():
        raise StoreError(f"{folder} has neither {parquet.name} nor {lines.name}")
    try:
        with lines.open(encoding="utf8") as file:
            rows = [json.loads(line) for line in file]
        return _typed(rows, TABLES[name]) if name in TABLES else pa.Table.from_pylist(rows)
    except (ValueError, KeyError, TypeError, pa.ArrowException, StoreError) as error:
        raise StoreError(f"cannot read {lines}: {' '.join(str(error).split())[:200]}") from None


def _typed(rows: list[dict], declared: Table) -> pa.Table:
    """Rows in declared types. In JSON, bytes are hexadecimal, and NaN is null."""
    for field in declared.schema:
        if pa.types.is_binary(field.type):
            for row in rows:
                row[field.name] = bytes.fromhex(row[field.name])
        elif pa.types.is_floating(field.type) and not field.nullable:
            for row in rows:
                row[field.name] = math.nan if row[field.name] is None else row[field.name]
    return conform(pa.Table.from_pylist(rows, schema=declared.schema), declared)
