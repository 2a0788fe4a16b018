"""Answers of the search view: the features that an address asks for, and what the page draws of them."""

from typing import Any

import pyarrow as pa
import streamlit as st

from app import families, navigation, style
from app.components.payload import Texts, rounded
from app.search_state import Asked
from app.state import Scope, annotator
from atlas.db.arrow import arrow_tables
from atlas.db.labels import feature_labels
from atlas.errors import StoreError
from atlas.store.queries import features, overview, search, texts
from atlas.store.queries.search import CANDIDATES, PAGE, Facets, Filters, meaning
from atlas.store.queries.search_index import COLUMNS

SCORES = {
    "at": "share of its firings",
    "next": "share of its firings",
    "up": "logit effect",
    "down": "logit effect",
    "from": "share of its DFA",
    "text": "top examples",
    "like": "likeness",
}
"""What the score of each question is."""


@st.cache_resource(max_entries=2, show_spinner=False)
def _texts(path: str, digest: str, model: str, _scope: Scope) -> texts.Texts:  # noqa: ARG001 - of the key
    return _scope.ask_once(texts.read_texts, model)


def text_of(scope: Scope) -> texts.Texts:
    """The analysed text as text, read once per release."""
    return _texts(str(scope.release.path), scope.release.digest, scope.model.model, scope)


@st.cache_resource(max_entries=50, show_spinner=False)
def _on_text(path: str, digest: str, wanted: str, exact: bool, _scope: Scope) -> pa.Table:  # noqa: ARG001
    return _scope.ask_once(search.by_places, texts.places_of(text_of(_scope), wanted, exact=exact))


def _labelled(scope: Scope, wanted: str) -> pa.Table:
    """Features whose label, tags or notes hold a text, in any case; the score is always 1."""
    notes = arrow_tables(scope.settings)["feature_annotations"]
    rows = notes.select(["sae", "feature", "label", "notes", "tags"]).to_pylist()
    found = sorted(
        {
            (row["sae"], row["feature"])
            for row in rows
            if wanted.lower()
            in "\n".join([row["label"] or "", row["notes"] or "", *(row["tags"] or [])]).lower()
        }
    )
    columns = {"sae": [s for s, _ in found], "feature": [f for _, f in found], "score": [1.0] * len(found)}
    return pa.table(columns, schema=CANDIDATES)


def candidates(scope: Scope, asked: Asked) -> pa.Table | None:
    """The answer to the question; None where there is none, so that every feature is a candidate."""
    if not asked.by or not asked.q:
        return None
    if asked.by == "label":
        return _labelled(scope, asked.q)
    if asked.by == "text":
        key = (str(scope.release.path), scope.release.digest)
        return _on_text(*key, asked.q, asked.exact, scope)
    if asked.by == "like":
        sae, _, number = asked.q.rpartition("/")
        ref = features.find_sae(scope.saes, sae)
        if not number.isdigit() or int(number) >= ref.d_sae:
            raise StoreError(f"feature {asked.q!r} does not exist; allowed: SAE/0 to SAE/{ref.d_sae - 1}")
        return scope.ask(search.like, sae, int(number))
    tokens = scope.ask(texts.tokens_like, scope.model.model, asked.q)
    return scope.ask(search.by_token, tokens, asked.by)


def found(scope: Scope, asked: Asked) -> tuple[Filters, pa.Table, Facets]:
    """The page that the address asks for, and the facets of everything that was found."""
    filters, chosen = asked.filters(scope), candidates(scope, asked)
    start = asked.page * PAGE
    if chosen is None:
        if filters.order.removeprefix("-") == "score":
            filters = Asked(**{**vars(asked), "order": "max_activation"}).filters(scope)
        return filters, scope.ask(search.page, filters, None, start), scope.ask(search.facets, filters)
    return (
        filters,
        scope.ask_once(search.page, filters, chosen, start),
        scope.ask_once(search.facets, filters, chosen),
    )


def result_data(scope: Scope, rows: pa.Table, filters: Filters, score: str | None) -> dict[str, Any]:
    """What the component of links draws for a page of features."""
    shown = Texts(scope.ask(overview.vocabulary, scope.model.model))
    order = filters.order.removeprefix("-")
    by_sae: dict[str, list[int]] = {}
    for sae, feature in zip(rows["sae"].to_pylist(), rows["feature"].to_pylist(), strict=True):
        by_sae.setdefault(sae, []).append(feature)
    labels = feature_labels(scope.settings, by_sae, annotator=annotator(scope.settings))
    layers = {ref.sae: ref for ref in scope.saes}
    columns = [["top head", "the head of largest decoder share"], ["max", "largest activation"]]
    if order in COLUMNS and order not in ("density", "max_activation"):
        columns.insert(0, [order.replace("_", " "), meaning(order)])
    if score is not None:
        columns.insert(0, [score, "how well it answers the question"])
    listed = []
    for row in rows.to_pylist():
        ref, head = layers[row["sae"]], row["top_head"]
        values = [
            "–" if head is None else f"L{ref.layer}H{head}",
            style.number(rounded(row["max_activation"])),
        ]
        if order in COLUMNS and order not in ("density", "max_activation"):
            values.insert(0, style.number(row["value"]))
        if score is not None:
            values.insert(0, style.number(row["score"]))
        listed.append(
            {
                "href": navigation.href("feature", sae=row["sae"], feature=row["feature"]),
                "sae": row["sae"], "feature": row["feature"],
                "label": labels.get((row["sae"], row["feature"]), ""), "values": values,
                "density": row["density"],
                "token": None if row["top_token"] is None else shown.text(row["top_token"]),
                "families": [families.spoken(one) for one in search.families_in(row["families"])],
            }
        )  # fmt: skip
    group = {"title": "", "note": "", "columns": columns, "wide": True, "rows": listed}
    return {
        "groups": [group] if listed else [],
        "empty": "No feature was found. Take away a filter, or ask for less.",
    }
