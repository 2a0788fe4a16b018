"""Answering live calls: one request, one reply, both as JSON; and the loop of the app's child process."""

import json
import logging
import os
import select
import sys
from typing import Any

from atlas.errors import AtlasError
from atlas.live.calls import answer

log = logging.getLogger("atlas.live")

IDLE_SECONDS = 1800.0
"""A child that nobody asked for half an hour ends, and gives its memory back."""
_CHUNK = 1 << 16


def reply_to(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The answer to a call as {ok: ...}, or {error: ...} for what the user can act on, or {failed: ...}."""
    try:
        return {"ok": answer(name, given)}
    except AtlasError as error:
        return {"error": str(error)}
    except Exception as error:
        log.error("live call %s failed", name, exc_info=error)
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def serve(source: int, out: int, idle_seconds: float = IDLE_SECONDS) -> None:
    """Answer requests, one JSON object per line, until the other side is gone or nothing comes for long."""
    kept = b""
    while select.select([source], [], [], idle_seconds)[0]:
        data = os.read(source, _CHUNK)
        if not data:
            return
        *lines, kept = (kept + data).split(b"\n")
        for line in lines:
            asked = json.loads(line)
            reply = {"id": asked["id"], **reply_to(asked["call"], asked["given"])}
            _write(out, json.dumps(reply).encode() + b"\n")


def _write(out: int, data: bytes) -> None:
    while data:
        data = data[os.write(out, data) :]


def main() -> None:
    """Answer over the pipes of this process; whatever libraries print goes to standard error."""
    out = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    logging.basicConfig(level=logging.WARNING)
    try:
        serve(0, out)
    except (BrokenPipeError, KeyboardInterrupt):
        return
