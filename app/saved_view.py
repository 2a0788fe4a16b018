"""Saved questions in a column: one's own and shared ones, and a form to keep the one that is shown."""

from collections.abc import Callable

import streamlit as st

from app import state, style
from atlas.db import saved
from atlas.db.saved import Saved
from atlas.errors import AtlasError
from atlas.settings import load_settings


def _keep(kind: str, body: str, who: str) -> None:
    name, shared = st.session_state[f"{kind}_name"], st.session_state.get(f"{kind}_shared", False)
    try:
        saved.save_question(load_settings(), kind, who, name, body, shared=shared)
        st.session_state[f"{kind}_said"] = f"Kept as {name!r}."
        st.session_state[f"{kind}_name"] = ""
    except AtlasError as error:
        st.session_state[f"{kind}_said"] = str(error)


def _drop(kind: str, one: Saved) -> None:
    saved.delete_question(load_settings(), kind, one.author, one.name)


def _listed(kind: str, who: str, open_: Callable[[str], None]) -> None:
    for one in saved.list_questions(load_settings(), kind, who):
        own = one.author == who
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            told = "" if own else f" · {one.author}"
            st.button(
                state.plain(f"{one.name}{told}"), type="tertiary", on_click=open_, args=(one.body,),
                key=f"open_{kind}_{one.author}_{one.name}", help="all see it" if one.shared else "only mine",
            )  # fmt: skip
            if own:
                st.button(
                    "Delete", icon=":material/delete:", type="tertiary", on_click=_drop, args=(kind, one),
                    key=f"drop_{kind}_{one.name}", help=f"delete {one.name!r}",
                )  # fmt: skip


def saved_questions(kind: str, body: str, open_: Callable[[str], None], *, can_save: bool) -> None:
    """The saved questions of a kind; ``open_`` gets the body of the one that is clicked."""
    who = state.annotator(load_settings())
    style.section("Saved", "one's own and shared ones")
    with st.container(key=f"saved-{kind}"):
        _listed(kind, who, open_)
    if not can_save:
        return
    with st.popover("Keep this one", icon=":material/bookmark:", disabled=not body):
        st.text_input("Name", key=f"{kind}_name", max_chars=saved.NAME_LENGTH)
        st.toggle("Let everybody see it", key=f"{kind}_shared")
        st.button("Keep", on_click=_keep, args=(kind, body, who), type="primary", key=f"{kind}_keep")
    said = st.session_state.pop(f"{kind}_said", None)
    if said:
        st.caption(state.plain(said))
