"""The form in which a person says what a head does."""

from dataclasses import dataclass

import streamlit as st

from app import access, notes
from app.access import READ_ONLY
from app.colours import SEMANTICITY
from app.components import draw
from app.notes import Draft
from app.state import Scope, plain
from atlas.db import annotations, vocabulary
from atlas.db.notes import LABEL_LENGTH, MOST_WORDS, NOTES_LENGTH, HeadAnnotation

FAMILIES = (
    "induction", "previous token", "duplicate token", "successor", "copy suppression", "single token",
    "bigram", "local context", "long-range context", "syntax", "punctuation", "code", "documentation",
    "names", "numbers", "time and place", "position", "BOS",
)  # fmt: skip
ROLES = (
    "induction", "previous token", "duplicate token", "successor", "copy suppression", "name mover",
    "attends to BOS", "local context", "long-range context",
)  # fmt: skip
MEANINGS = {
    "monosemantic": "all of its top features do one thing",
    "nearly_monosemantic": "all but one or two features do one thing",
    "bisemantic": "two unrelated things",
    "polysemantic": "many unrelated things",
    "unclear": "the top features do not tell",
}


@dataclass(frozen=True)
class Place:
    """A head of a model, and how to move on from it."""

    layer: int
    head: int
    n_heads: int
    n_all: int

    @property
    def name(self) -> str:
        """Written as L5H3."""
        return f"L{self.layer}H{self.head}"

    def step(self, by: int) -> "Place":
        """The head that many places on, in reading order, round the end."""
        layer, head = divmod((self.layer * self.n_heads + self.head + by) % self.n_all, self.n_heads)
        return Place(layer, head, self.n_heads, self.n_all)

    def next_open(self, done: set[tuple[int, int]]) -> "Place":
        """The next head that is not done; the very next one if all are."""
        for by in range(1, self.n_all):
            place = self.step(by)
            if (place.layer, place.head) not in done:
                return place
        return self.step(1)


def move(place: Place) -> None:
    """Show another head in this view; used as a callback."""
    st.query_params.pop("layer", None)
    st.query_params["head"] = place.name


def _options(current: list[str], known: tuple[str, ...], suggested: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys([*current, *known, *suggested]))


def _fields(draft: Draft[HeadAnnotation], scope: Scope) -> None:
    save = draft.autosave
    st.text_input(
        "Label", key=draft.key("label"), on_change=save, live="700ms", max_chars=LABEL_LENGTH,
        placeholder="what this head does, in a few words",
    )  # fmt: skip
    st.pills(
        "Semanticity", list(MEANINGS), key=draft.key("semanticity"), on_change=save,
        format_func=lambda name: SEMANTICITY[name].name,
        help="\n".join(f"- **{SEMANTICITY[k].name}**: {v}" for k, v in MEANINGS.items()),
    )  # fmt: skip
    known = vocabulary.known_groupings(scope.settings, scope.model.model)
    st.multiselect(
        "Groupings of its top features", _options(draft.get("groupings") or [], known, FAMILIES),
        key=draft.key("groupings"), on_change=save, accept_new_options=True, max_selections=MOST_WORDS,
        placeholder="choose, or type your own",
    )  # fmt: skip
    role = draft.get("role") or None
    st.selectbox(
        "Role", _options([role] if role else [], (), ROLES), index=None, key=draft.key("role"),
        on_change=save, accept_new_options=True, placeholder="a known role, if it has one",
    )  # fmt: skip
    st.segmented_control(
        "Confidence", [1, 2, 3, 4, 5], key=draft.key("confidence"), on_change=save,
        help="1: a guess, 5: sure",
    )  # fmt: skip
    one, two = st.columns(2)
    one.toggle("Star", key=draft.key("star"), on_change=save, help="worth showing to others")
    two.toggle("Novel", key=draft.key("novel"), on_change=save, help="a grouping that no earlier head has")
    st.text_area(
        "Notes", key=draft.key("notes"), on_change=save, max_chars=NOTES_LENGTH, height=110,
        placeholder="free text; Ctrl+Enter keeps it and goes on",
    )  # fmt: skip


def _status(draft: Draft[HeadAnnotation], who: str) -> None:
    stored = draft.stored
    if stored.version == 0:
        text = f"Nothing written yet. Changes are kept at once, as a draft by {who}. E goes to the label."
    else:
        when = stored.updated_at.strftime("%H:%M:%S") if stored.updated_at else ""
        minutes = stored.seconds_spent / 60
        text = f"{stored.status}, version {stored.version}, kept {when} UTC, {minutes:.1f} min, by {who}"
    st.caption(plain(text))


def _others(scope: Scope, place: Place, who: str) -> None:
    notes_here = annotations.list_heads(scope.settings, scope.model.model, layer=place.layer, head=place.head)
    others = [note for note in notes_here if note.annotator != who]
    if not others:
        return
    with st.expander(f"What others wrote ({len(others)})"):
        for note in others:
            judged = SEMANTICITY[note.semanticity].name
            st.text(f"{note.annotator} ({note.status}, {judged}): {note.label or '–'}\n{note.notes}".strip())


def _finish(draft: Draft[HeadAnnotation], onward: Place | None) -> None:
    """Save as done; go on to the next head if that worked."""
    if draft.save({"status": "done"}) and onward is not None:
        move(onward)


def _reopen(draft: Draft[HeadAnnotation]) -> None:
    draft.save({"status": "draft"})


def head_form(scope: Scope, place: Place, who: str, done: frozenset[tuple[int, int]]) -> None:
    """The form for one head; every change is kept as a draft, Save marks the head as done."""
    if not access.can("annotate"):
        st.caption(READ_ONLY)
        _others(scope, place, "")
        return
    draft = notes.head_draft(scope.settings, scope.model.model, place.layer, place.head, who)
    draft.open()
    notes.show_state(draft)
    with st.container(key="note-grid"):
        _fields(draft, scope)
    onward = place.next_open({*done, (place.layer, place.head)})
    one, two = st.columns([1, 1.5])
    one.button(
        "Save", key="note_save", shortcut="Ctrl+S", width="stretch", on_click=_finish, args=(draft, None)
    )
    two.button(
        "Save, next", key="note_next", type="primary", shortcut="Ctrl+Enter", width="stretch",
        on_click=_finish, args=(draft, onward),
    )  # fmt: skip
    draw.keep_typing("typing")
    _status(draft, who)
    if draft.stored.status == "done":
        st.button("Back to draft", key="note_reopen", type="tertiary", on_click=_reopen, args=(draft,))
    _others(scope, place, who)
