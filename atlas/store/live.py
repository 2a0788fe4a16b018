"""Trainings that run now: the rows that they write while they go, read as they come.

A training step appends to ``<steps>/.scratch-train-<digest>/live.jsonl``, one JSON object per line:
``{"table": "training_log", ...}`` with that table's columns. A reader keeps its place in the file, so a long
log is parsed once. After a resume the file is written anew; a reader notices and begins again.
"""

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from atlas.settings import Settings
from atlas.tables import TABLES

LIVE = "live.jsonl"
SCRATCH = ".scratch-"
LOGS = ("training_log", "training_density", "training_watched")
_REMEMBERED = 256
"""Bytes before the place in the file by which a reader recognises the file that it has read so far."""


@dataclass(frozen=True)
class LiveTraining:
    """A training step as far as it is: its folder's name, when it last wrote, and its rows by table."""

    step: str
    changed: float
    """Seconds since 1970."""
    tables: dict[str, pa.Table]


def parse_row(line: bytes) -> tuple[str, dict[str, Any]] | None:
    """The table and the row of one line; None for a line that is no row of a training table.

    >>> parse_row(b'{"table": "training_watched", "sae": "s", "step": 1, "feature": 0, "max_activation": 2}')
    ('training_watched', {'sae': 's', 'step': 1, 'feature': 0, 'max_activation': 2.0})
    >>> parse_row(b'{"table": "training_watched", "sae": "s"}') is None
    True
    """
    try:
        given = json.loads(line)
    except ValueError:
        return None
    if not isinstance(given, dict) or given.get("table") not in LOGS:
        return None
    row = {}
    for column in TABLES[given["table"]].columns:
        value = given.get(column.name)
        if value is None:
            if not column.nullable:
                return None
        elif pa.types.is_string(column.type):
            if not isinstance(value, str):
                return None
        elif isinstance(value, bool) or not isinstance(value, int | float):
            return None
        elif pa.types.is_floating(column.type):
            value = float(value)
        elif not isinstance(value, int) or not -(2**31) <= value < 2 ** (column.type.bit_width - 1):
            return None
        row[column.name] = value
    return given["table"], row


def latest(rows: pa.Table, key: tuple[str, ...]) -> pa.Table:
    """The last row of every key, sorted by key.

    >>> latest(pa.table({"step": [2, 1, 2], "l0": [5.0, 6.0, 7.0]}), ("step",)).to_pydict()
    {'step': [1, 2], 'l0': [6.0, 7.0]}
    """
    numbered = rows.append_column("row", pa.array(range(rows.num_rows), pa.int64()))
    last = numbered.group_by(list(key)).aggregate([("row", "max")])["row_max"]
    return rows.take(last).sort_by([(name, "ascending") for name in key])


@dataclass
class LiveLog:
    """One live log and how much of it was read."""

    path: Path
    tables: dict[str, pa.Table] = field(default_factory=dict)
    _place: int = 0
    _before: bytes = b""

    def read(self) -> None:
        """Take in what was written since the last time; OSError if the file is gone."""
        with self.path.open("rb") as file:
            file.seek(max(0, self._place - _REMEMBERED))
            if self._place and file.read(min(self._place, _REMEMBERED)) != self._before:
                self.tables, self._place = {}, 0  # written anew, so what was read is no longer true
                file.seek(0)
            new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._place += len(whole)
            file.seek(max(0, self._place - _REMEMBERED))
            self._before = file.read(min(self._place, _REMEMBERED))
        self._take(whole.splitlines())

    def _take(self, lines: list[bytes]) -> None:
        found: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            parsed = parse_row(line)
            if parsed is not None:
                found.setdefault(parsed[0], []).append(parsed[1])
        for name, rows in found.items():
            new = pa.Table.from_pylist(rows, schema=TABLES[name].schema)
            known = self.tables.get(name)
            self.tables[name] = latest(
                new if known is None else pa.concat_tables([known, new]), TABLES[name].key
            )


class LiveReader:
    """Reads every running training's log, each byte once; may be shared by threads."""

    def __init__(self) -> None:
        self._logs: dict[Path, LiveLog] = {}
        self._lock = threading.Lock()

    def trainings(self, settings: Settings) -> list[LiveTraining]:
        """Every training that has written a log and is not done, the one that wrote last first."""
        with self._lock:
            found = []
            for path in settings.steps.glob(f"{SCRATCH}train*/{LIVE}"):
                log = self._logs.setdefault(path, LiveLog(path))
                try:
                    log.read()
                    changed = path.stat().st_mtime
                except OSError:  # the step was done meanwhile
                    continue
                tables = {name: log.tables.get(name, TABLES[name].schema.empty_table()) for name in LOGS}
                step = path.parent.name.removeprefix(SCRATCH)
                found.append(LiveTraining(step, changed, tables))
            self._logs = {path: log for path, log in self._logs.items() if path.exists()}
        return sorted(found, key=lambda one: (-one.changed, one.step))


def live_trainings(settings: Settings, reader: LiveReader | None = None) -> list[LiveTraining]:
    """The trainings that run now; with a ``reader`` that is kept, only new lines are parsed."""
    return (reader or LiveReader()).trainings(settings)
