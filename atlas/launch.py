"""Builds that run by themselves: started by the app or ``atlas build --detach``, ended by their own end.

The config is kept as JSON beside what the process says, in ``launched`` of the home folder. The process is no
child of a terminal or a browser session, so it goes on when these end.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import threading
import tomllib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from atlas.access import demand
from atlas.configs import BuildConfig
from atlas.errors import ConfigError, StoreError
from atlas.logs import redact
from atlas.plain import from_plain
from atlas.settings import Settings
from atlas.store.atomic import atomic_file
from atlas.sweeps import expand_sweeps

FOLDER = "launched"
KEEP = 50
PLAN_SECONDS = 120.0
_RUN = re.compile(r"\brun (\d{8}-\d{6}-[0-9a-f]+)\b")
_ERROR = re.compile(r"^error: (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Launched:
    """A build that was started: what it says lies in ``log``."""

    pid: int
    log: Path
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Beginning:
    """What became of a launched build so far."""

    run: str | None = None
    """The run's id, once it is in the database."""
    error: str | None = None
    """Why it ended before there was a run."""
    nothing: bool = False
    """Whether there was nothing to do."""
    alive: bool = True
    """Whether the process goes on."""


def read_config(text: str) -> BuildConfig:
    """A build's config from the text of a TOML file; ConfigError says what is wrong in it.

    >>> read_config("release = 'mine'").release_name
    'mine'
    """
    try:
        return from_plain(BuildConfig, expand_sweeps(tomllib.loads(text)))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the config is not TOML: {error}") from None


def planned(settings: Settings, config: BuildConfig) -> dict[str, Any]:
    """What ``atlas build --dry-run --json`` says of a config, worked out in a process of its own.

    Raises ConfigError with the reason when there is no plan, AccessError for somebody who may not start runs.
    """
    demand("jobs")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(config.to_json(), encoding="utf8")
        command = [sys.executable, "-m", "atlas", "build", str(path), "--dry-run", "--json"]
        environment = {**os.environ, "ATLAS_HOME": str(settings.home)}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=PLAN_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(f"the build could not be planned within {PLAN_SECONDS:.0f} s") from None
    if done.returncode:
        lines = [line.removeprefix("error: ") for line in done.stderr.strip().splitlines()] or [
            "no reason given"
        ]
        raise ConfigError(redact(lines[-1]))
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def launch(settings: Settings, config: BuildConfig) -> Launched:
    """Start a build of this config that goes on by itself; through workers if there is a broker.

    Raises AccessError for somebody who may not start runs, StoreError when the home folder is not writable.
    """
    who = demand("jobs")
    folder = settings.home / FOLDER
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    log = folder / f"{name}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / f"{name}.json") as temporary:
            temporary.write_text(config.to_json(), encoding="utf8")
        _forget_old(folder)
        detach = ["--detach"] if settings.broker_url else []
        command = [sys.executable, "-m", "atlas", "build", str(folder / f"{name}.json"), *detach]
        own = {"ATLAS_HOME": str(settings.home), "ATLAS_LOG_FORMAT": "text", "ATLAS_ANNOTATOR": who.name}
        environment = {**os.environ, **own}
        with log.open("xb") as out:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
    except OSError as error:
        raise StoreError(f"a build cannot be started from {str(folder)!r}: {error.strerror}") from error
    # Somebody has to take note of its end, or its entry among the processes stays.
    threading.Thread(target=process.wait, name=f"build {name}", daemon=True).start()
    return Launched(process.pid, log, process)


def _forget_old(folder: Path) -> None:
    for old in sorted(folder.glob("*.json"))[:-KEEP]:
        old.with_suffix(".log").unlink(missing_ok=True)
        old.unlink(missing_ok=True)


def beginning(launched: Launched) -> Beginning:
    """What a launched build has said of itself: its run, or why there is none.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "x.log"
    >>> _ = path.write_text("error: layer 7 does not exist")
    >>> beginning(Launched(1, path)).error
    'layer 7 does not exist'
    """
    try:
        text = launched.log.read_text(encoding="utf8", errors="replace")
    except OSError:
        text = ""
    alive = launched.process is not None and launched.process.poll() is None
    found, error = _RUN.search(text), _ERROR.search(text)
    if found is not None:
        return Beginning(run=found[1], alive=alive)
    if error is not None:
        return Beginning(error=redact(error[1]), alive=alive)
    if "Traceback (most recent call last)" in text:
        return Beginning(error=redact(text.strip().splitlines()[-1]), alive=alive)
    return Beginning(nothing="everything is current" in text, alive=alive)
