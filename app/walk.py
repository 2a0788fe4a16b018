"""In which order this session goes through the heads: by layer, at random by a seed, or by dispute."""

import streamlit as st

from app.state import Scope
from atlas.db.comparing import disputed_heads
from atlas.db.queues import ORDERS, Head, ordered

_CHOICE = "order of heads"


def choice() -> tuple[str, int]:
    """The order and its seed: as the address says (``order=random&seed=3``), else as chosen before."""
    order, seed = st.query_params.get("order"), st.query_params.get("seed", "0")
    if order in ORDERS:
        st.session_state[_CHOICE] = (order, int(seed) if seed.isascii() and seed.isdigit() else 0)
    return st.session_state.get(_CHOICE, ("layer", 0))


def choose(order: str, seed: int) -> None:
    """Go through the heads in this order from now on; the address carries it, so that a reload keeps it."""
    st.session_state[_CHOICE] = (order, seed)
    write_address()


def write_address() -> None:
    """Name the order in the address where it is not the usual one."""
    order, seed = st.session_state.get(_CHOICE, ("layer", 0))
    for name in ("order", "seed"):
        st.query_params.pop(name, None)
    if order != "layer":
        st.query_params["order"] = order
    if order == "random":
        st.query_params["seed"] = str(seed)


def walk(scope: Scope, order: str, seed: int) -> tuple[Head, ...]:
    """Every head of the model in an order."""
    distances = {}
    if order == "disagreement":
        found = disputed_heads(scope.settings, scope.model.model)
        distances = {one.head: one.distance for one in found}
    return tuple(ordered(scope.model.n_layers, scope.model.n_heads, order, seed, distances))


def current(scope: Scope) -> tuple[Head, ...]:
    """The heads in the order that this session goes through them; empty where it is by layer."""
    order, seed = choice()
    write_address()
    return () if order == "layer" else walk(scope, order, seed)
