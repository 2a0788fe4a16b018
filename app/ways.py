"""The way from one view to another, and the request from before it that would lead back.

What the browser sends while another view is on its way to it (a text that is kept) still names the view
that was left; the run that answers it would show that one again, and the press that led on would seem to
have done nothing. Within a view, :mod:`app.moves` does the same for places.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

LATE_SECONDS = 5.0
"""How long after a way began a request may still name the view from before it, if none named the new one."""
_WAY = "way to another view"
_VIEW = "view"
_ARRIVALS = "arrivals in a view"
Address = dict[str, str]


@dataclass
class Way:
    """The last way: the view it left, the address it led to, what the browser's address may be meanwhile.

    ``own`` counts the runs for the new view that the way itself asked for and that have not come yet: any
    other one was asked for by a browser that is there, and what that asks for next is meant.
    """

    left: str
    to: str
    meanwhile: tuple[Address, ...]
    at: float = field(default_factory=time.monotonic)
    own: int = 0

    def is_late(self, view: str, here: Mapping[str, str], now: float) -> bool:
        """Whether a request for this view, with this address, is one from before the way.

        >>> way = Way("head", "feature?feature=3", ({"head": "L0H1"}, {"feature": "3"}), at=10.0)
        >>> way.is_late("head", {"head": "L0H1"}, 10.2), way.is_late("head", {"feature": "3"}, 10.2)
        (True, True)
        >>> way.is_late("head", {"head": "L0H1"}, 15.2), way.is_late("head", {}, 10.2)
        (False, False)
        >>> way.is_late("feature", {"feature": "3"}, 10.2)
        False
        """
        return view == self.left and dict(here) in self.meanwhile and now - self.at < LATE_SECONDS

    def is_over(self, view: str, now: float) -> bool:
        """Whether the browser is known to be there, or somewhere else on purpose.

        >>> way = Way("head", "feature?feature=3", (), at=10.0, own=1)
        >>> way.is_over("feature", 10.1), way.is_over("feature", 10.2)
        (False, True)
        >>> Way("head", "feature?feature=3", (), at=10.0, own=1).is_over("head", 10.1)
        True
        """
        if view == self.left or now - self.at >= LATE_SECONDS:
            return True
        self.own -= 1
        return self.own < 0


def begin(view: str, to: str, address: Address) -> None:
    """From now on, for a moment, a request for the view of this run means the one that is gone to."""
    way: Way | None = st.session_state.get(_WAY)
    if way is None or way.to != to:
        left: str | None = st.session_state.get(_VIEW)
        if left is None or left == view:
            return
        way = st.session_state[_WAY] = Way(left, to, (st.query_params.to_dict(), address))
    way.own += 1


def arrive(view: str) -> str | None:
    """Take down which view this run is for; the address to go to where that is the one that was just left.

    Who goes back with the browser's own button means it.
    """
    if st.session_state.get(_VIEW) != view:
        st.session_state[_ARRIVALS] = arrivals() + 1
    st.session_state[_VIEW] = view
    way: Way | None = st.session_state.get(_WAY)
    if way is None:
        return None
    back = getattr(get_script_run_ctx(suppress_warning=True), "is_history_navigation", False)
    now = time.monotonic()
    if not back and way.is_late(view, st.query_params.to_dict(), now):
        return way.to
    if back or way.is_over(view, now):
        st.session_state.pop(_WAY)
    return None


def arrivals() -> int:
    """How often this session has come from one view to another, which takes what was there off the page."""
    count: int = st.session_state.get(_ARRIVALS, 0)
    return count
