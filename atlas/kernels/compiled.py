"""How loops are compiled: without the interpreter lock, and kept on disk for the next process."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit
from numba.core.caching import IndexDataCacheFile

F = TypeVar("F", bound=Callable[..., object])


class _OneAtATime(IndexDataCacheFile):  # type: ignore[misc]
    """numba's files of one function, which several processes may fill at once.

    numba looks for a free name, notes it in the index and then writes the code, each without a lock: of two
    processes that compile the function for different types, both could choose one name, and the index could
    then give the code for the one to a caller with the other.
    """

    @contextmanager
    def _alone(self) -> Iterator[None]:
        descriptor = os.open(Path(self._cache_path) / "compiled.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def save(self, key: object, data: object) -> None:
        with self._alone():
            super().save(key, data)

    def load(self, key: object) -> Any:
        with self._alone():
            return super().load(key)


def compiled(function: F) -> F:
    """A function of arrays and numbers, compiled when it is first called.

    Sums of floats may be taken in another order than they are written in (in lanes), and nothing else may be
    changed about them. Division by zero gives inf or NaN, as in numpy.
    """
    how = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "nsz"}}
    try:
        kept = njit(cache=True, **how)(function)
    except RuntimeError:  # no folder to keep it in can be written
        return cast(F, njit(**how)(function))
    kept._cache._cache_file.__class__ = _OneAtATime
    return cast(F, kept)
