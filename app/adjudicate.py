"""The verdict agreed on for a head: shown, and stored by who may adjudicate."""

from typing import Any

import streamlit as st

from app.colours import SEMANTICITY
from app.state import Scope, plain
from atlas.db import adjudication, vocabulary
from atlas.db.adjudication import Decision
from atlas.db.comparing import Disputed
from atlas.db.notes import LABEL_LENGTH, MOST_WORDS, NOTES_LENGTH
from atlas.db.places import HeadPlace
from atlas.errors import AtlasError


def _start(one: Disputed, decided: Decision | None) -> dict[str, Any]:
    """What the form begins with: the last decision, else what all notes have in common."""
    if decided is not None:
        return {
            "label": decided.label, "groupings": list(decided.groupings), "semanticity": decided.semanticity,
            "role": decided.role or None, "reason": decided.reason,
        }  # fmt: skip
    classes, roles = {n.semanticity for n in one.notes}, {n.role for n in one.notes}
    labels = {n.label for n in one.notes}
    shared = [w for w in one.notes[0].groupings if all(w in n.groupings for n in one.notes)]
    return {
        "label": labels.pop() if len(labels) == 1 else "", "groupings": shared,
        "semanticity": classes.pop() if len(classes) == 1 else None,
        "role": (roles.pop() or None) if len(roles) == 1 else None, "reason": "",
    }  # fmt: skip


def _decide(scope: Scope, place: HeadPlace, who: str, version: int, key: str) -> None:
    def typed(name: str) -> Any:
        return st.session_state.get(f"{key} {name}")

    one = Decision(
        place, who, typed("label") or "", tuple(typed("groupings") or ()), typed("semanticity"),
        typed("role") or "", None, typed("reason") or "",
    )  # fmt: skip
    try:
        adjudication.decide(scope.settings, one, version)
        st.session_state[f"{key} error"] = None
    except AtlasError as error:
        st.session_state[f"{key} error"] = str(error)


def decision_box(scope: Scope, one: Disputed, who: str) -> None:
    """The decision on a head, with a form for it where ``who`` is given."""
    place = HeadPlace(scope.model.model, *one.head)
    made = adjudication.decisions(scope.settings, place)
    decided = made[-1] if made else None
    if decided is not None:
        when = decided.decided_at.strftime("%Y-%m-%d %H:%M") if decided.decided_at else ""
        st.success(
            f"Agreed by {plain(decided.adjudicator)}, {when} UTC, version {decided.version}: "
            f"{plain(decided.label or '–')} ({SEMANTICITY[decided.semanticity].name})"
        )
    if not who:
        if decided is None:
            st.caption("Nothing agreed on yet; an admin can decide.")
        return
    version = decided.version if decided else 0
    key = f"decide {place.text} {version}"
    start = _start(one, decided)
    for name, value in start.items():
        st.session_state.setdefault(f"{key} {name}", value)
    known = [*vocabulary.known_groupings(scope.settings, scope.model.model), *start["groupings"]]
    roles = sorted({note.role for note in one.notes if note.role} | ({start["role"]} - {None}))
    with st.form(f"form {key}", border=True):
        left, right = st.columns(2)
        left.text_input("Agreed label", key=f"{key} label", max_chars=LABEL_LENGTH)
        right.selectbox("Class", list(SEMANTICITY)[:-1], key=f"{key} semanticity", index=None,
                        format_func=lambda name: SEMANTICITY[name].name)  # fmt: skip
        left.multiselect(
            "Agreed groupings", list(dict.fromkeys(known)), key=f"{key} groupings", accept_new_options=True,
            max_selections=MOST_WORDS, filter_mode="contains", select_all=False,
        )  # fmt: skip
        right.selectbox("Agreed role", roles, key=f"{key} role", index=None, accept_new_options=True)
        st.text_area("Why", key=f"{key} reason", max_chars=NOTES_LENGTH, height=68)
        st.form_submit_button(
            "Decide" if decided is None else "Decide anew", type="primary", on_click=_decide,
            args=(scope, place, who, version, key),
        )  # fmt: skip
    if error := st.session_state.get(f"{key} error"):
        st.error(plain(error))
