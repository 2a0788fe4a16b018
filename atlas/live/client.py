"""Asking live calls, without torch: through the queue where a broker is set, else through a child process.

The child is started when it is first needed, answers one call at a time, is killed when a call takes too
long, and ends with this process or after half an hour without a call. A worker is asked through the queue
``interactive``: ``atlas worker --queues interactive``.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from atlas.errors import AtlasError
from atlas.settings import Settings

SECONDS, START_SECONDS = 30.0, 90.0
"""How long a call may take when it is its turn, and how much longer a child's first, which loads torch."""
MOST_BYTES = 60_000
"""Of a request: less than a pipe holds, so that writing one never waits."""
COMMAND = (sys.executable, "-m", "atlas.live")
TASK, QUEUE = "workers.live.live_call", "interactive"


class LiveError(AtlasError):
    """A live call was refused, failed or took too long."""


class LiveBusyError(LiveError):
    """Somebody else's call is being answered; the same call may succeed later."""


class Child:
    """A child process that answers calls; may be shared by threads, which then wait for each other."""

    def __init__(
        self, environment: Mapping[str, str] | None = None, command: Sequence[str] = COMMAND
    ) -> None:
        self._environment, self._command = environment, list(command)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._number = 0
        self._answered = False

    @property
    def pid(self) -> int | None:
        """The process id while the child lives."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def ask(self, call: str, given: Mapping[str, Any], seconds: float = SECONDS) -> dict[str, Any]:
        """The reply to a call.

        Raises:
            LiveBusyError: another call is being answered for as long as this one may take.
            LiveError: the child took too long or ended.
        """
        if not self._lock.acquire(timeout=self._patience(seconds)):
            raise LiveBusyError("another question is being answered; ask again in a moment")
        try:
            self._number += 1
            request = {"id": self._number, "call": call, "given": given}
            data = json.dumps(request).encode() + b"\n"
            if len(data) > MOST_BYTES:
                raise LiveError(f"the question has {len(data):,} bytes; allowed: at most {MOST_BYTES:,}")
            reply = self._exchange(data, time.monotonic() + self._patience(seconds))
            self._answered = True
            return reply
        finally:
            self._lock.release()

    def _patience(self, seconds: float) -> float:
        """How long to wait for a call, or for the one before it: longer until the child has answered one."""
        return seconds if self.pid and self._answered else seconds + START_SECONDS

    def _exchange(self, data: bytes, deadline: float) -> dict[str, Any]:
        process = self._running()
        try:
            os.write(process.stdin.fileno(), data)  # type: ignore[union-attr]
        except BrokenPipeError:  # it ended for want of calls just now
            self._end()
            process = self._running()
            os.write(process.stdin.fileno(), data)  # type: ignore[union-attr]
        kept = b""
        while not kept.endswith(b"\n"):
            out = process.stdout.fileno()  # type: ignore[union-attr]
            if not select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._end()
                raise LiveError("no answer came in time; the computation was stopped")
            part = os.read(out, 1 << 20)
            if not part:
                self._end()
                raise LiveError("the process that computes ended before it answered (out of memory?)")
            kept += part
        return json.loads(kept)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._answered = False
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
                bufsize=0,
            )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def kill(self) -> None:
        """End the child now; whoever waits for its answer is told."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the child, if there is one, after the call that it answers."""
        with self._lock:
            self._end()


_CHILD = Child()


def ask_live(
    settings: Settings, call: str, given: Mapping[str, Any], seconds: float = SECONDS
) -> dict[str, Any]:
    """What a live call gives.

    Raises:
        LiveError: it was refused (the message says why), failed, or took too long.
        BrokerError: a broker is set and does not answer.
    """
    if settings.broker_url is None:
        reply = _CHILD.ask(call, given, seconds)
    else:
        from atlas.live.remote import ask_worker

        reply = ask_worker(settings, call, given, seconds)
    if "ok" in reply:
        return dict(reply["ok"])
    raise LiveError(str(reply.get("error") or f"this failed on the machine that computes: {reply['failed']}"))


def prepare(settings: Settings, given: Mapping[str, Any]) -> None:
    """Have a model and SAEs loaded in the background, so that the first question is answered soon.

    What goes wrong is not said here: the question itself meets it, too.
    """

    def warm() -> None:
        try:
            ask_live(settings, "warm", given)
        except AtlasError:
            return

    threading.Thread(target=warm, name="atlas-live-warm", daemon=True).start()
