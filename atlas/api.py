"""Head Atlas in two lines of Python: a release and people's annotations, asked in SQL.

    from atlas.api import open_atlas
    atlas = open_atlas()
    atlas.sql("SELECT sae, variance_explained FROM sae_summary").to_pandas()

This is the user's own process and nothing is bounded here; SQL of other people belongs in
``atlas.store.sandbox``.
"""

import threading
from types import TracebackType

import duckdb
import pyarrow as pa

from atlas.db.arrow import SCHEMAS, arrow_tables
from atlas.errors import QueryError
from atlas.settings import Settings, load_settings
from atlas.store import published, release
from atlas.store.connection import open_release
from atlas.store.studies import study_tables
from atlas.store.study_tables import STUDY_TABLES
from atlas.store.views import VIEWS
from atlas.tables import TABLES


class Atlas:
    """One open release with the annotations as they are at each query; close it or use ``with``."""

    def __init__(self, info: release.ReleaseInfo, settings: Settings) -> None:
        self.release = info
        self._settings = settings
        self._lock = threading.Lock()
        self._connection = open_release(info.path)
        self._connection.execute("SET python_enable_replacements = false")

    @property
    def tables(self) -> tuple[str, ...]:
        """The names that SQL can use: the release's tables and views, and the annotation tables."""
        return (*TABLES, *(view.name for view in VIEWS), *SCHEMAS, *STUDY_TABLES, "manifest", "provenance")

    def sql(self, text: str) -> pa.Table:
        """The rows of one query as an Arrow table; QueryError with DuckDB's message if it fails."""
        notes = {**arrow_tables(self._settings), **study_tables(self._settings)}
        with self._lock:
            for name, table in notes.items():
                self._connection.register(name, table)
            try:
                return self._rows(text)
            except duckdb.Error as error:
                raise QueryError(str(error).strip()) from None

    def relation(self, text: str) -> duckdb.DuckDBPyRelation:
        """A query, or a table by its name, as a DuckDB relation: nothing is read before it is asked for.

        ``atlas.relation("features").filter("alive").limit(5).df()`` gives pandas, ``.pl()`` polars,
        ``.arrow()`` Arrow. Annotations are as they are now. QueryError if the query does not parse.
        """
        notes = {**arrow_tables(self._settings), **study_tables(self._settings)}
        with self._lock:
            for name, table in notes.items():
                self._connection.register(name, table)
            try:
                found = self._connection.sql(f"FROM {text}" if text in self.tables else text)
            except duckdb.Error as error:
                raise QueryError(str(error).strip()) from None
        if found is None:
            raise QueryError("the statement gives no rows; a query is needed")
        return found

    def _rows(self, text: str) -> pa.Table:
        try:
            relation = self._connection.sql(text)
        except (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException):
            self._connection.execute(text)  # fails in the same way, and its message marks the place
            raise
        return pa.table({}) if relation is None else relation.to_arrow_table()

    def close(self) -> None:
        """Let go of the release's file."""
        self._connection.close()

    def __enter__(self) -> "Atlas":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_atlas(name: str | None = None, settings: Settings | None = None) -> Atlas:
    """Open release ``name`` (or ``NAME@VERSION``), by default the one published last.

    Raises StoreError naming the releases that exist if it is not among them.
    """
    settings = load_settings() if settings is None else settings
    return Atlas(published.current(settings, name), settings)
