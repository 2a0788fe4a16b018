"""What belongs to the machine and not to an experiment: folders, URLs, device, bounds.

Everything is read from ``ATLAS_*`` environment variables when asked for, so that one code path serves a
laptop (no variable set) and a cluster (a broker and a PostgreSQL URL set).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from atlas.errors import ConfigError, one_of


@dataclass(frozen=True)
class Settings:
    """One machine's settings, each with the variable that sets it."""

    home: Path
    """``ATLAS_HOME``: corpora, runs, releases and the SQLite database live here."""
    database_url: str = field(repr=False)  # it may hold a password
    """``ATLAS_DATABASE_URL``: SQLAlchemy URL of the run and annotation database."""
    broker_url: str | None = field(repr=False)
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
    log_format: str | None = None
    """``ATLAS_LOG_FORMAT``: text or json, one line per event; unset: text for workers, bars at a terminal."""
    auth: str = "none"
    """``ATLAS_AUTH``: how people log in to the app: none, password or oidc."""
    session_hours: float = 168.0
    """``ATLAS_SESSION_HOURS``: how long a login with a password lasts."""
    lake_url: str | None = field(default=None, repr=False)
    """``ATLAS_LAKE_URL``: fsspec URL of the lake, such as s3://BUCKET/PREFIX; unset: folders of ``home``."""
    lake_options: str = field(default="", repr=False)
    """``ATLAS_LAKE_OPTIONS``: fsspec storage options as a JSON object. They may hold secrets."""
    lake_seconds: float = 30.0
    """``ATLAS_LAKE_SECONDS``: how often readers look for a new release and a training's state is uploaded."""
    lake_cache_gb: float = 50.0
    """``ATLAS_CACHE_GB``: gigabytes (10^9 bytes) that copies of what is in the lake may take on this disk."""
    residual_gb: float = 10.0
    """``ATLAS_RESIDUAL_GB``: gigabytes that residual streams may take on this disk from the corpus pass until
    DFA has read them; 0 keeps none."""

    @property
    def local(self) -> Path:
        """``home``; with a lake, the folder of this machine's copies of it, which may go at any time."""
        if self.lake_url is None:
            return self.home
        return self.home / "lake" / hashlib.sha256(self.lake_url.encode()).hexdigest()[:16]

    @property
    def releases(self) -> Path:
        """Where published releases lie, or this machine's copies of them."""
        return self.local / "releases"

    @property
    def steps(self) -> Path:
        """Where the content-addressed outputs of build steps lie, or this machine's copies of them."""
        return self.local / "steps"

    @property
    def residuals(self) -> Path:
        """Where residual streams lie from the corpus pass until DFA has read them."""
        return self.home / "residuals"

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


def _lake_url(environ: Mapping[str, str]) -> str | None:
    url = environ.get("ATLAS_LAKE_URL", "").strip().rstrip("/") or None
    if url is not None and "://" not in url and not Path(url).is_absolute():
        # The text is not repeated: some URLs hold a password.
        raise ConfigError("ATLAS_LAKE_URL is no URL; allowed: s3://BUCKET/PREFIX, another URL, or /FOLDER")
    return url


def _lake_options(environ: Mapping[str, str]) -> str:
    text = environ.get("ATLAS_LAKE_OPTIONS", "").strip()
    try:
        whole = not text or isinstance(json.loads(text), dict)
    except ValueError:
        whole = False
    if not whole:
        raise ConfigError(
            'ATLAS_LAKE_OPTIONS is no JSON object; allowed: storage options such as {"anon": true}'
        )
    return text


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
    log_format = (env.get("ATLAS_LOG_FORMAT") or "").lower() or None
    one_of("ATLAS_LOG_FORMAT", log_format, (None, "text", "json"))
    auth = env.get("ATLAS_AUTH") or "none"
    one_of("ATLAS_AUTH", auth, ("none", "password", "oidc"))
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
        log_format=log_format,
        lake_url=_lake_url(env),
        lake_options=_lake_options(env),
        lake_seconds=_number(env, "ATLAS_LAKE_SECONDS", 30.0, 0.0),
        lake_cache_gb=_number(env, "ATLAS_CACHE_GB", 50.0, 0.0),
        residual_gb=_number(env, "ATLAS_RESIDUAL_GB", 10.0, 0.0),
        auth=auth,
        session_hours=_number(env, "ATLAS_SESSION_HOURS", 168.0, 0.01),
    )
