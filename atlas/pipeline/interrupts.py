"""Stops work that was asked to stop, even where it has not reported its progress for a while.

Steps hear of a stop when they report. Some compute for minutes in between (a large product, a query, a
download). There, after a few seconds of patience, a signal to the process itself raises the same error in the
main thread, as Ctrl-C does, between two Python instructions or out of a wait.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

POLL_SECONDS = 0.25
PATIENCE_SECONDS = 3.0
"""How long the work may take to notice by itself; then it is interrupted."""
AGAIN_SECONDS = 30.0
"""And again after this, if something swallowed the interruption; until then it may save what it has."""

Wish = Callable[[], BaseException | None]


class _Alarm:
    """The state that the watching thread and the signal handler share."""

    def __init__(self, wish: Wish, patience: float) -> None:
        self.wish, self.patience = wish, patience
        self.over = threading.Event()
        self.armed = False
        self.raised: BaseException | None = None

    def watch(self) -> None:
        while not self.over.wait(POLL_SECONDS):
            error = self.wish()
            if error is None:
                continue
            wait = self.patience
            while not self.over.wait(wait) and self.wish() is not None:
                self.raised, self.armed, wait = error, True, AGAIN_SECONDS
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
            return

    def ring(self, _number: int, _frame: FrameType | None) -> None:
        if self.armed and self.raised is not None and not self.over.is_set():
            self.armed = False
            raise self.raised


@contextmanager
def interruptible(wish: Wish, *, patience: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Raise in the block what ``wish`` returns, soon after it returns something.

    ``wish`` is asked in another thread. What a library makes of the interruption (DuckDB reports an error of
    its own) is replaced by the wish. Outside the main thread, where no signal can be handled, the block has
    to notice by itself.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGUSR2"):
        yield
        return
    alarm = _Alarm(wish, patience)
    before = signal.signal(signal.SIGUSR2, alarm.ring)
    thread = threading.Thread(target=alarm.watch, name="interrupts", daemon=True)
    thread.start()
    try:
        yield
    except Exception as error:
        if alarm.raised is not None and error is not alarm.raised:
            raise alarm.raised from error
        raise
    finally:
        alarm.over.set()
        thread.join()
        signal.signal(signal.SIGUSR2, before)
