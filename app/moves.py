"""Moves inside a view, and the address from before a move that a browser still sends for a moment.

A browser learns its new address when the new page begins to arrive. What it sends before (a key pressed, a
text kept) still carries the old address, which must not lead back to what was just left. Once the browser has
shown that it knows the new address, the old one means that somebody went back.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import streamlit as st

from app.whole import whole

LATE_SECONDS = 5.0
"""How long after a move a request may still carry the address from before it."""
NAMES = {"head": ("head",), "feature": ("sae", "feature")}
"""What an address says of where one is, for the views in which one moves from place to place."""
Address = dict[str, str | None]


@dataclass
class Move:
    """The last move in a view: addresses left within the last seconds, the one moved to, and since when."""

    to: Address
    left: list[Address]
    at: float = field(default_factory=time.monotonic)
    runs: int = 0

    def goes_to(self, here: Address) -> bool | None:
        """Whether a request with this address belongs where the move went; None = it does and knows so.

        >>> move = Move({"head": "L0H1"}, [{"head": "L0H0"}])
        >>> move.goes_to({"head": "L0H1"}), move.goes_to({"head": "L0H0"}), move.goes_to({"head": "L0H1"})
        (True, True, None)
        >>> Move({"head": "L0H1"}, [{"head": "L0H0"}]).goes_to({"head": "L5H0"})
        False
        """
        self.runs += 1
        if here == self.to:
            # The first of these is the request that moved: it holds the new address before the browser does.
            return None if self.runs > 1 else True
        return here in self.left and time.monotonic() - self.at < LATE_SECONDS


def _key(view: str) -> str:
    return f"moved in {view}"


def _here(view: str) -> Address:
    return {name: st.query_params.get(name) for name in NAMES[view]}


def _write(to: Mapping[str, str | None]) -> None:
    for name, value in to.items():
        if value is None:
            st.query_params.pop(name, None)
        else:
            st.query_params[name] = value


def expect(view: str, to: Mapping[str, str | None]) -> None:
    """From now on a request with the address of this moment means the one that is moved to."""
    if view not in NAMES:
        return
    aim: Address = {name: to.get(name) for name in NAMES[view]}
    before: Move | None = st.session_state.get(_key(view))
    left = [_here(view)]
    if before is not None and time.monotonic() - before.at < LATE_SECONDS:
        left += [*before.left, before.to]
    st.session_state[_key(view)] = Move(aim, [one for one in left if one != aim])


@whole
def move(view: str, to: Mapping[str, str | None]) -> None:
    """Show something else in this view; used as a callback. None takes a name out of the address."""
    expect(view, to)
    _write(to)


def arrive(view: str) -> None:
    """Right after a move, put the address that was moved to in the place of the one from before it."""
    moved: Move | None = st.session_state.get(_key(view))
    if moved is None:
        return
    belongs = moved.goes_to(_here(view))
    if belongs:
        _write(moved.to)
    else:
        st.session_state.pop(_key(view))


def stay(view: str, at: Mapping[str, str]) -> None:
    """Name in the address what the view shows, as where the last move led to."""
    moved: Move | None = st.session_state.get(_key(view))
    if moved is not None:
        moved.to = dict(at)
    _write(at)
