"""How loops are compiled: without the interpreter lock, and kept on disk for the next process."""

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """A function of arrays and numbers, compiled when it is first called.

    Sums of floats may be taken in another order than they are written in (in lanes), and nothing else may be
    changed about them. Division by zero gives inf or NaN, as in numpy.
    """
    how = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "nsz"}}
    try:
        return cast(F, njit(cache=True, **how)(function))
    except RuntimeError:  # no folder to keep it in can be written
        return cast(F, njit(**how)(function))
