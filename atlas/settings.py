"""What belongs to the machine and not to an experiment: folders, URLs, device, bounds.

Everything is read from ``ATLAS_*`` environment variables when asked for, so that one code path serves a
laptop (no variable set) and a cluster (a broker and a PostgreSQL URL set).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from atlas.errors import ConfigError, one_of


@dataclass(frozen=True)
class Settings:
    """One machine's settings, each with the variable that sets it."""

    home: Path
    """``ATLAS_HOME``: corpora, runs, releases and the SQLite database live here."""
    database_url: str
    """``ATLAS_DATABASE_URL``: SQLAlchemy URL of the run and annotation database."""
    broker_url: str | None
    """``ATLAS_BROKER_URL``: Celery broker; without it everything runs in process."""
    device: str
    """``ATLAS_DEVICE``: cpu, cuda, cuda:1, ... or auto."""
    threads: int | None
    """``ATLAS_THREADS``: torch threads; unset leaves torch's own choice."""
    query_seconds: float
    """``ATLAS_QUERY_SECONDS``: how long a user's SQL may run."""
    query_memory: str
    """``ATLAS_QUERY_MEMORY``: memory bound of a user's SQL, such as 1GB."""
    query_rows: int
    """``ATLAS_QUERY_ROWS``: most rows that a user's SQL returns."""
    annotator: str
    """``ATLAS_ANNOTATOR``: the name that annotations are written under."""
    log_level: str
    """``ATLAS_LOG_LEVEL``: DEBUG, INFO, WARNING or ERROR."""

    @property
    def releases(self) -> Path:
        """Where published releases lie."""
        return self.home / "releases"

    @property
    def steps(self) -> Path:
        """Where the content-addressed outputs of build steps lie."""
        return self.home / "steps"

    @property
    def saes(self) -> Path:
        """Where imported SAEs lie."""
        return self.home / "saes"


def default_home(environ: Mapping[str, str]) -> Path:
    """``$XDG_DATA_HOME/head-atlas``, or ``~/.local/share/head-atlas``."""
    base = environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "head-atlas"


def _number(environ: Mapping[str, str], key: str, default: float, low: float) -> float:
    text = environ.get(key)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{key}={text!r} is not a number; allowed: {low:g} or more") from None
    if not value >= low:
        raise ConfigError(f"{key}={text!r} is too small; allowed: {low:g} or more")
    return value


def _whole(environ: Mapping[str, str], key: str, default: int, low: int) -> int:
    value = _number(environ, key, default, low)
    if value > 10**9 or value != int(value):
        raise ConfigError(f"{key}={environ[key]!r} is not a whole number from {low} to {10**9}")
    return int(value)


def _home(environ: Mapping[str, str]) -> Path:
    try:
        return Path(environ.get("ATLAS_HOME") or default_home(environ)).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"ATLAS_HOME={environ.get('ATLAS_HOME')!r} cannot be used: {error}") from None


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings; ConfigError names a variable whose value is not allowed.

    >>> load_settings({"ATLAS_HOME": "/data/atlas"}).database_url
    'sqlite:////data/atlas/atlas.sqlite'
    >>> load_settings({"ATLAS_QUERY_SECONDS": "soon"})
    Traceback (most recent call last):
    ...
    atlas.errors.ConfigError: ATLAS_QUERY_SECONDS='soon' is not a number; allowed: 0.01 or more
    """
    env = os.environ if environ is None else environ
    home = _home(env)
    level = env.get("ATLAS_LOG_LEVEL", "INFO").upper()
    one_of("ATLAS_LOG_LEVEL", level, ("DEBUG", "INFO", "WARNING", "ERROR"))
    threads = _whole(env, "ATLAS_THREADS", 0, 0)
    return Settings(
        home=home,
        database_url=env.get("ATLAS_DATABASE_URL") or f"sqlite:///{home / 'atlas.sqlite'}",
        broker_url=env.get("ATLAS_BROKER_URL") or None,
        device=env.get("ATLAS_DEVICE", "auto"),
        threads=threads or None,
        query_seconds=_number(env, "ATLAS_QUERY_SECONDS", 20.0, 0.01),
        query_memory=env.get("ATLAS_QUERY_MEMORY", "1GB"),
        query_rows=_whole(env, "ATLAS_QUERY_ROWS", 10_000, 1),
        annotator=env.get("ATLAS_ANNOTATOR") or env.get("USER") or "annotator",
        log_level=level,
    )
