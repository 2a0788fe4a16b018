"""One head: its scores, the features that it writes most, and what people say that it does."""

import re
from collections import Counter

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app import (
    families,
    head_cards,
    head_facts,
    head_measures,
    head_near,
    head_scatter,
    moves,
    navigation,
    state,
    style,
    walk,
)
from app.components import draw
from app.head_form import Place, asked_head, head_form, move
from app.state import Scope
from app.views.atlas import mini_map, progress_bar
from atlas.db import annotations
from atlas.errors import StoreError
from atlas.store.queries import heads
from atlas.store.queries.overview import SaeRef

_NAME = re.compile(r"L(\d{1,4})H(\d{1,4})", re.IGNORECASE)


def chosen_head(scope: Scope) -> Place:
    """The head of the address (``head=L5H3``, or ``layer=5&head=3``), else the last one seen, or L0H0.

    Raises StoreError naming a head that does not exist and those that do.
    """
    model = scope.model
    text = asked_head()
    if text is None:
        text = st.session_state.get(f"last head of {model.model}", "L0H0")
    match = _NAME.fullmatch(text)
    if match:
        layer, head = int(match[1]), int(match[2])
        if layer >= model.n_layers or head >= model.n_heads:
            raise StoreError(_unknown(scope, text))
    elif text.isascii() and text.isdigit():
        layer = navigation.index_param("layer", model.n_layers, f"layer of {model.model}") or 0
        head = navigation.index_param("head", model.n_heads, f"head of {model.model}") or 0
    else:
        raise StoreError(_unknown(scope, text))
    return Place(layer, head, model.n_heads, scope.n_heads_all, walk.current(scope))


def _unknown(scope: Scope, text: str) -> str:
    model = scope.model
    last = f"L{model.n_layers - 1}H{model.n_heads - 1}"
    return f"head {text!r} does not exist in {model.model}; allowed: L0H0 to {last}"


def _header(scope: Scope, place: Place, who: str) -> frozenset[tuple[int, int]]:
    """Name, moves and progress; gives the heads that are done."""
    notes = annotations.head_progress(scope.settings, scope.model.model, who)
    done = frozenset(at for at, note in notes.items() if note.status == "done")
    counts = Counter(note.status for note in notes.values())
    n = scope.n_heads_all
    left, right, corner = st.columns([1.3, 1.25, 0.46], vertical_alignment="top")
    with left:
        far = f"{counts['done']}/{n} done, {counts['draft']} drafts"
        style.title(place.name, f"{scope.model.model} · {far} · by {who}")
        st.html(progress_bar(counts["done"], counts["draft"], n))
    with corner:
        draw.heads_grid("map", mini_map(scope, notes, (place.layer, place.head)), scope.model.model)
    with right, st.container(horizontal=True, horizontal_alignment="right", vertical_alignment="bottom"):
        _moves(place, done)
        _jump(scope, place)
    if not _hidden(scope, place, who):
        with left:
            head_facts.scores(scope, place)
        head_facts.summary(scope, place)
    return done


def _hidden(scope: Scope, place: Place, who: str) -> bool:
    """Whether scores, families and others' labels are hidden because this head is judged blind."""
    return head_cards.hidden(scope, place, who)


def _moves(place: Place, done: frozenset[tuple[int, int]]) -> None:
    before, after, unseen = place.step(-1), place.step(1), place.next_open(set(done))
    st.button(
        before.name, key="before", icon=":material/chevron_left:", shortcut="P", on_click=move,
        args=(before,), help="previous head",
    )  # fmt: skip
    st.button(
        after.name, key="after", icon=":material/chevron_right:", icon_position="right", shortcut="N",
        on_click=move, args=(after,), help="next head",
    )  # fmt: skip
    st.button(
        "Next open", key="unseen", icon=":material/skip_next:", shortcut="U", on_click=move, args=(unseen,),
        help="next head that is not done",
    )  # fmt: skip


def _jump(scope: Scope, place: Place) -> None:
    names = [f"L{i}H{j}" for i in range(scope.model.n_layers) for j in range(scope.model.n_heads)]
    st.session_state["jump"] = place.name

    def jump() -> None:
        moves.move("head", {"head": st.session_state["jump"]})
        st.query_params.pop("layer", None)

    st.selectbox("Go to head", names, key="jump", on_change=jump, label_visibility="collapsed", width=110)


def _family(scope: Scope, where: DeltaGenerator) -> str | None:
    """The family that the cards are limited to; None for all."""
    names = {family: families.spoken(family) for family in families.rules(scope) if family != "dead"}
    if not names:
        return None
    navigation.bound_param("family", names)
    return where.selectbox(
        "Family", list(names), index=None, placeholder="any", key="family", bind="query-params",
        format_func=names.__getitem__, help="only features of this family; docs/families.md has the rules",
    )  # fmt: skip


def _features(scope: Scope, ref: SaeRef, place: Place, who: str) -> None:
    one, two, three, four = st.columns([2.05, 1.25, 1.4, 1.3], vertical_alignment="bottom")
    measure = one.segmented_control(
        "Top features by", list(heads.MEASURES), default="decoder_share", required=True, key="measure",
        format_func=heads.MEASURES.__getitem__, bind="query-params",
    )  # fmt: skip
    k = two.segmented_control(
        "Features", [10, 20, 50], default=10, required=True, key="k", bind="query-params"
    )
    n = three.segmented_control("Examples each", [1, 3, 5, 10], default=3, required=True, key="each")
    family = None if _hidden(scope, place, who) else _family(scope, four)
    chosen = scope.ask(heads.top_features, ref.sae, place.head, measure, k, family)
    if not chosen:
        of = "" if family is None else f" of the family {families.spoken(family)}"
        has = f"has a {heads.MEASURES[measure]} in this head"
        st.info(f"No firing feature{of} of {state.plain(ref.sae)} {has}.")
        return
    head_cards.cards((scope, ref, place), chosen, n, who)
    head_scatter.measures(scope, ref.sae, place.head, tuple(sorted(one.feature for one in chosen)))


def render() -> None:
    """The head, its features and the form."""
    scope = state.scope()
    place = chosen_head(scope)
    st.session_state[f"last head of {scope.model.model}"] = place.name
    if "head" not in st.query_params:
        st.query_params["head"] = place.name
    who = state.annotator(scope.settings)
    done = _header(scope, place, who)
    ref = scope.z_saes.get(place.layer)
    with st.container(key="head-body"):
        left, right = st.columns([2.7, 1])
        with left, st.container(key="cards-panel"):
            if ref is None:
                st.info(f"This release has no SAE on z of layer {place.layer}, so it shows no features.")
            else:
                _features(scope, ref, place, who)
            if not _hidden(scope, place, who):
                head_measures.measured(scope, place)
                head_measures.published(scope, place)
                head_near.neighbours(scope, place)
        with right, st.container(key="note-panel"):
            head_form(scope, place, who, done)
