"""How a worker that has to end tells its children, so that they hand their steps back at once.

Celery lets a child finish its task when the worker gets SIGTERM, which may take hours. One byte of memory
that parent and children share says that it should not.
"""

import mmap

_BYTE = mmap.mmap(-1, 1)


def ask() -> None:
    """Ask every process forked from this one, and this one, to hand its step back."""
    _BYTE[0] = 1


def asked() -> bool:
    """Whether the worker is ending."""
    return _BYTE[0] != 0


def stay() -> None:
    """Take it back: a worker begins."""
    _BYTE[0] = 0
