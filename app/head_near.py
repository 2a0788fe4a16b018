"""Heads that resemble a head: of its layer by their features, of all layers by their kinds of feature."""

from typing import Any

import streamlit as st

from app import navigation, style
from app.components import draw
from app.head_form import Place
from app.state import Scope
from atlas.store.queries import heads, near


def _row(scope: Scope, here: Place, at: tuple[int, int], value: float | None) -> dict[str, Any]:
    name = f"L{at[0]}H{at[1]}"
    return {
        "href": navigation.href("head", model=scope.model.model, head=name), "name": name,
        "also": navigation.href("compare", model=scope.model.model, one=here.name, other=name),
        "sae": "", "feature": 0, "label": "", "values": [style.number(value)], "density": None, "token": None,
        "families": [],
    }  # fmt: skip


def near_data(scope: Scope, place: Place) -> dict[str, Any]:
    """What the component of links draws: two lists of heads."""
    groups = []
    ref = scope.z_saes.get(place.layer)
    if ref is not None:
        rows = scope.ask(near.heads_of_one_layer, ref.sae, place.head).to_pylist()[:8]
        listed = [_row(scope, place, (place.layer, row["head"]), row["cosine"]) for row in rows]
        groups.append(_group("Of this layer", "share the same features", listed))
    saes = tuple(one.sae for one in scope.z_saes.values())
    found = near.like_profiles(scope.ask(near.profiles, saes) if saes else {}, (place.layer, place.head))
    if found:
        listed = [_row(scope, place, at, value) for at, value in found]
        groups.append(_group("Of all layers", "have features of the same families and sources", listed))
    return {"groups": groups, "plain": True, "empty": "Nothing is known of the features of this head."}


def _group(title: str, note: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"title": title, "note": note, "columns": [["cosine", "of the two heads' vectors"]], "rows": rows}


def neighbours(scope: Scope, place: Place) -> None:
    """The lists, asked for when they are unfolded."""
    with st.expander("Heads like this one", key="near_heads", on_change="rerun") as box:
        if box.open:
            draw.related_features("near heads", near_data(scope, place))


def numbers_of(scope: Scope, layer: int, head: int) -> dict[str, float]:
    """Every score of a head and what its features say, by name."""
    found: dict[str, float] = {}
    for row in scope.ask(heads.head_scores, scope.model.model).to_pylist():
        if (row["layer"], row["head"]) == (layer, head) and row["value"] is not None:
            found[row["score"]] = row["value"]
    ref = scope.z_saes.get(layer)
    summary = None if ref is None else scope.ask(heads.head_summary, ref.sae, head)
    for name in heads.GRID_METRICS:
        if summary is not None and summary[name] is not None:
            found[name] = summary[name]
    return found
