"""One feature: when it fires, what it writes, which heads make it, and what people call it."""

from typing import Any

import pyarrow as pa
import streamlit as st

from app import (
    blind,
    families,
    feature_charts,
    feature_evidence,
    moves,
    navigation,
    own_text,
    proxy_view,
    state,
    style,
)
from app.components import draw
from app.components.payload import Texts, example, rounded
from app.feature_card import card
from app.feature_form import feature_form, move
from app.state import Scope
from app.token_tables import logit_table, token_table
from atlas.db.labels import feature_labels
from atlas.errors import StoreError
from atlas.store.queries import evidence, examples, features, overview
from atlas.store.queries.overview import SaeRef

NO_DFA = "No direct feature attribution was computed for this SAE: it needs a site that sums over heads and \
source positions (z or attn_out)."
FEW = 10


def chosen_feature(scope: Scope) -> tuple[SaeRef, int]:
    """The SAE and feature that the address names; else the last one seen, else the first SAE's strongest.

    Raises StoreError naming a value that does not exist and those that do.
    """
    if not scope.saes:
        raise StoreError("this release holds no SAE; allowed: a release with at least one")
    own = [ref for ref in scope.saes if ref.model == scope.model.model] or list(scope.saes)
    if not {"sae", "feature"} & set(st.query_params):
        ref, number = st.session_state.get("last_feature", (None, None))
        if ref in own:
            return ref, number
    name = st.query_params.get("sae")
    first = next(iter(scope.z_saes.values()), own[0])
    ref = first if name is None else features.find_sae(scope.saes, name)
    number = navigation.index_param("feature", ref.d_sae, f"feature of {ref.sae}")
    if number is None:
        strongest = scope.ask(features.some_features, ref.sae, "max_activation", 1)
        number = strongest["feature"][0].as_py() if strongest.num_rows else 0
    return ref, number


def _jump() -> None:
    move(st.session_state["jump_sae"], None)


def _jump_feature(sae: str) -> None:
    move(sae, int(st.session_state["jump_feature"]))


def _header(scope: Scope, ref: SaeRef, row: dict[str, Any]) -> int | None:
    """Name and moves; gives the next feature that fires."""
    number = row["feature"]
    one, two = st.columns([1, 1.9], vertical_alignment="center")
    with one:
        style.title(f"Feature {number}", ref.sae)
    before, after = scope.ask(features.alive_around, ref.sae, number)
    st.session_state["jump_sae"], st.session_state["jump_feature"] = ref.sae, number
    names = [r.sae for r in scope.saes if r.model == ref.model]
    with two, st.container(horizontal=True, horizontal_alignment="right", vertical_alignment="bottom"):
        _links(ref, row)
        st.button(
            "Previous", key="before", icon=":material/chevron_left:", shortcut="P", disabled=before is None,
            on_click=move, args=(ref.sae, before), help="previous feature that fires",
        )  # fmt: skip
        st.button(
            "Next", key="after", icon=":material/chevron_right:", icon_position="right", shortcut="N",
            disabled=after is None, on_click=move, args=(ref.sae, after), help="next feature that fires",
        )  # fmt: skip
        st.selectbox("SAE", names, key="jump_sae", on_change=_jump, label_visibility="collapsed", width=260)
        st.number_input(
            "Feature", 0, ref.d_sae - 1, key="jump_feature", on_change=_jump_feature, args=(ref.sae,),
            label_visibility="collapsed", width=130,
        )  # fmt: skip
    return after


def _families(scope: Scope, ref: SaeRef, number: int) -> None:
    told = families.rules(scope)
    if told:
        st.html(families.chips(scope.ask(evidence.families, ref.sae, (number,)).get(number, []), told))


def _links(ref: SaeRef, row: dict[str, Any]) -> None:
    """To the head one came from, and to the one with the largest decoder share."""
    came = st.query_params.get("head", "")
    best = "" if row["top_head"] is None else f"L{ref.layer}H{row['top_head']}"
    if came and st.button(
        state.plain(came), key="came", icon=":material/arrow_back:", shortcut="B", help="back to this head"
    ):
        navigation.go(navigation.href("head", model=ref.model, head=came))
    if best and best != came:
        told = "the head with the largest decoder share"
        if st.button(best, key="best", icon=":material/center_focus_strong:", help=told):
            navigation.go(navigation.href("head", model=ref.model, head=best))


