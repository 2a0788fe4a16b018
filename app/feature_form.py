"""The form in which a person says what a feature stands for, and what other people say of it."""

from collections.abc import Callable
from functools import partial

import streamlit as st

from app import access, blind, moves, note_history, notes, others
from app.access import READ_ONLY
from app.components import draw
from app.notes import Draft
from app.state import Scope, plain
from app.talk import talk
from app.whole import whole
from atlas.db import adjudication, annotations, vocabulary
from atlas.db.models import INTERPRETABILITY
from atlas.db.notes import LABEL_LENGTH, MOST_WORDS, NOTES_LENGTH, FeatureAnnotation
from atlas.db.places import FeaturePlace
from atlas.store.queries import features
from atlas.store.queries.overview import SaeRef

RATINGS = {"interpretable": "interpretable", "partly": "partly", "uninterpretable": "not interpretable"}
_SUGGESTED = 60
"""Tags in use that are offered; the rest can still be typed."""


def move(sae: str, feature: int | None) -> None:
    """Show another feature in this view (None: the SAE's strongest); used as a callback."""
    moves.move("feature", {"sae": sae, "feature": None if feature is None else str(feature)})


def next_open(scope: Scope, ref: SaeRef, number: int, who: str) -> int | None:
    """The next firing feature that this annotator has not rated, round the end; None if all are."""
    notes_here = annotations.list_features(scope.settings, ref.sae, annotator=who)
    rated = {note.feature for note in notes_here if note.interpretability is not None}
    left = [one for one in scope.ask(features.firing, ref.sae) if one not in rated and one != number]
    return min(left, key=lambda one: (one < number, one), default=None)


@whole
def _go_open(scope: Scope, ref: SaeRef, number: int, who: str) -> None:
    found = next_open(scope, ref, number, who)
    if found is not None:
        move(ref.sae, found)


@whole
def _finish(draft: Draft[FeatureAnnotation], onward: int | None) -> None:
    """Keep what is typed; go on to the next feature if that worked."""
    if onward is None and draft.is_blank() and draft.stored.version == 0:
        draft.put("error", "nothing was written about this feature yet; write a label or rate it first")
    elif draft.save() and onward is not None:
        move(draft.blank.sae, onward)


def _acts(
    draft: Draft[FeatureAnnotation], scope: Scope, ref: SaeRef, onward: int | None
) -> dict[str, Callable[[], object]]:
    """What the keys of the form do; the buttons beside it do the same."""
    who, number = draft.blank.annotator, draft.blank.feature
    acts: dict[str, Callable[[], object]] = {
        "save": partial(_finish, draft, None), "undo": draft.undo, "redo": draft.redo,
        "unseen": partial(_go_open, scope, ref, number, who),
    }  # fmt: skip
    before, _ = scope.ask(features.alive_around, ref.sae, number)
    if before is not None:
        acts["before"] = partial(move, ref.sae, before)
    if onward is not None:
        acts |= {"after": partial(move, ref.sae, onward), "next": partial(_finish, draft, onward)}
    return acts


def _fields(draft: Draft[FeatureAnnotation], scope: Scope, ref: SaeRef) -> None:
    save = draft.autosave
    with st.container(key="form"):
        one, two, three, four = st.columns([2, 2, 1.9, 2.2])
    one.text_input(
        "Label", key=draft.key("label"), on_change=save, live="700ms", max_chars=LABEL_LENGTH,
        placeholder="what this feature stands for",
    )  # fmt: skip
    known = vocabulary.known_tags(scope.settings, ref.sae)[:_SUGGESTED]
    with two, st.container(key="note_tags"):
        st.multiselect(
            "Tags", list(dict.fromkeys([*(draft.get("tags") or []), *known])), key=draft.key("tags"),
            on_change=save, accept_new_options=True, max_selections=MOST_WORDS, placeholder="type your own",
            filter_mode="contains", select_all=False,
        )  # fmt: skip
    with three, st.container(key="note_rating"):
        st.pills(
            "Rating", list(INTERPRETABILITY), key=draft.key("interpretability"), on_change=save,
            format_func=RATINGS.__getitem__, help="can one say what it stands for? Keys 1, 2, 3",
        )  # fmt: skip
    four.text_area(
        "Notes", key=draft.key("notes"), on_change=save, max_chars=NOTES_LENGTH, height=72,
        placeholder="free text in Markdown",
    )  # fmt: skip


def _status(draft: Draft[FeatureAnnotation], who: str) -> str:
    stored = draft.stored
    if stored.version == 0:
        return f"Nothing written yet. Changes are kept at once, by {who}. Press ? for the keys."
    when = stored.updated_at.strftime("%H:%M:%S") if stored.updated_at else ""
    return f"version {stored.version}, kept {when} UTC, by {who}"


def _buttons(draft: Draft[FeatureAnnotation], onward: int | None, unseen: partial[None]) -> None:
    """Undo, blind, save and the ways on, in one line with what is kept."""
    with st.container(horizontal=True, vertical_alignment="center", key="note-more"):
        st.caption(plain(_status(draft, draft.blank.annotator)), width="content")
        note_history.buttons(draft)
        blind.switch(blind.SAID_FEATURE)
        st.button(
            "Next unrated", key="unseen", on_click=unseen, help="next feature that you have not rated (U)"
        )
        st.button("Save", key="note_save", shortcut="Ctrl+S", on_click=_finish, args=(draft, None))
        st.button(
            "Save, next", key="note_next", type="primary", shortcut="Ctrl+Enter", on_click=_finish,
            args=(draft, onward), disabled=onward is None,
        )  # fmt: skip


def _others(scope: Scope, ref: SaeRef, number: int, who: str) -> None:
    decided = adjudication.load_decision(scope.settings, FeaturePlace(ref.sae, number))
    others.agreed(decided, "" if decided is None else _judged(decided.interpretability))
    found = annotations.list_features(scope.settings, ref.sae, feature=number)
    others.written([_told(note) for note in found if note.annotator != who])


def _judged(rating: str | None) -> str:
    return RATINGS.get(rating or "", "not rated")


def _told(note: FeatureAnnotation) -> str:
    head = f"{note.annotator} ({_judged(note.interpretability)}): {note.label or '–'}"
    return f"{head}\n{', '.join(note.tags)}\n{note.notes}"


def feature_form(scope: Scope, ref: SaeRef, number: int, who: str, onward: int | None) -> None:
    """The form for one feature; every change is kept at once. ``onward`` is the next feature that fires."""
    if not access.can("annotate"):
        st.caption(READ_ONLY)
        _others(scope, ref, number, "")
        talk(scope.settings, FeaturePlace(ref.sae, number), who)
        return
    draft = notes.feature_draft(scope.settings, ref.sae, number, who)
    draft.open()
    with st.container(key="note-form"):
        notes.show_state(draft)
        _fields(draft, scope, ref)
        _buttons(draft, onward, partial(_go_open, scope, ref, number, who))
        acts = _acts(draft, scope, ref, onward)
        draw.form_keys("typing", f"{ref.sae} {number}", draft.prefix, acts, "feature")
        hidden = blind.hides_feature(scope.settings, ref.sae, number, who)
        with st.container(key="note-beside"):
            if hidden:
                st.caption(blind.SAID_FEATURE)
            one, two, three = st.columns(3)
        with one:
            note_history.history(draft)
        if hidden:
            return
        with two:
            _others(scope, ref, number, who)
        with three:
            talk(scope.settings, FeaturePlace(ref.sae, number), who)
