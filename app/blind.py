"""Judging blind: what others wrote and what is known stays hidden until one's own verdict is saved."""

import streamlit as st

from app.whole import whole
from atlas.db import annotations
from atlas.settings import Settings

SAID = "Blind: scores, families and what others wrote are hidden until you save this head as done."
SAID_FEATURE = "Blind: families, labels and what others wrote are hidden until you rate this feature."
_CHOICE = "judges blind"


def is_on() -> bool:
    """Whether this session judges blind: by its switch, else by the address (``blind=1``)."""
    if _CHOICE not in st.session_state:
        st.session_state[_CHOICE] = st.query_params.get("blind") == "1"
    return bool(st.session_state[_CHOICE])


def hides_head(settings: Settings, model: str, layer: int, head: int, who: str) -> bool:
    """Whether a head's scores, families and other people's words are to be hidden from an annotator."""
    if not is_on():
        return False
    note = annotations.load_head(settings, model, layer, head, who)
    return note is None or note.status != "done"


def hides_feature(settings: Settings, sae: str, feature: int, who: str) -> bool:
    """Whether a feature's families and other people's words are to be hidden: until one rated it oneself."""
    if not is_on():
        return False
    note = annotations.load_feature(settings, sae, feature, who)
    return note is None or note.interpretability is None


@whole
def _switched() -> None:
    st.session_state[_CHOICE] = st.session_state["blind_switch"]
    if st.session_state[_CHOICE]:
        st.query_params["blind"] = "1"
    else:
        st.query_params.pop("blind", None)


def switch(told: str = SAID) -> None:
    """The switch for it; the address carries it, so that a reload keeps it."""
    on = is_on()
    if on:
        st.query_params["blind"] = "1"
    st.session_state["blind_switch"] = on
    st.toggle("Blind", key="blind_switch", on_change=_switched, help=told)
