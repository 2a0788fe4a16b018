"""Is the service able to work? One check per part that has to answer, each with its reason."""

import os
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kombu import Connection

from atlas.db import schema
from atlas.db.engine import hidden, parse_url, sqlite_file
from atlas.db.workers import list_workers
from atlas.errors import AtlasError
from atlas.logs import redact
from atlas.queue import shown_broker
from atlas.settings import Settings
from atlas.store.lake.lake import lake_of

LEAST_FREE = 1e9
"""Bytes that have to be free on the disk of the home folder."""
SECONDS = 5.0


@dataclass(frozen=True)
class Check:
    """One part of the service."""

    name: str
    ok: bool
    said: str
    """What was found, without secrets."""


def _tried(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except Exception as error:  # noqa: BLE001 (whatever goes wrong in a check is what it has to say)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        own = lines[0] if isinstance(error, AtlasError) else f"{type(error).__name__}: {lines[0]}"
        return Check(name, False, redact(own))


class UnwellError(AtlasError):
    """A part of the service does not work."""


def _database(settings: Settings) -> str:
    file = sqlite_file(parse_url(settings.database_url))
    if file is not None and not file.exists():
        return "SQLite, made when first used"
    return f"{hidden(parse_url(settings.database_url))}, schema {schema.check(settings)}"


def _broker(settings: Settings) -> str:
    with Connection(settings.broker_url, connect_timeout=SECONDS) as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=SECONDS)
    return shown_broker(settings)


def _home(settings: Settings) -> str:
    folder = settings.home
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise UnwellError(f"{str(folder)!r} is not writable")
    free = shutil.disk_usage(there).free
    if free < LEAST_FREE:
        raise UnwellError(
            f"{free / 1e9:.2f} GB are free for {str(folder)!r}; {LEAST_FREE / 1e9:g} GB are needed"
        )
    return f"{folder}, {free / 1e9:.0f} GB free"


def _lake(settings: Settings) -> str:
    """Ask for an object that need not be there."""
    lake = lake_of(settings)
    if lake is None:
        raise UnwellError("no lake is set")
    lake.remote.read("health")
    return lake.remote.shown("")


def _worker(settings: Settings, name: str | None) -> str:
    host = socket.gethostname()
    mine = [w for w in list_workers(settings) if w.host == host and name in (None, w.name.partition("@")[0])]
    alive = [worker.name for worker in mine if worker.alive]
    if not alive:
        known = ", ".join(worker.name for worker in mine) or "none has ever spoken"
        raise UnwellError(f"no worker on {host} has said in the last minute that it lives ({known})")
    return ", ".join(alive)


def _app(port: int) -> str:
    address = f"http://127.0.0.1:{port}/healthz"
    try:
        with urllib.request.urlopen(address, timeout=SECONDS) as answer:
            return f"{address} says {answer.read(80).decode(errors='replace')}"
    except (urllib.error.URLError, OSError) as error:
        raise UnwellError(f"{address} does not answer: {getattr(error, 'reason', error)}") from error


def check_health(
    settings: Settings, *, worker: bool = False, worker_name: str | None = None, app_port: int | None = None
) -> list[Check]:
    """The database, the home folder, broker and lake where set; if asked, a worker here and the app."""
    checks = [_tried("database", lambda: _database(settings)), _tried("home", lambda: _home(settings))]
    if settings.broker_url is not None:
        checks.append(_tried("broker", lambda: _broker(settings)))
    if settings.lake_url is not None:
        checks.append(_tried("lake", lambda: _lake(settings)))
    if worker:
        checks.append(_tried("worker", lambda: _worker(settings, worker_name)))
    if app_port is not None:
        checks.append(_tried("app", lambda: _app(app_port)))
    return checks


def process_check(pid: int) -> Check:
    """Whether a process of this machine is there."""
    there = Path(f"/proc/{pid}").exists() if Path("/proc/self").exists() else _signalled(pid)
    return Check("process", there, f"process {pid} {'runs' if there else 'is gone'}")


def _signalled(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
