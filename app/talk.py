"""Comments beside a head or a feature."""

import html

import streamlit as st

from app import access
from app.state import plain
from app.whole import whole
from atlas.db import comments
from atlas.db.comments import COMMENT_LENGTH
from atlas.db.places import Place
from atlas.errors import AtlasError
from atlas.settings import Settings


@whole
def _say(settings: Settings, place: Place, who: str, key: str) -> None:
    text = st.session_state[key] or ""
    if not text.strip():
        return
    try:
        comments.add_comment(settings, place, who, text)
    except AtlasError as error:
        st.session_state[f"{key} error"] = str(error)
        return
    st.session_state[f"{key} error"] = None
    st.session_state[key] = ""


def talk(settings: Settings, place: Place, who: str) -> None:
    """What was said about a head or a feature, folded away, with a field to add to it."""
    said = comments.list_comments(settings, place)
    shown = [one for one in said if not one.withdrawn]
    may = access.can("annotate")
    if not shown and not may:
        return
    with st.container(key="note-talk"), st.expander(f"Comments ({len(shown)})", key=f"talk {place.text}"):
        for one in said:
            body = "<i>withdrawn</i>" if one.withdrawn else html.escape(one.body)
            when = one.created_at.strftime("%Y-%m-%d %H:%M")
            st.html(f'<div class="ha-said"><b>{html.escape(one.author)}</b> <span>{when}</span>'
                    f'<div dir="auto">{body}</div></div>')  # fmt: skip
            if may and one.author == who and not one.withdrawn:
                st.button(
                    "Withdraw", key=f"withdraw {one.id}", type="tertiary",
                    on_click=comments.withdraw_comment, args=(settings, one.id, who),
                )  # fmt: skip
        if may:
            key = f"comment on {place.text}"
            st.text_area(
                "Comment", key=key, max_chars=COMMENT_LENGTH, height=68, label_visibility="collapsed",
                placeholder="a question or remark, seen by everybody; Ctrl+Enter sends it",
                persist_state="session",
            )  # fmt: skip
            st.button("Comment", key=f"say {key}", on_click=_say, args=(settings, place, who, key))
            if error := st.session_state.get(f"{key} error"):
                st.error(plain(error))
