"""The way from one view to another, and the request from before it that would lead back.

What the browser sends while another view is on its way to it (a text that is kept) still names the view
that was left; the run that answers it would show that one again, and the press that led on would seem to
have done nothing. Within a view, :mod:`app.moves` does the same for places.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

LATE_SECONDS = 5.0
"""How long after a way began a request may still name the view from before it, while the new one is made."""
THERE_SECONDS = 1.5
"""How long it may once the new view was sent: the browser names that from when it has seen the beginning."""
_WAY = "way to another view"
_VIEW = "view"
_ARRIVALS = "arrivals in a view"
Address = dict[str, str]


@dataclass
class Way:
    """The last way: the view it left, the address it led to, what the browser's address may be meanwhile."""

    left: str
    to: str
    meanwhile: tuple[Address, ...]
    until: float
    sent: bool = False

    def is_late(self, view: str, here: Mapping[str, str], now: float) -> bool:
        """Whether a request for this view, with this address, is one from before the way.

        >>> way = Way("head", "feature?feature=3", ({"head": "L0H1"}, {"feature": "3"}), until=15.0)
        >>> way.is_late("head", {"head": "L0H1"}, 10.2), way.is_late("head", {"feature": "3"}, 10.2)
        (True, True)
        >>> way.is_late("head", {"head": "L0H1"}, 15.2), way.is_late("head", {}, 10.2)
        (False, False)
        >>> way.is_late("feature", {"feature": "3"}, 10.2)
        False
        """
        return view == self.left and dict(here) in self.meanwhile and now < self.until


def begin(view: str, to: str, address: Address) -> None:
    """From now on, for a moment, a request for the view of this run means the one that is gone to."""
    now = time.monotonic()
    way: Way | None = st.session_state.get(_WAY)
    if way is not None and way.to == to:
        way.until, way.sent = now + LATE_SECONDS, False
        return
    left: str | None = st.session_state.get(_VIEW)
    if left is not None and left != view:
        meanwhile = (st.query_params.to_dict(), address)
        st.session_state[_WAY] = Way(left, to, meanwhile, now + LATE_SECONDS)


def arrive(view: str) -> str | None:
    """Take down which view this run is for; the address to go to where that is the one that was just left.

    Who goes back with the browser's own button means it: that is a way, too.
    """
    came_from: str | None = st.session_state.get(_VIEW)
    if came_from != view:
        st.session_state[_ARRIVALS] = arrivals() + 1
    st.session_state[_VIEW] = view
    if getattr(get_script_run_ctx(suppress_warning=True), "is_history_navigation", False):
        _went_back(came_from, view)
        return None
    way: Way | None = st.session_state.get(_WAY)
    if way is None:
        return None
    now = time.monotonic()
    if way.is_late(view, st.query_params.to_dict(), now):
        return way.to
    # The new view was sent before: now the browser has asked for it, or for another one, itself.
    if view == way.left or way.sent or now >= way.until:
        st.session_state.pop(_WAY)
    return None


def _went_back(left: str | None, view: str) -> None:
    """The browser's own way: what it still sends for the view it left has the address that it is at."""
    st.session_state.pop(_WAY, None)
    if left is not None and left != view:
        address = st.query_params.to_dict()
        to = f"{view}?{urlencode(address)}"
        st.session_state[_WAY] = Way(left, to, (address,), time.monotonic() + LATE_SECONDS)


def sent() -> None:
    """A view was made and sent to its end."""
    way: Way | None = st.session_state.get(_WAY)
    if way is not None and not way.sent:
        way.until, way.sent = time.monotonic() + THERE_SECONDS, True


def arrivals() -> int:
    """How often this session has come from one view to another, which takes what was there off the page."""
    count: int = st.session_state.get(_ARRIVALS, 0)
    return count
