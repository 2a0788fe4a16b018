"""A user's SQL over a release and the annotations, with nothing to write to and bounds on everything.

A query runs in a process of its own (``sandbox_child``), because a SELECT can write files
(``WITH a AS (COPY ...)``) and because DuckDB's memory bound and interrupts do not reach inside a function
such as ``repeat``. There: the release is attached read-only to a database in memory; the file system,
extensions and the settings are locked; exactly one SELECT runs; the process may write no file at all.
"""

import json
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from atlas.errors import Cancelled, ConfigError, QueryError, StoreError

RESULT_BYTES = 64_000_000
THREADS = 2
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_OVERHEAD_BYTES = 768_000_000
_CHILD = Path(__file__).with_name("sandbox_child.py")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Result(NamedTuple):
    """Rows of a query, whether there were more than its bounds let through, and how long it ran."""

    table: pa.Table
    truncated: bool
    seconds: float


def memory_bytes(text: str) -> int:
    """A memory bound in bytes.

    >>> memory_bytes("1GB"), memory_bytes("512 MiB")
    (1000000000, 536870912)
    >>> memory_bytes("much")
    Traceback (most recent call last):
    ...
    atlas.errors.ConfigError: memory bound 'much' cannot be read; write it like 512MB or 2GB
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"memory bound {text!r} cannot be read; write it like 512MB or 2GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


class _Spare:
    """At most two children that have started and wait, so that the next queries need not wait for them.

    Two, because one that starts while a query runs may not be ready for the query after it.
    """

    MOST = 2

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: list[subprocess.Popen[bytes]] = []

    def prepare(self) -> None:
        """Start one more, if there is room; those that have ended make room."""
        with self._lock:
            self._children = [child for child in self._children if child.poll() is None]
            if len(self._children) < self.MOST:
                self._children.append(_start())

    def take(self) -> subprocess.Popen[bytes]:
        """The one that has waited longest; a new one where none waits."""
        with self._lock:
            while self._children:
                child = self._children.pop(0)
                if child.poll() is None:
                    return child
        return _start()


_spare = _Spare()


def prewarm() -> None:
    """Start the process of the next query now; it waits, and ends with this process."""
    _spare.prepare()


def _start() -> subprocess.Popen[bytes]:
    """A child with no environment of ours (no secrets to read) and the root folder as its own."""
    try:
        return subprocess.Popen(
            [sys.executable, "-I", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"},
            cwd="/",
        )
    except OSError as error:
        raise QueryError(f"cannot start the query's process: {error.strerror}") from error


def run_sql(
    sql: str,
    release_path: Path,
    annotations: Mapping[str, pa.Table],
    *,
    seconds: float = 20.0,
    memory: str = "1GB",
    rows: int = 10_000,
    cancel: threading.Event | None = None,
) -> Result:
    """Run one SELECT (or DESCRIBE, SHOW, SUMMARIZE, EXPLAIN) over a release joined with ``annotations``.

    Returns at most ``rows`` rows and 64 MB. Raises QueryError for a statement that is refused, fails, or
    runs past ``seconds`` or ``memory``; Cancelled when ``cancel`` is set meanwhile; StoreError
    if the release is missing.
    """
    if not Path(release_path).is_file():
        raise StoreError(f"release {release_path} does not exist")
    request = {
        "sql": sql,
        "path": str(Path(release_path).absolute()),
        "seconds": float(seconds),
        "memory": memory,
        "rows": int(rows),
        "bytes": RESULT_BYTES,
        "threads": THREADS,
        "data_bytes": _OVERHEAD_BYTES + memory_bytes(memory) * 3 // 2,
        "tables": list(annotations),
    }
    child = _spare.take()
    try:
        output, errors = _exchange(child, _encode(request, annotations), seconds, cancel)
    finally:
        if child.poll() is None:
            child.kill()
            child.communicate()
    return _decode(output, errors, child.returncode, memory)


def _encode(request: Mapping[str, object], annotations: Mapping[str, pa.Table]) -> bytes:
    parts = [json.dumps(request).encode() + b"\n"]
    for table in annotations.values():
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        data = sink.getvalue().to_pybytes()
        parts += [struct.pack(">Q", len(data)), data]
    return b"".join(parts)


def _exchange(
    child: subprocess.Popen[bytes], request: bytes, seconds: float, cancel: threading.Event | None
) -> tuple[bytes, bytes]:
    """The child's answer and what it said on stderr; QueryError past the deadline, Cancelled on request."""
    deadline = time.monotonic() + seconds + _GRACE_SECONDS
    to_send: bytes | None = request
    while True:
        try:
            return child.communicate(to_send, timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            to_send = None  # communicate keeps what it has not sent yet
        if cancel is not None and cancel.is_set():
            raise Cancelled("the query was cancelled")
        if time.monotonic() > deadline:
            raise QueryError(f"the query was stopped after its bound of {seconds:g} seconds")


def _decode(output: bytes, errors: bytes, code: int, memory: str) -> Result:
    line, _, body = output.partition(b"\n")
    if code > 0 and b"MemoryError" not in errors and b"bad_alloc" not in errors:
        raise RuntimeError(f"the query's process failed: {errors.decode('utf-8', 'replace')[-2000:]}")
    if code != 0 or not line:
        raise QueryError(
            f"the query needs more memory than its bound of {memory} (its process ended, code {code})"
        )
    head = json.loads(line)
    if "error" in head:
        raise QueryError(head["error"])
    with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
        table = reader.read_all()
    return Result(table, bool(head["truncated"]), float(head["seconds"]))
