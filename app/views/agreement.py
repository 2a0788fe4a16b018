"""Where annotators agree and where they do not, and the verdict that is agreed on in the end."""

from collections.abc import Sequence
from math import isnan

import pyarrow as pa
import streamlit as st

from app import access, adjudicate, blind, navigation, state, style
from app.colours import SEMANTICITY
from app.state import Scope, plain
from atlas.db import comparing
from atlas.db.adjudication import head_decisions
from atlas.db.comparing import Agreement, Disputed
from atlas.db.notes import HeadAnnotation
from atlas.db.vocabulary import same_words
from atlas.judging import group_counts

MEANING = (
    "1: always equal, 0: as chance would give. Alpha takes every head with two finished notes or more; "
    "Cohen's kappa needs exactly two annotators, Fleiss' kappa the heads that all of them finished. Empty: "
    "nothing follows, as when all judgements are one value."
)


def _number(value: float) -> float | None:
    return None if isnan(value) else value


def agreement_table(found: Sequence[Agreement]) -> pa.Table:
    """The measures of every field that two annotators judged."""
    return pa.Table.from_pylist(
        [
            {
                "field": one.field.meaning, "units": one.units, "judgements": one.judgements,
                "equal pairs": _number(one.equal), "Krippendorff's alpha": _number(one.alpha),
                "Cohen's kappa": _number(one.cohen), "Fleiss' kappa": _number(one.fleiss),
            }
            for one in found if one.units
        ],
        schema=pa.schema(
            [("field", pa.string()), ("units", pa.int64()), ("judgements", pa.int64())]
            + [(name, pa.float64()) for name in
               ("equal pairs", "Krippendorff's alpha", "Cohen's kappa", "Fleiss' kappa")]
        ),
    )  # fmt: skip


def _note(note: HeadAnnotation, same: dict[str, str]) -> None:
    """One annotator's note, as plain text."""
    groups = ", ".join(f"{word} {n}/{len(note.verdicts)}" for word, n in group_counts(note.verdicts, same))
    lines = [
        ("label", note.label), ("semanticity", SEMANTICITY[note.semanticity].name),
        ("groupings", ", ".join(note.groupings)), ("role", note.role), ("verdicts", groups),
        ("confidence", "" if note.confidence is None else f"{note.confidence} of 5"),
        ("notes", note.notes),
    ]  # fmt: skip
    st.markdown(f"**{plain(note.annotator)}**")
    st.text("\n".join(f"{name}: {value}" for name, value in lines if value))


def _pick(found: Sequence[Disputed], decided: set[tuple[int, int]]) -> Disputed | None:
    rows = [
        {
            "head": f"L{one.head[0]}H{one.head[1]}", "distance": one.distance,
            "differ in": ", ".join(one.fields),
            "labels": " | ".join(note.label or "–" for note in one.notes),
            "agreed": "yes" if one.head in decided else "",
        }
        for one in found
    ]  # fmt: skip
    chosen = st.dataframe(
        pa.Table.from_pylist(rows), hide_index=True, placeholder="–",
        height=min(320, 38 + 36 * len(rows)), on_select="rerun",
        selection_mode="single-row", key="disputed",
        column_config={"distance": st.column_config.ProgressColumn(min_value=0, max_value=1, format="%.2f")},
        alt="Heads on which notes differ, the furthest apart first; ticking one shows its notes",
    )  # fmt: skip
    return found[chosen.selection.rows[0]] if chosen.selection.rows else found[0] if found else None


def _compare(scope: Scope, one: Disputed, who: str) -> None:
    layer, head = one.head
    said = f"differ in {', '.join(one.fields)}" if one.fields else "all equal"
    style.section(f"L{layer}H{head}", said)
    same = same_words(scope.settings, scope.model.model)
    for row in range(0, len(one.notes), 3):
        part = one.notes[row : row + 3]
        for column, note in zip(st.columns(len(part)), part, strict=True):
            with column, st.container(border=True):
                _note(note, same)
    if st.button("Open the head", key="open_disputed", type="tertiary", icon=":material/open_in_new:"):
        navigation.go(navigation.href("head", model=scope.model.model, head=f"L{layer}H{head}"))
    adjudicate.decision_box(scope, one, who)


def render() -> None:
    """Measures of agreement, heads by disagreement, and the decision on the chosen one."""
    scope = state.scope()
    who = state.annotator(scope.settings)
    model = scope.model.model
    notes = comparing.done_heads(scope.settings, model)
    names = sorted({name for by in notes.values() for name in by})
    style.title("Agreement", f"{model} · {len(names)} annotators with finished heads")
    found = comparing.disputed_heads(scope.settings, model)
    if not found:
        st.info("Nothing to compare yet: no head has finished notes of two annotators.")
        return
    if blind.is_on():
        mine = {head for head, by in notes.items() if who in by}
        found = tuple(one for one in found if one.head in mine)
        st.caption("Blind: only heads that you finished yourself are compared.")
        if not found:
            return
    several = st.pills("Annotators", names, selection_mode="multi", default=names, key="compared_people")
    st.dataframe(
        agreement_table(comparing.agreement(scope.settings, model, several)),
        hide_index=True, placeholder="–", height="content", key="agreement", alt="Agreement by field",
        column_config={
            "field": st.column_config.TextColumn(width="large"),
            "equal pairs": st.column_config.NumberColumn(format="percent"),
        } | {
            name: st.column_config.NumberColumn(format="%.3f")
            for name in ("Krippendorff's alpha", "Cohen's kappa", "Fleiss' kappa")
        },
    )  # fmt: skip
    st.caption(MEANING)
    style.section("Heads by disagreement", "mean distance of class, groupings and role")
    one = _pick(found, set(head_decisions(scope.settings, model)))
    if one is not None:
        _compare(scope, one, who if access.can("adjudicate") else "")
