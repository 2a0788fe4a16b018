"""Progress into the database: how far a step is, the renewal of its lease, and the wish to stop.

A second thread renews the lease while the step says nothing for long (a model is loading, a matrix is being
multiplied), so that silence is not taken for death; a dead process renews nothing.
"""

import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from atlas.db.engine import UnreachableError
from atlas.db.leases import LEASE_SECONDS, LeaseLostError, heartbeat
from atlas.errors import Cancelled
from atlas.settings import Settings

RATE_SECONDS = 30.0


def peak_rss_mb() -> float:
    """The most memory this process has held so far, in MB (10^6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class Rate:
    """Units per second over about the last half minute; starts anew with a new total or a step back.

    >>> rate = Rate()
    >>> [rate.after(now, done, 100) for now, done in [(0.0, 40), (2.0, 50), (4.0, 60)]]
    [None, 5.0, 5.0]
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()
        self._total = 0

    def after(self, now: float, done: int, total: int) -> float | None:
        """The rate once ``done`` of ``total`` is known at ``now`` (seconds); None while it cannot be told."""
        samples = self._samples
        if total != self._total or (samples and done < samples[-1][1]):
            samples.clear()
            self._total = total
        samples.append((now, done))
        while len(samples) > 2 and samples[1][0] < now - RATE_SECONDS:
            samples.popleft()
        then, before = samples[0]
        return (done - before) / (now - then) if now > then else None


class DbProgress:
    """A :class:`atlas.progress.Progress` of one held step; a context manager around the work.

    ``update`` may be called as often as one likes: the database hears of it every ``every`` seconds. It
    raises Cancelled when a stop was asked for, LeaseLostError when somebody else holds the step by now, and
    UnreachableError when the database has not answered for as long as a lease lasts.
    """

    def __init__(
        self,
        settings: Settings,
        run_id: str,
        name: str,
        owner: str,
        *,
        every: float = 0.5,
        seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._run_id, self._name, self._owner = settings, run_id, name, owner
        self._every, self._seconds, self._clock = every, seconds, clock
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease {name}", daemon=True)
        self._rate = Rate()
        self._done, self._total, self._message = 0, 0, ""
        self._per_second: float | None = None
        self._written = self._answered = clock()
        self._cancelled = False
        self._lost: LeaseLostError | None = None

    def __enter__(self) -> Self:
        """Begin to renew the lease."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop renewing; write the last state once more when the work ended well."""
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._write()

    def update(self, done: int, total: int, message: str = "") -> None:
        """Note that ``done`` of ``total`` units are finished (see the class for what is raised)."""
        now = self._clock()
        self._per_second = self._rate.after(now, done, total)
        self._done, self._total, self._message = done, total, message
        if now - self._written >= self._every:
            self._write()
        if self._lost is not None:
            raise self._lost
        if self._cancelled:
            raise Cancelled(f"step {self._name!r} of run {self._run_id} was asked to stop")

    def _write(self) -> None:
        with self._lock:
            self._written = self._clock()
            try:
                self._cancelled = heartbeat(
                    self._settings,
                    self._run_id,
                    self._name,
                    self._owner,
                    done=self._done,
                    total=self._total,
                    message=self._message,
                    rate=self._per_second,
                    peak_rss_mb=peak_rss_mb(),
                    seconds=self._seconds,
                )
                self._answered = self._clock()
            except LeaseLostError as error:
                self._lost = error
            except UnreachableError:
                # A database that restarts must not cost hours of training; one that stays away must.
                if self._clock() - self._answered > self._seconds:
                    raise

    def _renew(self) -> None:
        while not self._stop.wait(self._seconds / 4):
            try:
                self._write()
            except UnreachableError:
                continue  # the working thread meets the same error at its next update
