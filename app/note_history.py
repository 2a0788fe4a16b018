"""What was saved of a note and when, each save with what it changed, and the way back to it."""

import html
from itertools import pairwise
from typing import Any

import streamlit as st

from app.notes import Draft
from app.state import plain
from atlas.db.annotations import Saved
from atlas.db.changes import Change, changes, condensed

SHOWN = 12
_CONTEXT = 60
"""Characters of unchanged text that are shown on each side of a change."""


def _kept(text: str, first: bool, last: bool) -> str:
    """Unchanged text, with its middle or far end left out where it is long."""
    if len(text) <= 2 * _CONTEXT:
        return text
    before = "" if first else text[:_CONTEXT] + " "
    after = "" if last else " " + text[-_CONTEXT:]
    return f"{before}⋯{after}"


def change_html(change: Change) -> str:
    """One changed field with what went and what came; everything escaped.

    >>> change_html(Change("label", (("=", "of "), ("-", "<b>"), ("+", "x"))))
    '<dt>label</dt><dd>of <del>&lt;b&gt;</del><ins>x</ins></dd>'
    """
    parts = []
    n = len(change.pieces)
    for i, (mark, text) in enumerate(change.pieces):
        if mark == "=":
            parts.append(html.escape(_kept(text, i == 0, i == n - 1)))
        else:
            tag = "del" if mark == "-" else "ins"
            parts.append(f"<{tag}>{html.escape(text)}</{tag}>")
    return f"<dt>{html.escape(change.field)}</dt><dd>{''.join(parts)}</dd>"


def save_html(before: Saved | None, save: Saved) -> str:
    """One save: when, and what it changed."""
    found = changes(before.payload if before else None, save.payload)
    inner = "".join(map(change_html, found)) or "<dd>nothing but the time spent</dd>"
    when = save.saved_at.strftime("%Y-%m-%d %H:%M:%S")
    return f'<div class="ha-save"><b>version {save.version}</b> <span>{when} UTC</span><dl>{inner}</dl></div>'


def buttons(draft: Draft[Any]) -> None:
    """Undo and redo; Z and Shift+Z press them."""
    with st.container(horizontal=True, gap="small", key="note-undo"):
        st.button(
            "Undo", key="note_undo", icon=":material/undo:", type="tertiary", on_click=draft.undo,
            disabled=draft.shown_version <= 1, help="back to the save before (Z)",
        )  # fmt: skip
        st.button(
            "Redo", key="note_redo", icon=":material/redo:", type="tertiary", on_click=draft.redo,
            disabled=not draft.get("shown") or draft.shown_version + 1 >= draft.stored.version,
            help="forward again (Shift+Z)",
        )  # fmt: skip


def history(draft: Draft[Any]) -> None:
    """The saves of a note, the newest first, unfolded on demand; each can be restored."""
    if draft.stored.version < 2:
        return
    with st.expander("History", key=draft.key("history"), on_change="rerun") as box:
        if not box.open:
            return
        saves = list(draft.history())
        kept = condensed(saves)
        steps = [(a, b) for a, b in pairwise([None, *kept]) if b is not None][::-1]
        for before, save in steps[:SHOWN]:
            st.html(save_html(before, save))
            if save.version != draft.stored.version:
                st.button(
                    f"Restore version {save.version}", key=draft.key(f"restore {save.version}"),
                    type="tertiary", on_click=draft.restore, args=(save.version,),
                )  # fmt: skip
        if len(steps) > SHOWN:
            st.caption(plain(f"{len(steps) - SHOWN} earlier ones are in annotation_history (SQL view)."))
