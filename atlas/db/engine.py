"""One engine per database URL, shared by all threads of a process and by no two processes.

SQLite runs in WAL mode with foreign keys on and a busy time-out. A writing transaction begins with
``BEGIN IMMEDIATE``: one that read first and wrote later would fail at once, without waiting, when somebody
else wrote in between (https://www.sqlite.org/lang_transaction.html).
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from atlas.errors import ConfigError, DatabaseError

BUSY_SECONDS = 30
ALLOWED = "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"


class UnreachableError(DatabaseError):
    """The database did not answer; the same call may succeed later."""


def parse_url(database_url: str) -> URL:
    """The URL in parts; ConfigError when it is no SQLite file and no PostgreSQL database.

    >>> parse_url("sqlite:////data/atlas.sqlite").database
    '/data/atlas.sqlite'
    >>> parse_url("mysql://me:secret@host/atlas")
    Traceback (most recent call last):
    ...
    atlas.errors.ConfigError: database 'mysql://me:***@host/atlas' cannot be used; allowed: \
sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME
    """
    try:
        url = make_url(database_url)
    except ArgumentError:
        # The text may hold a password in a place that cannot be told, so it is not repeated.
        raise ConfigError(f"ATLAS_DATABASE_URL cannot be read; allowed: {ALLOWED}") from None
    in_memory = url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:")
    if url.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg") or in_memory:
        raise ConfigError(f"database {hidden(url)!r} cannot be used; allowed: {ALLOWED}")
    return url


def hidden(url: URL) -> str:
    """The URL as it may be shown: without its password."""
    return url.render_as_string(hide_password=True)


def sqlite_file(url: URL) -> Path | None:
    """The file of an embedded database; None for a server."""
    return Path(str(url.database)) if url.get_backend_name() == "sqlite" else None


def _prepare_sqlite(dbapi_connection: Any, _record: object) -> None:
    dbapi_connection.isolation_level = None
    cursor = dbapi_connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")
    _use_wal(cursor)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _use_wal(cursor: Any) -> None:
    """Switch the file to WAL. Where two do so to a new file at once, SQLite does not wait but fails."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("atlas_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _make_engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS}, pool_timeout=BUSY_SECONDS)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    return create_engine(url, pool_pre_ping=True, pool_recycle=1800, connect_args={"connect_timeout": 10})


class _Engines:
    """The engines of this process. A forked child starts with none: sockets cannot be shared."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_url: dict[str, Engine] = {}

    def forget(self) -> None:
        for engine in self.by_url.values():
            engine.dispose(close=False)
        self.lock = threading.Lock()
        self.by_url = {}


_ENGINES = _Engines()
os.register_at_fork(after_in_child=_ENGINES.forget)


def engine_for(database_url: str) -> Engine:
    """The engine for a URL, made once per process; ConfigError for a URL that cannot be used."""
    with _ENGINES.lock:
        engine = _ENGINES.by_url.get(database_url)
        if engine is None:
            engine = _make_engine(parse_url(database_url))
            _ENGINES.by_url[database_url] = engine
    return engine


def forget_engine(database_url: str) -> None:
    """Close a URL's connections: a file that was removed lives on under those that have it open."""
    with _ENGINES.lock:
        engine = _ENGINES.by_url.pop(database_url, None)
    if engine is not None:
        engine.dispose()


def close_engines() -> None:
    """Close every pooled connection of this process, so that files and servers may go away."""
    with _ENGINES.lock:
        for engine in _ENGINES.by_url.values():
            engine.dispose()
        _ENGINES.by_url = {}


@contextmanager
def plain_errors(database_url: str) -> Iterator[None]:
    """Turn a driver's error into one line of ours; IntegrityError passes, its callers know what it means."""
    try:
        yield
    except IntegrityError:
        raise
    except (DBAPIError, PoolTimeout) as error:
        kind = UnreachableError if _may_pass(error) else DatabaseError
        raise kind(_one_line(database_url, error)) from error


def _may_pass(error: DBAPIError | PoolTimeout) -> bool:
    """Whether a server was away or a lock was held; SQLite also calls a full disk operational."""
    cause = getattr(error, "orig", None)
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    return isinstance(error, OperationalError | PoolTimeout)


def _one_line(database_url: str, error: Exception) -> str:
    cause = getattr(error, "orig", None) or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return f"database {hidden(parse_url(database_url))}: {lines[0]}"
