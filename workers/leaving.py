"""How a worker that has to end tells its children, so that they hand their steps back at once.

Celery lets a child finish its task when the worker gets SIGTERM, which may take hours. One byte of memory
that parent and children share says that it should not.
"""

import mmap


class _Flag:
    """The byte; every worker takes a new one before it forks its children."""

    byte = mmap.mmap(-1, 1)


def stay() -> None:
    """A worker begins: it and the children forked from now on are not asked to leave."""
    _Flag.byte = mmap.mmap(-1, 1)


def ask() -> None:
    """Ask every process forked from this worker to hand its step back."""
    _Flag.byte[0] = 1


def asked() -> bool:
    """Whether the worker is ending."""
    return _Flag.byte[0] != 0
