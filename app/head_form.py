"""The form in which a person says what a head does."""

from dataclasses import dataclass, replace
from functools import partial

import streamlit as st

from app import access, blind, moves, note_history, notes, others
from app.access import READ_ONLY
from app.colours import SEMANTICITY
from app.components import draw
from app.notes import Draft
from app.state import Scope, plain
from app.talk import talk
from app.verdicts import follows, verdict_list
from app.whole import whole
from atlas.db import adjudication, annotations, vocabulary
from atlas.db.notes import LABEL_LENGTH, MOST_WORDS, NOTES_LENGTH, HeadAnnotation
from atlas.db.places import HeadPlace
from atlas.judging import group_counts

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
    walk: tuple[tuple[int, int], ...] = ()
    """Every head in the order in which to go through them; empty = by layer and head."""

    @property
    def name(self) -> str:
        """Written as L5H3."""
        return f"L{self.layer}H{self.head}"

    def step(self, by: int) -> "Place":
        """The head that many places on, in the order of the walk, round the end."""
        if self.walk:
            at = self.walk.index((self.layer, self.head))
            layer, head = self.walk[(at + by) % self.n_all]
        else:
            layer, head = divmod((self.layer * self.n_heads + self.head + by) % self.n_all, self.n_heads)
        return replace(self, layer=layer, head=head)

    def next_open(self, done: set[tuple[int, int]]) -> "Place":
        """The next head that is not done; the very next one if all are."""
        for by in range(1, self.n_all):
            place = self.step(by)
            if (place.layer, place.head) not in done:
                return place
        return self.step(1)


@whole
def move(place: Place) -> None:
    """Show another head in this view; used as a callback."""
    moves.move("head", {"head": place.name})
    st.query_params.pop("layer", None)


def asked_head() -> str | None:
    """The head that the address names; right after a move, the one that was moved to."""
    moves.arrive("head")
    return st.query_params.get("head")


def _options(current: list[str], known: tuple[str, ...], suggested: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys([*current, *known, *suggested]))


def _label(draft: Draft[HeadAnnotation]) -> None:
    st.text_input(
        "Label", key=draft.key("label"), on_change=draft.autosave, live="700ms", max_chars=LABEL_LENGTH,
        placeholder="what this head does, in a few words",
    )  # fmt: skip


def _what_it_is(draft: Draft[HeadAnnotation], scope: Scope) -> None:
    save = draft.autosave
    known = vocabulary.known_groupings(scope.settings, scope.model.model)
    st.multiselect(
        "Groupings", _options(draft.get("groupings") or [], known, FAMILIES), key=draft.key("groupings"),
        on_change=save, accept_new_options=True, max_selections=MOST_WORDS,
        placeholder="choose, or type your own", help="of its top features; groups come here by themselves",
        filter_mode="contains", select_all=False,
    )  # fmt: skip
    with st.container(key="note_semanticity"):
        st.pills(
            "Semanticity", list(MEANINGS), key=draft.key("semanticity"), on_change=save,
            format_func=lambda name: SEMANTICITY[name].name,
            help="\n".join(f"- **{SEMANTICITY[k].name}**: {v}" for k, v in MEANINGS.items()),
        )  # fmt: skip


def _how_sure(draft: Draft[HeadAnnotation]) -> None:
    save = draft.autosave
    role = draft.get("role") or None
    with st.container(key="note_role"):
        st.selectbox(
            "Role", _options([role] if role else [], (), ROLES), index=None, key=draft.key("role"),
            on_change=save, accept_new_options=True, placeholder="a known role, if it has one",
        )  # fmt: skip
    with st.container(key="note_confidence"):
        st.segmented_control(
            "Confidence", [1, 2, 3, 4, 5], key=draft.key("confidence"), on_change=save,
            help="1: a guess, 5: sure",
        )  # fmt: skip
    with st.container(horizontal=True, key="note-marks"):
        with st.container(key="note_star", width="content"):
            st.toggle("Star", key=draft.key("star"), on_change=save, help="worth showing to others")
        with st.container(key="note_novel", width="content"):
            st.toggle("Novel", key=draft.key("novel"), on_change=save,
                      help="a grouping that no earlier head has")  # fmt: skip
    st.text_area(
        "Notes", key=draft.key("notes"), on_change=save, max_chars=NOTES_LENGTH, height=110,
        placeholder="free text in Markdown; Ctrl+Enter keeps it and goes on",
    )  # fmt: skip


