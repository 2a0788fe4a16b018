"""The top features of a head as cards: ten are sent at once, ten more whenever the reader comes near them."""

from collections.abc import Sequence
from typing import Any

import streamlit as st

from app import blind, families, navigation
from app.components import draw
from app.components.payload import Texts, example, rounded
from app.head_form import Place
from app.state import Scope
from atlas.db.labels import feature_labels
from atlas.store.queries import evidence, examples, features, overview
from atlas.store.queries.heads import HeadFeature
from atlas.store.queries.overview import SaeRef

CARDS_AT_ONCE = 10
Scoped = tuple[Scope, SaeRef, Place]


def hidden(scope: Scope, place: Place, who: str) -> bool:
    """Whether families and others' labels are hidden because this head is judged blind."""
    return blind.hides_head(scope.settings, scope.model.model, place.layer, place.head, who)


def _examples(at: Scoped, ids: tuple[int, ...], n: int, texts: Texts) -> dict[int, list[dict[str, Any]]]:
    scope, ref, _ = at
    kept: dict[int, list[dict[str, Any]]] = {}
    for one in scope.ask(examples.examples, ref.sae, ids, ("top",), n):
        kept.setdefault(one.feature, []).append(example(one, texts))
    return kept


def _logits(at: Scoped, ids: tuple[int, ...], texts: Texts) -> dict[tuple[int, int], list[list[Any]]]:
    scope, ref, _ = at
    found: dict[tuple[int, int], list[list[Any]]] = {}
    for row in scope.ask(features.logits, ref.sae, ids, 8).to_pylist():
        pair = [texts.text(row["token"]), rounded(row["value"])]
        found.setdefault((row["feature"], row["sign"]), []).append(pair)
    return found


def card_data(at: Scoped, chosen: Sequence[HeadFeature], n: int, who: str) -> dict[str, Any]:
    """What the cards component draws: one card per feature with n examples."""
    scope, ref, place = at
    ids = tuple(one.feature for one in chosen)
    texts = Texts(scope.ask(overview.vocabulary, ref.model))
    stats = scope.ask(features.summaries, ref.sae, ids)
    blinded = hidden(scope, place, who)
    labels = feature_labels(scope.settings, {ref.sae: ids}, annotator=who, alone=blinded)
    kinds = {} if blinded else scope.ask(evidence.families, ref.sae, ids)
    told = families.rules(scope)
    kept, tokens = _examples(at, ids, n, texts), _logits(at, ids, texts)
    cards = []
    for one in chosen:
        stat = stats[one.feature]
        top = stat["top_head"]
        cards.append(
            {
                "feature": one.feature, "rank": one.rank, "label": labels.get((ref.sae, one.feature), ""),
                "href": navigation.href("feature", sae=ref.sae, feature=one.feature, head=place.name),
                "decoder_share": rounded(one.decoder_share), "fve": rounded(one.fve),
                "dfa_share": rounded(one.dfa_share), "density": rounded(stat["density"]),
                "max": rounded(stat["max_activation"]),
                "other": "" if top is None or top == place.head else f"L{place.layer}H{top}",
                "up": tokens.get((one.feature, 1), []), "down": tokens.get((one.feature, -1), [])[:5],
                "examples": kept.get(one.feature, []),
                "families": [[families.spoken(f), told.get(f, "")] for f in kinds.get(one.feature, [])],
            }
        )  # fmt: skip
    here = {"layer": place.layer, "head": place.head, "before": 16, "after": 7}
    return {**here, "texts": texts.list, "cards": cards}


def cards(at: Scoped, chosen: Sequence[HeadFeature], n: int, who: str) -> None:
    """The first ten cards, and places for the others."""
    draw.feature_cards("cards", card_data(at, chosen[:CARDS_AT_ONCE], n, who))
    for start in range(CARDS_AT_ONCE, len(chosen), CARDS_AT_ONCE):
        _later(f"cards {start}", at, tuple(chosen[start : start + CARDS_AT_ONCE]), n, who)


@st.fragment
def _later(key: str, at: Scoped, chosen: tuple[HeadFeature, ...], n: int, who: str) -> None:
    """More cards, once the browser has said that the reader is near; it says of which they are to be."""
    _, ref, place = at
    of = f"{ref.sae} {place.name} {[one.feature for one in chosen]} {n}"
    if draw.wanted(key) == of:
        draw.feature_cards(key, card_data(at, chosen, n, who) | {"of": of})
    else:
        draw.feature_cards(key, {"of": of, "waiting": [one.rank for one in chosen], "each": n})
