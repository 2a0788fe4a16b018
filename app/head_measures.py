"""What was measured of a head by itself, and what was published about it; both open on demand."""

import streamlit as st

from app import navigation, part_tables, state
from app.head_form import Place
from app.state import Scope
from atlas.errors import StoreError
from atlas.store import reference, reports_heads
from atlas.store.queries import induction as asked

FACTS = (
    "previous_token",
    "duplicate",
    "induction",
    "first_token",
    "entropy",
    "reach",
    "copying",
    "ablation_mean",
)
"""Scores that are shown at the top of the head view; the others are one click away."""


def measured(scope: Scope, place: Place) -> None:
    """Every score with its rank, the circuits, the prefix curve and the tasks."""
    with st.expander(
        "Measured: scores, circuits, induction, tasks", key="measured", on_change="rerun"
    ) as box:
        if not box.open:
            return
        model = scope.model.model
        where = {"model": model, "head": place.name}
        if scope.ask(asked.has_induction, model):
            st.page_link(navigation.page("induction"), label=f"Induction of {place.name}", query_params=where)
        if scope.ask(asked.has_tasks, model):
            query = {"model": model, "layer": str(place.layer)}
            st.page_link(navigation.page("tasks"), label=f"Tasks without heads of layer {place.layer}",
                         query_params=query)  # fmt: skip
        for part in scope.ask(reports_heads.one_head, model, place.layer, place.head):
            part_tables.draw(part)
        st.code(f"atlas heads {place.name} --release {scope.release.label}", language="bash")


def published(scope: Scope, place: Place) -> None:
    """What was published about the head, closed at first, so that one can judge blind."""
    model = scope.model
    try:
        known = reference.reference_of(model.model, model.n_layers, model.n_heads)
    except StoreError:
        return
    with st.expander("Published about this head", key="published", on_change="rerun") as box:
        if not box.open:
            return
        at, said = (place.layer, place.head), False
        for family in (one for one in known.families if at in one.heads):
            said = True
            also = "" if at in family.primary else " (less clearly)"
            st.markdown(f"**{state.plain(family.name)}**{also}: {state.plain(family.evidence)}")
            for source in family.sources:
                st.caption(state.plain(known.cited(source)))
        for note in (one for one in known.notes if (one.layer, one.head) == at):
            said = True
            star = " ★" if note.star else ""
            st.markdown(f"**By its ten top features**{star}: {state.plain(note.text)}")
            st.caption(state.plain(known.cited("every_head")))
        if not said:
            st.write(
                "No role of this head is among those gathered here, which does not say that it has none."
            )
        rows = [
            {"published": one.meaning, "value": one.values[place.layer][place.head],
             "source": known.cited(one.source)}
            for one in known.numbers
        ]  # fmt: skip
        st.dataframe(rows, hide_index=True)
        st.code(f"atlas compare-reference --release {scope.release.label}", language="bash")
