"""Is a release what it says it is? Re-checks the invariants of a published release and names what is broken.

Two things are read: the content of every table, for its digest, its number of rows and the order of its key
as the manifest has them; and the answers to ``atlas.store.checks.CHECKS``, each a query for rows that must
not exist. Memory is bounded: content is read in batches, DuckDB sorts and joins on the disk beyond 2 GB.
"""

import tempfile
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import duckdb

from atlas.errors import StoreError, one_of
from atlas.store.build import read_manifest
from atlas.store.checks import CHECKS
from atlas.store.checks.check import Check
from atlas.store.connection import cursor, literal, open_release
from atlas.store.digest import ContentDigest
from atlas.store.parquet import KeyOrder, conform
from atlas.tables import TABLES, Table

_BATCH = 65_536
_MEMORY = "2GB"
_READERS = 2


@dataclass(frozen=True)
class Finding:
    """The result of one check: rows of the table that were looked at, and how many broke it."""

    name: str
    meaning: str
    looked_at: int
    offending: int
    first: str = ""
    """The key of the first offending row, and what was found there."""

    @property
    def ok(self) -> bool:
        """Whether nothing broke it."""
        return self.offending == 0


def names() -> tuple[str, ...]:
    """Every check by name: first the contents of the tables, then the invariants."""
    return (*(f"{name}.content" for name in TABLES), *CHECKS)


def verify(path: Path, *, contents: bool = True, only: Collection[str] = ()) -> Iterator[Finding]:
    """Check a release file, finding by finding; whole contents only with ``contents``, or some checks only.

    Raises StoreError if the file is no release, or one of a version whose tables differ from this one's, or
    for a check that does not exist.
    """
    for name in only:
        one_of("check", name, names(), StoreError)
    manifest = read_manifest(path)
    connection = open_release(path)
    try:
        with tempfile.TemporaryDirectory(prefix="atlas-verify-") as scratch:
            connection.execute(f"SET memory_limit = '{_MEMORY}'")
            connection.execute(f"SET temp_directory = {literal(scratch)}")
            _same_tables(connection, manifest)
            wanted = only or names()
            if contents:
                tables = [TABLES[name.removesuffix(".content")] for name in wanted if name not in CHECKS]
                yield from _contents(connection, tables, manifest)
            yield from (run_check(connection, CHECKS[name]) for name in wanted if name in CHECKS)
    except duckdb.Error as error:
        raise StoreError(f"cannot verify {path}: {str(error).splitlines()[0]}") from None
    finally:
        connection.close()


def _same_tables(connection: duckdb.DuckDBPyConnection, manifest: Collection[str]) -> None:
    """Raise StoreError unless the file has the tables and columns of this version."""
    for name, declared in TABLES.items():
        if name not in manifest:
            raise StoreError(f"the release has no table {name!r}; it is of another version of atlas")
        found = [row[0] for row in connection.execute(f"DESCRIBE {name}").fetchall()]
        if found != declared.schema.names:
            wanted = ", ".join(declared.schema.names)
            raise StoreError(f"table {name!r} has the columns {', '.join(found)}; of this version: {wanted}")


def _contents(
    connection: duckdb.DuckDBPyConnection, tables: list[Table], manifest: Mapping[str, tuple[int, str]]
) -> Iterator[Finding]:
    """Tables two at a time: one thread's digest leaves the other time to read."""
    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(lambda one: check_content(cursor(connection), one, manifest[one.name]), tables)


def check_content(
    connection: duckdb.DuckDBPyConnection, declared: Table, manifest: tuple[int, str]
) -> Finding:
    """Rows, digest and order of one table against the manifest's (rows, digest)."""
    content, order = ContentDigest(declared.lasting), KeyOrder(declared)
    wanted, digest = manifest
    broken: list[str] = []
    reader = connection.sql(f"SELECT * FROM {declared.name}").to_arrow_reader(_BATCH)  # noqa: S608
    for batch in reader:
        rows = conform(batch, declared)
        content.update(rows)
        if not broken:
            try:
                order.check(rows)
            except StoreError as error:
                broken.append(str(error))
    if content.rows != wanted:
        broken.append(f"{content.rows:,} rows where the manifest has {wanted:,}")
    elif content.hexdigest() != digest:
        broken.append(f"digest {content.hexdigest()[:12]}... where the manifest has {digest[:12]}...")
    meaning = f"ascending by {', '.join(declared.key)}; rows and digest are the manifest's"
    return Finding(f"{declared.name}.content", meaning, content.rows, len(broken), "; ".join(broken))


def run_check(connection: duckdb.DuckDBPyConnection, check: Check) -> Finding:
    """Run one check: how many rows break it, and the first of them by key."""
    key = ", ".join(f'"{column}" := "{column}"' for column in check.key)
    query = (
        f"WITH broken AS ({check.query}), keyed AS (SELECT struct_pack({key}) AS place, found FROM broken) "  # noqa: S608
        "SELECT count(*), min(place), arg_min(found::VARCHAR, place) FROM keyed"
    )
    ((looked_at,),) = connection.execute(f"SELECT count(*) FROM {check.table}").fetchall()  # noqa: S608
    offending, first = 0, ""
    for parameters in _parameters(connection, check):
        ((n, place, found),) = connection.execute(query, parameters).fetchall()
        if n and not first:
            first = ", ".join(f"{name}={value!r}" for name, value in place.items()) + f": found {found}"
        offending += n
    return Finding(check.name, check.meaning, looked_at, offending, first)


def _parameters(connection: duckdb.DuckDBPyConnection, check: Check) -> list[dict[str, str]]:
    if not check.by_sae:
        return [{}]
    saes = connection.execute("SELECT sae FROM saes ORDER BY sae").fetchall()
    return [{"sae": sae} for (sae,) in saes]
