"""What a failed step means, for every executor: may it pass, how long to wait, what to say of it.

Bad input and bugs are final. A server that was not there, a connection that broke, an output that somebody
else makes just now may be otherwise a moment later. A memory that was too small was answered already, by
smaller batches (:func:`atlas.pipeline.execute.run_step`).
"""

import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from atlas.db.engine import UnreachableError
from atlas.errors import ConflictError
from atlas.logs import explained
from atlas.queue import BrokerError

MAX_ATTEMPTS = 5
MAX_WAIT_SECONDS = 300.0
WAIT_SECONDS = 20.0
"""How long a worker leaves a step alone that another run does just now."""
TELL_SECONDS = 120.0
"""How long a step that has ended waits for the database to be told."""
TRANSIENT = (UnreachableError, BrokerError, ConflictError, ConnectionError, TimeoutError)
T = TypeVar("T")
_CPU_MEMORY = ("DefaultCPUAllocator", "can't allocate memory")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def is_transient(error: BaseException | None) -> bool:
    """Whether the same step may succeed later: somebody was not there, or held what we need.

    >>> is_transient(ConnectionResetError()), is_transient(ValueError("no such site"))
    (True, False)
    """
    return any(isinstance(one, TRANSIENT) for one in causes(error))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory, of the machine or of its GPU, did not suffice.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    torch = sys.modules.get("torch")
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    return any(
        isinstance(one, kinds)
        or (isinstance(one, RuntimeError) and any(part in str(one) for part in _CPU_MEMORY))
        for one in causes(error)
    )


def back_off(attempt: int) -> float:
    """Seconds to wait before another attempt: 2, 4, 8, ... at most 300, spread by a quarter either way."""
    return min(MAX_WAIT_SECONDS, 2.0**attempt) * random.uniform(0.75, 1.25)  # noqa: S311


def patiently(tell: Callable[[], T], *, seconds: float = TELL_SECONDS) -> T:
    """Tell the database something, and wait for one that is away: what was done must not be done again.

    Raises UnreachableError when it stays away.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return tell()
        except UnreachableError:
            if time.monotonic() > end:
                raise
            time.sleep(1)


class Verdict(NamedTuple):
    """What becomes of a step that failed."""

    text: str
    again: bool
    counts: bool
    """Whether this was one of the step's attempts; waiting for somebody else is none."""
    wait: float
    """Seconds until the next attempt."""


def judge(error: Exception, attempts: int) -> Verdict:
    """What becomes of a step whose attempt of this number (from 1) failed.

    >>> judge(ConflictError("held by process 12"), 1)[1:]
    (True, False, 20.0)
    >>> judge(ValueError("a bug"), 1)
    Verdict(text='ValueError: a bug', again=False, counts=True, wait=0.0)
    >>> judge(TimeoutError("no answer"), MAX_ATTEMPTS).again
    False
    """
    text = explained(error)
    if isinstance(error, ConflictError):
        # Another run makes the same output just now. That may take hours and is nobody's failure.
        return Verdict(text, True, False, WAIT_SECONDS)
    again = is_transient(error) and attempts < MAX_ATTEMPTS
    return Verdict(text, again, True, back_off(attempts) if again else 0.0)
