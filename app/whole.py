"""Callbacks that run to their end.

While a run goes on, Streamlit looks for a newer request of the browser whenever the script touches the
session state, and if there is one it stops the run right there. It does so in the middle of a callback, too,
and does not call it again. A note would be stored and the session not know of it (so that its next save
conflicts with itself), or a press of a button would be half done. Inside :func:`undisturbed` the newer
request waits. (``atlas app`` turns off ``runner.fastReruns``, with which a newer request does not wait for
anything but runs beside the older one. What takes long looks for itself: :class:`Newer`.)
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

P = ParamSpec("P")
R = TypeVar("R")
_LOOK = "on_scriptrunner_yield"


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is done inside is done whole; a newer request of the browser is seen at the next look after it."""
    ctx = get_script_run_ctx(suppress_warning=True)
    requests = None if ctx is None else ctx.script_requests
    if requests is None or _LOOK in vars(requests):
        yield
        return
    setattr(requests, _LOOK, lambda: None)
    try:
        yield
    finally:
        delattr(requests, _LOOK)


def whole(callback: Callable[P, R]) -> Callable[P, R]:
    """A callback that is not stopped half-way."""

    @wraps(callback)
    def all_of_it(*args: P.args, **kwargs: P.kwargs) -> R:
        with undisturbed():
            return callback(*args, **kwargs)

    return all_of_it


class Newer(threading.Event):
    """Ends something long, such as a query, when the browser asks for something newer: that stops the run.

    It is given to what takes a ``cancel`` event and looks at it now and then, in the thread of the run.
    """

    def is_set(self) -> bool:
        """Whether somebody set it; where a newer request waits, Streamlit's own exception ends the run."""
        _ = "newer" in st.session_state
        return super().is_set()
