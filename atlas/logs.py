"""Log lines: one per event, with time, level, worker, run and step, as text or JSON, never with a secret.

``ATLAS_LOG_FORMAT`` chooses ``text`` or ``json``; unset, people at a terminal see bars and warnings, and
workers write text. Everything goes to standard error.
"""

import json
import logging
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from urllib.parse import unquote

from atlas.settings import Settings

HIDDEN = "***"
OTHER_ERROR_FRAMES = 25
_IN_URL = re.compile(r"(://[^\s:/@'\"]*):([^\s'\"]*)@")
_IN_WORDS = re.compile(
    r"(?i)\b(password|passwd|pwd|api_key|secret_key|access_token)(\s*[=:]\s*)('[^']*'|\"[^\"]*\"|\S+)"
)
_SECRET_NAME = re.compile(r"(?i)(PASSWORD|SECRET|TOKEN|API_?KEY|ACCESS_KEY)$")
_URL_NAME = re.compile(r"(?i)(_URL|_URI|_DSN)$")
_SHORTEST = 6


def secrets_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    """What must not be shown: passwords in URLs of the environment, values of variables named like secrets.

    Shorter ones than six characters, and those equal to the user name before them, are left out: taking
    them out would garble ordinary words, and they protect nothing.

    >>> secrets_of({"ATLAS_DATABASE_URL": "postgresql://me:p%40ssword@host/db", "HF_TOKEN": "hf_abcdef"})
    ('p%40ssword', 'p@ssword', 'hf_abcdef')
    """
    found: dict[str, None] = {}
    for name, value in environ.items():
        if _SECRET_NAME.search(name):
            found[value.strip()] = None
        elif name.endswith("_OPTIONS"):
            found |= dict.fromkeys(_of_options(value))
        elif _URL_NAME.search(name):
            for user, password in _IN_URL.findall(value):
                if password != user.removeprefix("://"):
                    found |= {password: None, unquote(password): None}
    return tuple(secret for secret in found if len(secret) >= _SHORTEST)


def _of_options(text: str) -> Iterator[str]:
    """Values of a JSON object, at any depth, whose keys are named like secrets.

    >>> list(_of_options('{"key": "open", "client_kwargs": {"aws_secret_access_key": "hidden"}}'))
    ['hidden']
    """
    try:
        waiting = [json.loads(text)]
    except ValueError:
        return
    while waiting:
        found = waiting.pop()
        for name, value in found.items() if isinstance(found, dict) else ():
            if isinstance(value, dict):
                waiting.append(value)
            elif isinstance(value, str) and (_SECRET_NAME.search(name) or "secret" in name.lower()):
                yield value


def redact(text: str) -> str:
    """The text without passwords: in URLs, after words such as ``password=``, and those of the environment.

    >>> redact("cannot reach postgresql://atlas:hunter22@db/atlas")
    'cannot reach postgresql://atlas:***@db/atlas'
    >>> redact("connection failed: user=atlas password=hunter22 host=db")
    'connection failed: user=atlas password=*** host=db'
    """
    out = _IN_URL.sub(rf"\1:{HIDDEN}@", text)
    out = _IN_WORDS.sub(rf"\1\2{HIDDEN}", out)
    for secret in sorted(secrets_of(os.environ), key=len, reverse=True):
        out = out.replace(secret, HIDDEN)
    return out


def explained(error: BaseException) -> str:
    """An error and what caused it, in one line without secrets.

    >>> try:
    ...     raise ValueError("no release") from FileNotFoundError("releases/docs")
    ... except ValueError as error:
    ...     explained(error)
    'ValueError: no release; caused by FileNotFoundError: releases/docs'
    """
    from atlas.errors import AtlasError

    parts: list[str] = []
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen and len(parts) < 5:
        seen.add(id(found))
        said = " ".join(str(found).split())
        name = type(found).__name__
        own = isinstance(found, AtlasError) and bool(said)
        text = said if own else f"{name}: {said}" if said else name
        # A message that already repeats its cause needs it no second time.
        if not (parts and said and said.splitlines()[0] in parts[-1]):
            parts.append(text)
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return redact("; caused by ".join(parts))


@dataclass(frozen=True)
class Scope:
    """What this process works on."""

    worker: str
    run: str | None = None
    step: str | None = None


def _here() -> str:
    return f"{socket.gethostname()[:100]}/{os.getpid()}"


class _Now:
    """A process does one step at a time, in several threads; so the scope belongs to the process."""

    scope = Scope(_here())


def current_scope() -> Scope:
    """The run and step that this process works on; a forked child has a name of its own."""
    if not _Now.scope.worker.endswith(f"/{os.getpid()}"):
        _Now.scope = replace(_Now.scope, worker=_here())
    return _Now.scope


@contextmanager
def working_on(run: str, step: str) -> Iterator[None]:
    """Lines of this process carry this run and step until the block ends."""
    before = current_scope()
    _Now.scope = replace(before, run=run, step=step)
    try:
        yield
    finally:
        _Now.scope = before


def _trace(record: logging.LogRecord) -> str | None:
    if not record.exc_info or record.exc_info[1] is None:
        return None
    return "".join(traceback.format_exception(record.exc_info[1], limit=-OTHER_ERROR_FRAMES)).rstrip()


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, worker, run, step, message, error (a traceback)."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; keys without a value are left out."""
        scope = current_scope()
        fields = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "worker": scope.worker,
            "run": scope.run,
            "step": scope.step,
            "message": redact(record.getMessage()),
            "error": None if (trace := _trace(record)) is None else redact(trace),
        }
        return json.dumps({key: value for key, value in fields.items() if value is not None})


class TextLines(logging.Formatter):
    """``time level worker run/step message``; a traceback follows, indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; line breaks of the message are written as ``\\n``, so that nobody can forge a line."""
        scope = current_scope()
        where = f" {scope.run}/{scope.step}" if scope.run else ""
        said = redact(record.getMessage()).replace("\r", "\\r").replace("\n", "\\n")
        trace = _trace(record)
        after = "" if trace is None else "\n    " + redact(trace).replace("\n", "\n    ")
        return f"{_time(record)} {record.levelname:7} {scope.worker}{where} {said}{after}"


def formatter(log_format: str) -> logging.Formatter:
    """The formatter of ``text`` or ``json``."""
    return JsonLines() if log_format == "json" else TextLines()


class _Stderr(logging.Handler):
    """Writes to what standard error is now, not to what it was when the handler was made."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # noqa: BLE001 (logging never ends the work)
            self.handleError(record)


def set_up_logging(settings: Settings, *, service: bool = False) -> None:
    """Send this process's log to standard error.

    With ``ATLAS_LOG_FORMAT``, or for a ``service`` (a worker), everything from ``ATLAS_LOG_LEVEL`` on; at a
    person's terminal, where bars are drawn, warnings alone.
    """
    chosen = settings.log_format is not None or service
    handler = _Stderr()
    handler.setFormatter(formatter(settings.log_format or "text"))
    handler.setLevel(settings.log_level if chosen else logging.WARNING)
    if not chosen:
        # What ends a step is said by the command that runs it; libraries' warnings are for the step's log.
        handler.addFilter(lambda record: record.name not in ("py.warnings", "atlas.step"))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _Stderr)]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.getLogger("atlas").setLevel(settings.log_level)
    if service:
        root.setLevel(settings.log_level)