def _tokens(scope: Scope, ref: SaeRef, number: int, whose: str | None) -> None:
    texts = Texts(scope.ask(overview.vocabulary, ref.model))
    logits = scope.ask(features.logits, ref.sae, (number,), 20).to_pylist()
    stats = scope.ask(features.token_stats, ref.sae, number, 50).to_pylist()
    k = 50 if st.session_state.get("more_tokens") else FEW
    parts = [
        logit_table([r for r in logits if r["sign"] == 1][:k], texts, "promotes"),
        logit_table([r for r in logits if r["sign"] == -1][:k], texts, "suppresses"),
        token_table([r for r in stats if r["role"] == "at"][:k], texts, "fires on"),
        token_table([r for r in stats if r["role"] == "next"][:k], texts, "next token"),
    ]
    with st.container(key="side"):
        columns = st.columns([1, 1, 1.35, 1.35] if logits else [2, 1.35, 1.35])
    if not logits:
        with columns[0]:
            feature_evidence.partners(scope, ref, number, whose)
    for column, part in zip(columns if logits else columns[1:], parts if logits else parts[2:], strict=True):
        column.html(part)
    if max(len(logits), len(stats)) > FEW:
        st.toggle("More tokens", key="more_tokens")


def example_data(scope: Scope, ref: SaeRef, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """What the examples component draws: the strongest 20, some of each tenth, a draw, and near misses."""
    texts = Texts(scope.ask(overview.vocabulary, ref.model))
    groups = examples.GROUPS + examples.MORE_GROUPS
    kept = scope.ask(examples.examples, ref.sae, (number,), groups, 20)
    return {
        "layer": ref.layer,
        "heads": None if ref.head is None else [ref.head],
        "max": rounded(row["max_activation"]),
        "why_no_dfa": NO_DFA,
        "has_dfa": any(one.dfa is not None for one in kept),
        "head_href": navigation.href("head", model=ref.model) + f"&head=L{ref.layer}HHEAD",
        "examples": [example(one, texts) for one in kept],
        "texts": texts.list,
    }


def _browse(scope: Scope, ref: SaeRef, who: str, alone: bool) -> None:
    """Other features of the same SAE with their labels, or one's own ``alone``; asked for once unfolded."""
    with st.expander("Other features of this SAE", key="browse", on_change="rerun") as box:
        if not box.open:
            return
        order = st.segmented_control("Order", ["max_activation", "density", "feature"], key="order",
                                     default="max_activation", required=True, label_visibility="collapsed",
                                     format_func=lambda name: name.replace("_", " "))  # fmt: skip
        table = scope.ask(features.some_features, ref.sae, order, 500)
        shown = table["feature"].to_pylist()
        labels = feature_labels(scope.settings, {ref.sae: shown}, annotator=who, alone=alone)
        told = pa.array([labels.get((ref.sae, one), "") for one in shown], pa.string())
        percent = st.column_config.NumberColumn(format="percent")
        chosen = st.dataframe(
            table.append_column("label", told), hide_index=True, height=320, on_select="rerun",
            selection_mode="single-row", key=f"others of {ref.sae} by {order}",
            column_config={"density": percent}, alt="Features of this SAE; ticking one opens it",
        )  # fmt: skip
        if chosen.selection.rows:
            number = table["feature"][chosen.selection.rows[0]].as_py()
            navigation.go(navigation.href("feature", sae=ref.sae, feature=number))


def render() -> None:
    """Statistics, charts, tokens, the note and the examples of one feature."""
    scope = state.scope()
    moves.arrive("feature")
    ref, number = chosen_feature(scope)
    who = state.annotator(scope.settings)
    row = scope.ask(features.feature_row, ref.sae, number)
    st.session_state["last_feature"] = (ref, number)
    moves.stay("feature", {"sae": ref.sae, "feature": str(number)})
    hidden = blind.hides_feature(scope.settings, ref.sae, number, who)
    whose = who if hidden else None
    onward = _header(scope, ref, row)
    with st.container(key="families"):
        if not hidden:
            _families(scope, ref, number)
    feature_charts.facts(scope, ref, row)
    feature_form(scope, ref, number, who, onward)
    feature_charts.overview_charts(scope, ref, number)
    feature_evidence.reads(scope, ref, number)
    _tokens(scope, ref, number, whose)
    feature_evidence.writes(scope, ref, number, row)
    feature_evidence.by_head(scope, ref, number)
    feature_evidence.related(scope, ref, number, whose)
    own_text.try_text(scope, ref, number, NO_DFA)
    proxy_view.test_guess(scope, ref, number)
    style.section("Examples", "point at one to see which heads and sources made it fire; click to pin it")
    drawn = example_data(scope, ref, number, row)
    drawn["card"] = card(scope, ref, number, row, hidden)
    draw.feature_examples("examples", drawn)
    _browse(scope, ref, who, hidden)
