"""Bring a database to the schema of this version, or say plainly that it is not there.

An embedded SQLite file is made and upgraded when it is first used. A PostgreSQL server is shared by many
machines, so it changes only when somebody says ``atlas db upgrade``.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, inspect, text

import atlas
from atlas.db import lock_models as _lock_models  # noqa: F401 (adds its table to the metadata)
from atlas.db import log_models as _log_models  # noqa: F401 (adds its table to the metadata)
from atlas.db import review_models as _review_models  # noqa: F401 (adds its tables to the metadata)
from atlas.db import saved_models as _saved_models  # noqa: F401 (adds its table to the metadata)
from atlas.db import worker_models as _worker_models  # noqa: F401 (adds its table to the metadata)
from atlas.db.engine import engine_for, forget_engine, hidden, parse_url, plain_errors, sqlite_file
from atlas.db.models import Base
from atlas.errors import DatabaseError
from atlas.settings import Settings

MIGRATIONS = Path(atlas.__file__).parent.parent / "migrations"
_UPGRADE_LOCK = 0x41746C6173  # "Atlas"; any number that nobody else locks
_READY: set[str] = set()
_READY_LOCK = threading.Lock()


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def newest_revision() -> str:
    """The revision that this version of Head Atlas works with."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    if revision is None:
        raise DatabaseError(f"no migration lies in {MIGRATIONS}; the installation is incomplete")
    return revision


def _make_folder(settings: Settings) -> None:
    file = sqlite_file(parse_url(settings.database_url))
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseError(f"database folder {file.parent} cannot be made: {error.strerror}") from error


@contextmanager
def _migrating(settings: Settings) -> Iterator[Connection]:
    """One transaction that nobody else can migrate beside."""
    _make_folder(settings)
    engine = engine_for(settings.database_url)
    with plain_errors(settings.database_url), engine.connect() as connection:
        connection = connection.execution_options(atlas_writes=True)
        with connection.begin():
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
            yield connection


def current_revision(settings: Settings) -> str | None:
    """The revision a database is at; None for one without tables or a SQLite file not made yet."""
    file = sqlite_file(parse_url(settings.database_url))
    if file is not None and not file.exists():
        return None
    with plain_errors(settings.database_url), engine_for(settings.database_url).connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def _known(revision: str | None) -> bool:
    script = ScriptDirectory.from_config(_config())
    return revision is None or revision in {s.revision for s in script.walk_revisions()}


def _refuse_unknown(settings: Settings, revision: str | None) -> None:
    if not _known(revision):
        where = hidden(parse_url(settings.database_url))
        raise DatabaseError(
            f"database {where} is at schema {revision!r}, which this version does not know; "
            f"it knows up to {newest_revision()!r}: upgrade Head Atlas"
        )


def upgrade(settings: Settings, revision: str = "head") -> str:
    """Migrate forward and return the revision reached; safe when several processes do it at once."""
    _refuse_unknown(settings, current_revision(settings))
    with _migrating(settings) as connection:
        _alembic_upgrade(connection, revision)
    return current_revision(settings) or ""


def _alembic_upgrade(connection: Connection, revision: str) -> None:
    try:
        command.upgrade(_config(connection), revision)
    except CommandError as error:
        raise DatabaseError(f"schema {revision!r} cannot be reached: {error}") from error


def downgrade(settings: Settings, revision: str) -> str:
    """Migrate back to a revision (``base`` for none); tables that it did not have are dropped."""
    _refuse_unknown(settings, current_revision(settings))
    with _READY_LOCK:
        _READY.discard(settings.database_url)
    with _migrating(settings) as connection:
        try:
            command.downgrade(_config(connection), revision)
        except CommandError as error:
            raise DatabaseError(f"schema {revision!r} cannot be reached: {error}") from error
    return current_revision(settings) or "base"


def differences(settings: Settings) -> list[str]:
    """How the migrated database differs from the declared models; empty when it does not."""
    with plain_errors(settings.database_url), engine_for(settings.database_url).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return [str(difference) for difference in compare_metadata(context, Base.metadata)]


def check(settings: Settings) -> str:
    """Return the revision when the database is at this version's; DatabaseError says what to do if not."""
    current, newest = current_revision(settings), newest_revision()
    if current != newest:
        _refuse_unknown(settings, current)
        where = hidden(parse_url(settings.database_url))
        raise DatabaseError(
            f"database {where} is at schema {current or 'none'!r}, this version needs {newest!r}; "
            "run: atlas db upgrade"
        )
    return newest


def ensure_schema(settings: Settings) -> None:
    """Make sure the database can be used: an embedded one is upgraded, a server must already be.

    Cheap to call before every use: a URL found ready is remembered by the process.
    """
    file = sqlite_file(parse_url(settings.database_url))
    with _READY_LOCK:
        if settings.database_url in _READY and (file is None or file.exists()):
            return
        if file is None:
            check(settings)
        elif not file.exists():
            forget_engine(settings.database_url)
            upgrade(settings)
        elif current_revision(settings) != newest_revision():
            upgrade(settings)
        _READY.add(settings.database_url)


def exists(settings: Settings) -> bool:
    """Whether the database has its tables; asks without creating anything."""
    file = sqlite_file(parse_url(settings.database_url))
    if file is not None and not file.exists():
        return False
    with plain_errors(settings.database_url), engine_for(settings.database_url).connect() as connection:
        return inspect(connection).has_table("annotation_history")
