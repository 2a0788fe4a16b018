"""Locks between machines: a row in the database that runs out unless its holder renews it.

A file's lock keeps processes of one machine apart; where machines share nothing but a database and an object
store, these do. A holder that was cut off for longer than a lock lasts may find somebody else at the same
work: what both of them write must be the same, or written conditionally.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from sqlalchemy import CursorResult, delete, update
from sqlalchemy.exc import IntegrityError

from atlas.db.lock_models import NamedLock
from atlas.db.owner import is_dead, new_owner
from atlas.db.session import clock, writing
from atlas.errors import ConflictError, DatabaseError
from atlas.settings import Settings

log = logging.getLogger("atlas.db")

LOCK_SECONDS = 60.0


def take_lock(settings: Settings, name: str, owner: str, *, seconds: float = LOCK_SECONDS) -> None:
    """Take or renew a lock.

    ``owner`` comes from :func:`atlas.db.owner.new_owner`. Raises ConflictError naming who holds it, if that
    is somebody else whose time has not run out and whose process is not known to be gone.
    """
    try:
        with writing(settings) as session:
            now = clock(session)
            held = session.get(NamedLock, name, with_for_update=True, populate_existing=True)
            if held is None:
                session.add(NamedLock(name=name, owner=owner, until=now + timedelta(seconds=seconds)))
                session.flush()
            elif held.owner == owner or held.until < now or is_dead(held.owner):
                held.owner, held.until = owner, now + timedelta(seconds=seconds)
            else:
                raise ConflictError(f"{name} is held by {held.owner} until {held.until:%H:%M:%S} UTC")
    except IntegrityError:  # two asked for a new lock in one moment, and the other one has it
        raise ConflictError(f"{name} was just taken by another process") from None


def renew_lock(settings: Settings, name: str, owner: str, *, seconds: float = LOCK_SECONDS) -> bool:
    """Hold a lock for longer; False if it is somebody else's by now."""
    with writing(settings) as session:
        until = clock(session) + timedelta(seconds=seconds)
        mine = (NamedLock.name == name, NamedLock.owner == owner)
        return _rows(session.execute(update(NamedLock).where(*mine).values(until=until))) == 1


def drop_lock(settings: Settings, name: str, owner: str) -> None:
    """Give a lock back; nothing if it is somebody else's by now."""
    with writing(settings) as session:
        session.execute(delete(NamedLock).where(NamedLock.name == name, NamedLock.owner == owner))


def _rows(result: Any) -> int:
    return result.rowcount if isinstance(result, CursorResult) else 0


@contextmanager
def locked(settings: Settings, name: str, *, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold a lock while the block runs; a thread renews it.

    Raises ConflictError if somebody else holds it. When it is lost on the way (the database did not answer
    for as long as a lock lasts), the block goes on with a warning.
    """
    owner, stop = new_owner(), threading.Event()
    take_lock(settings, name, owner, seconds=seconds)

    def renew() -> None:
        while not stop.wait(seconds / 3):
            try:
                if not renew_lock(settings, name, owner, seconds=seconds):
                    log.warning("the lock of %s was lost to another process", name)
                    return
            except DatabaseError as error:
                log.warning("the lock of %s was not renewed: %s", name, error)

    thread = threading.Thread(target=renew, name=f"lock {name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with suppress(DatabaseError):  # then it runs out
            drop_lock(settings, name, owner)
