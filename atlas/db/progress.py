"""Progress into the database: how far a step is, the renewal of its lease, and the wish to stop.

A second thread renews the lease while the step says nothing for long (a model is loading, a matrix is being
multiplied), so that silence is not taken for death; a dead process renews nothing.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self

from atlas import meters
from atlas.db.engine import UnreachableError
from atlas.db.leases import LEASE_SECONDS, LeaseLostError, heartbeat
from atlas.db.memory import forget_peak, peak_rss_mb
from atlas.db.step_log import StepLog
from atlas.errors import AtlasError, Cancelled, HandedBack
from atlas.logs import explained, working_on
from atlas.settings import Settings
from atlas.units import Unit

log = logging.getLogger("atlas.step")

RESUMED = ("train", "finetune")
"""Kinds of steps that go on from a checkpoint."""
RATE_SECONDS = 30.0
RENEW_SECONDS = 2.0
"""How often a silent step renews its lease, and so hears that it was cancelled."""
LINE_SECONDS = 15.0
FLUSH_SECONDS = 2.0


_NO_UNIT = Unit("")


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
    raises Cancelled when a stop was asked for, HandedBack when ``leaving()`` says that the process has to
    end, LeaseLostError when somebody else holds the step by now, and UnreachableError when the database has
    not answered for as long as a lease lasts. For work that is silent for long, ``wish`` says the same.
    """

    def __init__(
        self,
        settings: Settings,
        run_id: str,
        name: str,
        owner: str,
        *,
        kind: str | None = None,
        unit: Unit = _NO_UNIT,
        every: float = 0.5,
        seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        leaving: Callable[[], bool] = lambda: False,
    ) -> None:
        self._kind, self._unit = kind or name.partition("-")[0], unit
        self._settings, self._run_id, self._name, self._owner = settings, run_id, name, owner
        self._every, self._seconds, self._clock, self._leaving = every, seconds, clock, leaving
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease {name}", daemon=True)
        self._rate = Rate()
        self._done, self._total, self._message = 0, 0, ""
        self._per_second: float | None = None
        self._written = self._answered = clock()
        self._began = self._said = self._flushed = self._written
        self._cancelled = self._told = False
        self._lost: LeaseLostError | None = None
        self._lines = StepLog(settings, run_id, name)
        self._around = ExitStack()

    def __enter__(self) -> Self:
        """Begin to renew the lease and to keep what is logged."""
        forget_peak()
        self._around.enter_context(working_on(self._run_id, self._name))
        self._around.enter_context(self._lines)
        log.info("begins")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop renewing; write the last state once more when the work ended well, and the log in any case."""
        self._stop.set()
        self._thread.join()
        with self._around:
            if kind is None:
                self._write()
            self._say_end(error)

    def update(self, done: int, total: int, message: str = "") -> None:
        """Note that ``done`` of ``total`` units are finished (see the class for what is raised)."""
        now = self._clock()
        self._count(done, total)
        self._per_second = self._rate.after(now, done, total)
        self._done, self._total, self._message = done, total, message
        if now - self._said >= LINE_SECONDS:
            self._said = now
            log.info("%s", self._state())
        if now - self._written >= self._every:
            self._write()
        error = self.wish()
        if error is not None:
            self._told = True
            raise error

    def wish(self) -> AtlasError | None:
        """What ``update`` would raise now; None once it has, for then the work is ending already."""
        if self._told:
            return None
        if self._lost is not None:
            return self._lost
        if self._cancelled:
            return Cancelled(f"step {self._name!r} of run {self._run_id} was asked to stop")
        if self._leaving():
            return HandedBack(f"step {self._name!r} of run {self._run_id} is handed back: its worker ends")
        return None

    def _count(self, done: int, total: int) -> None:
        """Add what was done since the last report to the counters; a new total or a step back begins anew.

        Steps that go on from a checkpoint first report where they are, which was counted when it was done.
        """
        begins = total != self._total
        before = (done if self._kind in RESUMED else 0) if begins else self._done
        new = max(0, done - before)
        if new:
            meters.UNITS.labels(self._kind, self._unit.name).inc(new)
            meters.TOKENS.labels(self._kind).inc(new * (self._unit.tokens or 0))

    def _state(self) -> str:
        """How far the step is: done of total, rate, time left, memory, and its last words."""
        parts = [f"{self._done}/{self._total} {self._unit.name}".strip()]
        if self._per_second:
            left = (self._total - self._done) / self._per_second
            parts.append(f"{self._per_second:.3g}/s, {left:.0f} s left")
        parts.append(f"peak {peak_rss_mb():.0f} MB")
        return ", ".join([*parts, self._message] if self._message else parts)

    def _say_end(self, error: BaseException | None) -> None:
        took, peak = self._clock() - self._began, peak_rss_mb()
        outcome = "done"
        if error is None:
            log.info("done in %.1f s, peak %.0f MB", took, peak)
        elif isinstance(error, HandedBack):
            outcome = "handed back"
            log.info("handed back after %.1f s, at %s", took, self._state())
        elif isinstance(error, Cancelled | KeyboardInterrupt):
            outcome = "cancelled"
            log.info("stopped as asked after %.1f s, at %s", took, self._state())
        elif isinstance(error, LeaseLostError):
            outcome = "lost"
            log.warning("lost after %.1f s: %s", took, explained(error))
        else:
            outcome = "failed"
            trace = None if isinstance(error, AtlasError) else error
            log.error("failed after %.1f s, at %s: %s", took, self._state(), explained(error), exc_info=trace)
        meters.STEPS.labels(self._kind, outcome).inc()
        meters.SECONDS.labels(self._kind).observe(took)
        meters.PEAK.labels(self._kind).observe(peak * 1e6)

    def _keep_lines(self) -> None:
        """Write the log's waiting lines: at once after a warning, else every other second."""
        now = self._clock()
        if self._lines.urgent or now - self._flushed >= FLUSH_SECONDS:
            self._flushed = now
            with suppress(UnreachableError):
                self._lines.flush_lines()

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
                self._keep_lines()
            except LeaseLostError as error:
                self._lost = error
            except UnreachableError:
                # A database that restarts must not cost hours of training; one that stays away must.
                if self._clock() - self._answered > self._seconds:
                    raise

    def _renew(self) -> None:
        while not self._stop.wait(min(self._seconds / 4, RENEW_SECONDS)):
            try:
                self._write()
            except UnreachableError:
                continue  # the working thread meets the same error at its next update