def _status(draft: Draft[HeadAnnotation], who: str) -> None:
    stored = draft.stored
    if stored.version == 0:
        text = f"Nothing written yet. Changes are kept at once, as a draft by {who}. Press ? for the keys."
    else:
        when = stored.updated_at.strftime("%H:%M:%S") if stored.updated_at else ""
        minutes = stored.seconds_spent / 60
        text = f"{stored.status}, version {stored.version}, kept {when} UTC, {minutes:.1f} min, by {who}"
    st.caption(plain(text))


def _others(scope: Scope, place: Place, who: str) -> None:
    at = HeadPlace(scope.model.model, place.layer, place.head)
    decided = adjudication.load_decision(scope.settings, at)
    others.agreed(decided, "" if decided is None else SEMANTICITY[decided.semanticity].name)
    found = annotations.list_heads(scope.settings, scope.model.model, layer=place.layer, head=place.head)
    others.written([_told(note) for note in found if note.annotator != who])


def _told(note: HeadAnnotation) -> str:
    judged = SEMANTICITY[note.semanticity].name
    said = ", ".join(f"{word} {n}" for word, n in group_counts(note.verdicts))
    return f"{note.annotator} ({note.status}, {judged}): {note.label or '–'}\n{said}\n{note.notes}"


@whole
def _finish(draft: Draft[HeadAnnotation], onward: Place | None) -> None:
    """Save as done; go on to the next head if that worked. A note with nothing in it is not done."""
    if draft.is_blank():
        draft.put("error", "nothing was written about this head yet; write a label or judge a feature first")
        return
    if draft.save({"status": "done", **follows(draft)}) and onward is not None:
        move(onward)


@whole
def _reopen(draft: Draft[HeadAnnotation]) -> None:
    draft.save({"status": "draft"})


def _buttons(draft: Draft[HeadAnnotation], onward: Place) -> None:
    one, two = st.columns([1, 1.5])
    one.button(
        "Save", key="note_save", shortcut="Ctrl+S", width="stretch", on_click=_finish, args=(draft, None)
    )
    two.button(
        "Save, next", key="note_next", type="primary", shortcut="Ctrl+Enter", width="stretch",
        on_click=_finish, args=(draft, onward),
    )  # fmt: skip


def _acts(draft: Draft[HeadAnnotation], place: Place, onward: Place, unseen: Place) -> draw.Acts:
    """What the keys of the form do; the buttons beside it do the same."""
    return {
        "save": partial(_finish, draft, None), "next": partial(_finish, draft, onward),
        "before": partial(move, place.step(-1)), "after": partial(move, place.step(1)),
        "unseen": partial(move, unseen), "undo": draft.undo, "redo": draft.redo,
    }  # fmt: skip


def _below(draft: Draft[HeadAnnotation], scope: Scope, place: Place, who: str) -> None:
    """What belongs to the note and is not typed into it: its state, undo, history, and other people."""
    _status(draft, who)
    with st.container(horizontal=True, vertical_alignment="center", key="note-more"):
        note_history.buttons(draft)
        if draft.stored.status == "done":
            st.button("Back to draft", key="note_reopen", type="tertiary", on_click=_reopen, args=(draft,))
        blind.switch()
    note_history.history(draft)
    if blind.hides_head(scope.settings, scope.model.model, place.layer, place.head, who):
        st.caption(blind.SAID)
        return
    _others(scope, place, who)
    talk(scope.settings, HeadPlace(scope.model.model, place.layer, place.head), who)


def head_form(scope: Scope, place: Place, who: str, done: frozenset[tuple[int, int]]) -> None:
    """The form for one head; every change is kept as a draft, Save marks the head as done."""
    if not access.can("annotate"):
        st.caption(READ_ONLY)
        _others(scope, place, "")
        return
    draft = notes.head_draft(scope.settings, scope.model.model, place.layer, place.head, who)
    draft.open()
    with st.container(key="note-form"):
        notes.show_state(draft)
        ref = scope.z_saes.get(place.layer)
        with st.container(key="note-grid"):
            _label(draft)
            if ref is not None:
                with st.container(key="note-verdicts"):
                    verdict_list(draft, scope, ref, place.head, who)
            _what_it_is(draft, scope)
            _how_sure(draft)
        onward = place.next_open({*done, (place.layer, place.head)})
        _buttons(draft, onward)
        draw.form_keys(
            "typing", place.name, draft.prefix, _acts(draft, place, onward, place.next_open({*done}))
        )
        _below(draft, scope, place, who)
