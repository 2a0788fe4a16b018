"""Sessions for reading and for writing: opened, committed or rolled back, closed, in one place."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from atlas.db.engine import engine_for, plain_errors
from atlas.db.schema import ensure_schema
from atlas.settings import Settings


@contextmanager
def reading(settings: Settings) -> Iterator[Session]:
    """A session over one consistent view of the database; nothing is committed."""
    ensure_schema(settings)
    engine = engine_for(settings.database_url)
    with plain_errors(settings.database_url), Session(engine) as session:
        yield session


@contextmanager
def writing(settings: Settings) -> Iterator[Session]:
    """A session in one transaction: committed at the end, rolled back by any exception."""
    ensure_schema(settings)
    engine = engine_for(settings.database_url).execution_options(atlas_writes=True)
    with (
        plain_errors(settings.database_url),
        Session(engine, expire_on_commit=False) as session,
        session.begin(),
    ):
        yield session


def clock(session: Session) -> datetime:
    """Now, in UTC, by the clock that all users of this database share.

    Leases compare times that several machines wrote, so a server's clock counts, never a machine's own.
    """
    if session.get_bind().dialect.name == "postgresql":
        moment = session.scalar(select(func.clock_timestamp()))
        if isinstance(moment, datetime):
            return moment.astimezone(UTC)
    return datetime.now(UTC)
