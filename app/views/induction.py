"""Induction, head by head: what it wants to match, on random tokens and on text (seed 001, B11 to B16)."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from app import charts, induction_charts, navigation, part_tables, state, style
from app.head_form import Place
from app.state import Scope
from app.views.head import chosen_head
from atlas.store import reports_induction
from atlas.store.induction import INDUCTION, LONG, SHARE
from atlas.store.queries import induction as asked

RULE = (
    f"long-prefix: attention to the right token is at least {INDUCTION:g} after {LONG} or more repeated "
    f"tokens, and after one it is below {SHARE:g} of that; short-prefix: it is not below"
)


def recompute(scope: Scope) -> str:
    """The command that makes every number of this view again and compares it."""
    return f"atlas heads --recompute --release {scope.release.label}"


def _place(scope: Scope, rows: list[dict[str, Any]]) -> Place:
    """The head of the address; without one, the strongest."""
    if "head" not in st.query_params:
        st.query_params["head"] = f"L{rows[0]['layer']}H{rows[0]['head']}"
    return chosen_head(scope)


def _curves(scope: Scope, place: Place) -> None:
    rows = scope.ask(asked.prefix_curves, scope.model.model)
    pairs = list(zip(rows["layer"].to_pylist(), rows["head"].to_pylist(), strict=True))
    chosen = pa.array([at == (place.layer, place.head) for at in pairs], pa.bool_())
    names = pa.array([f"L{layer}H{head}" for layer, head in pairs], pa.string())
    rows = rows.append_column("chosen", chosen).append_column("name", names)
    n = rows["n"][0].as_py()
    left, right = st.columns(2)
    with left:
        style.section("Attention to the right token", f"random tokens, {n} sequences at every point")
        spec = induction_charts.curve("attention", "attention", True)
        charts.draw(rows, spec, 230, "curve_attention", f"Attention of {place.name} by repeated tokens")
    with right:
        style.section("Direct logit attribution to the right token", "the head's part of its logit, centred")
        spec = induction_charts.curve("dla", "logits", True)
        charts.draw(rows, spec, 230, "curve_dla", f"Direct logit attribution of {place.name}")


def _text(scope: Scope, place: Place) -> None:
    name = scope.model.model
    rows = scope.ask(asked.of_head, "head_text_prefixes", name, place.layer, place.head)
    options = sorted(set(rows["threshold"].to_pylist()))
    threshold = st.segmented_control(
        "Attention above", options, default=0.3 if 0.3 in options else options[0], required=True,
        key="threshold", bind="query-params",
    )  # fmt: skip
    rows = rows.filter(pc.equal(rows["threshold"], pa.scalar(float(threshold))))
    total = rows["n_attended"][0].as_py()
    style.section("On text", f"{total:,} pairs (destination, source) above {threshold:g}, BOS left out")
    if not total:
        st.info(f"{place.name} attends to no token but BOS above {threshold:g} in the text.")
        return
    last = pc.max(rows["prefix"]).as_py()
    labels = pa.array([f"{n}+" if n == last else str(n) for n in rows["prefix"].to_pylist()], pa.string())
    shares = pa.array([n / total for n in rows["n"].to_pylist()], pa.float64())
    rows = rows.append_column("label", labels).append_column("share", shares)
    charts.draw(
        rows, induction_charts.matches(), 210, "matches", f"Lengths of matches of {place.name} on text"
    )


def _corruption(scope: Scope, place: Place) -> None:
    rows = scope.ask(asked.of_head, "head_corruption", scope.model.model, place.layer, place.head).to_pylist()
    one = rows[0]
    style.section(
        "Long matches cut to one token",
        f"{one['n']} pairs of the text with a match of 2 or more; attended: above 0.3",
    )
    if not one["n"]:
        st.info("The text has no such pair.")
        return
    bars = []
    for what, n, before, after in (
        ("all pairs", one["n"], one["before"], one["after"]),
        ("attended", one["n_attended"], one["attended_before"], one["attended_after"]),
    ):
        label = f"{what}: {n}"
        bars += [
            {"what": label, "when": "as it is", "attention": before, "n": n},
            {"what": label, "when": "cut to 1 token", "attention": after, "n": n},
        ]
    bars = [bar for bar in bars if bar["attention"] is not None]
    charts.draw(
        pa.Table.from_pylist(bars), induction_charts.corruption(), 210, "corruption",
        f"Attention of {place.name} before and after cutting",
    )  # fmt: skip


def _facts(row: dict[str, Any]) -> None:
    number = style.number
    style.facts(
        [
            ("kind", row["kind"] or "no induction head"),
            ("after one repeated token", number(row["attention_1"])),
            (f"after {LONG} or more", number(row["attention_long"])),
            ("induction score", number(row["induction"])),
            ("on text", number(row["induction_text"])),
            ("DLA, one and more", f"{number(row['dla_1'])}, {number(row['dla_long'])}"),
            ("matches longer than 1, above 0.3", "–" if row["longer_share"] is None
             else f"{100 * row['longer_share']:.0f} % of {number(row['n_1'] + row['n_longer'])}"),
            ("long matches, cut", f"{number(row['before'])} → {number(row['after'])}"),
        ]
    )  # fmt: skip


def _jump(scope: Scope, place: Place, rows: list[dict[str, Any]]) -> None:
    st.session_state["induction_head"] = place.name
    names = [f"L{row['layer']}H{row['head']}" for row in rows]

    def jump() -> None:
        st.query_params["head"] = st.session_state["induction_head"]

    st.selectbox("Head, strongest first", names, key="induction_head", on_change=jump)
    st.page_link(
        navigation.page("head"), label="Open the head", icon=":material/arrow_forward:",
        query_params={"model": scope.model.model, "head": place.name},
    )  # fmt: skip


def render() -> None:
    """One head's evidence, and the table of all heads."""
    scope = state.scope()
    model = scope.model.model
    if not scope.ask(asked.has_induction, model):
        style.title("Induction", model)
        st.info(
            "This release has no measurements of induction: it was made by an older version. Build it again."
        )
        return
    parts = scope.ask(reports_induction.induction, model)
    rows = parts[0].rows.to_pylist()
    place = _place(scope, rows)
    kinds = [row["kind"] for row in rows]
    counts = f"{kinds.count('long-prefix')} long-prefix and {kinds.count('short-prefix')} short-prefix heads"
    style.title(f"Induction: {place.name}", f"{model} · {counts} of {len(rows)}")
    row = next(row for row in rows if (row["layer"], row["head"]) == (place.layer, place.head))
    wide, narrow = st.columns([4, 1], vertical_alignment="bottom")
    with narrow:
        _jump(scope, place, rows)
    with wide:
        _facts(row)
        st.caption(RULE)
    _curves(scope, place)
    left, right = st.columns(2)
    with left:
        _text(scope, place)
    with right:
        _corruption(scope, place)
    links = [
        navigation.href("induction", model=model, head=row["head_name"])
        for row in parts[0].rows.select(["head_name"]).to_pylist()
    ]
    part_tables.draw(parts[0], links)
    part_tables.draw(parts[1])
    style.section("Made again by", "measures all heads anew and compares every number")
    st.code(recompute(scope), language="bash")
