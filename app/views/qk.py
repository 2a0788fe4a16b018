"""A head through SAEs on its queries and its keys: rebuilt patterns, scans, induction without one feature."""

from typing import Any

import pyarrow as pa
import streamlit as st

from app import charts, qk_charts, qk_prompt, state, style
from app.components.payload import Texts
from app.state import Scope
from atlas.errors import StoreError
from atlas.store.queries import overview
from atlas.store.queries import pairs as asked

POSITIONAL = 0.2
"""Least share of a feature's strongest tokens at its position to be drawn."""
Row = dict[str, Any]


def _short(row: Row) -> str:
    return f"L{row['layer']}H{row['head']} {row['q_sae'].rsplit('.', 1)[-1]}"


def _choose(rows: list[Row], name: str, label: str, where: Any, *, needed: bool) -> Row | None:
    """The pair that the address names, or the first (None where one is not needed)."""
    options = [_short(row) for row in rows]
    wanted = st.query_params.get(name)
    if wanted is not None and wanted not in options:
        raise StoreError(f"pair {wanted!r} is not in this release; there are: {', '.join(options)}")
    key = f"qk_{name}"
    st.session_state[key] = wanted or (options[0] if needed else None)

    def changed() -> None:
        if st.session_state[key] is None:
            st.query_params.pop(name, None)
        else:
            st.query_params[name] = st.session_state[key]

    chosen = where.selectbox(
        label, options, key=key, on_change=changed, index=0 if needed else None, placeholder="none"
    )
    return None if chosen is None else rows[options.index(chosen)]


def _facts(row: Row) -> None:
    number = style.number
    style.facts(
        [
            ("pattern KL", f"{number(row['pattern_kl'])} nats"),
            ("same strongest source", number(row["pattern_top1"])),
            ("score correlation", number(row["score_correlation"])),
            ("features of one position, q and k", f"{row['q_positional']}, {row['k_positional']}"),
            ("positions covered, q and k", f"{row['q_covered']}, {row['k_covered']}"),
            ("best key feature one earlier", number(row["diagonal_share"])),
            ("random tokens twice: attention",
             f"{number(row['original_attention'])} → rebuilt {number(row['rebuilt_attention'])}"),
            ("log-probability", f"{number(row['original_log_prob'])} → {number(row['rebuilt_log_prob'])}"),
        ]
    )  # fmt: skip


def _targets(row: Row, targets: list[Row], texts: Texts, key: str) -> None:
    if not targets:
        st.info("No key feature follows one token clearly enough.")
        return
    table = pa.table(
        {
            "I follow": [texts.text(one["token"]) for one in targets],
            "k feature": [qk_prompt.feature_link(row["k_sae"], one["k_feature"]) for one in targets],
            "share": [one["share"] for one in targets],
            "q feature": [qk_prompt.feature_link(row["q_sae"], one["q_feature"]) for one in targets],
            "I am": ["–" if one["q_token"] is None else texts.text(one["q_token"]) for one in targets],
            "its share": [one["q_share"] for one in targets],
            "product": [one["product"] for one in targets],
        }
    )
    link = st.column_config.LinkColumn(display_text=r"feature=(\d+)")
    config = {"q feature": link, "k feature": link}
    st.dataframe(table, hide_index=True, column_config=config, key=f"targets_{key}",
                 alt="Key features that follow a token, and query features that look for them")  # fmt: skip


def _curves(scope: Scope, row: Row, targets: list[Row], texts: Texts, key: str) -> None:
    names = {-1: "no token put in", **{one["target"]: texts.text(one["token"]) for one in targets}}
    chosen = st.segmented_control(
        "Token put in at one place of both halves", list(names), default=0 if targets else -1, required=True,
        format_func=names.__getitem__, key=f"target_{key}",
    )  # fmt: skip
    rows = scope.ask(asked.of_pair, "qk_curves", row["q_sae"], row["k_sae"]).to_pylist()
    mine = [one | {"told": qk_charts.TOLD[one["variant"]]} for one in rows if one["target"] == chosen]
    if not mine:
        st.info("Repeats of random tokens were not tried.")
        return
    at = next((one["place"] + one["half"] + 1 for one in targets if one["target"] == chosen), None)
    table = pa.Table.from_pylist(mine)
    for field, title in (("log_prob", "log-probability of the right token (nats)"),
                         ("attention", "attention to what comes next")):  # fmt: skip
        charts.draw(table, qk_charts.curves(field, title, at), 210, f"{field}_{key}", title)
    if at is not None:
        st.caption(f"Dashed: position {at}, predicted from the second {state.plain(names[chosen])}.")


def _positions(scope: Scope, row: Row, key: str) -> None:
    table = scope.ask(asked.by_position, row["q_sae"], row["k_sae"], POSITIONAL)
    if table.num_rows == 0:
        st.info("Too few features of this pair belong to one position.")
        return
    most = max(map(abs, table["product"].to_pylist())) or 1.0
    style.section("Query · key features, by position", "a previous-token head: a line one below the diagonal")
    spec = qk_charts.products(("k_position", "position of the k feature"),
                              ("q_position", "position of the q feature"), most)  # fmt: skip
    charts.draw(table, spec, 320, f"diagonal_{key}", "Products of query and key features by position")
    with st.expander("Products with the positional embeddings"):
        for side in ("q", "k"):
            found = scope.ask(asked.with_positions, row[f"{side}_sae"], POSITIONAL)
            if found.num_rows:
                most = max(map(abs, found["product"].to_pylist())) or 1.0
                spec = qk_charts.products(("embedding", "embedding of position"),
                                          ("position", f"position of the {side} feature"), most)  # fmt: skip
                told = f"{side} features and positional embeddings"
                charts.draw(found, spec, 300, f"embedding_{side}_{key}", told)


def _one(scope: Scope, row: Row, texts: Texts, key: str, prompt: int) -> None:
    style.section(_short(row), f"{row['q_sae']} · {row['k_sae']}")
    _facts(row)
    qk_prompt.draw(scope, row, texts, key, prompt)
    style.section("I follow X, I am X", "key features that follow one token, and what looks for them")
    targets = scope.ask(asked.of_pair, "qk_targets", row["q_sae"], row["k_sae"]).to_pylist()
    _targets(row, targets, texts, key)
    _curves(scope, row, targets, texts, key)
    _positions(scope, row, key)


def _prompts_of(scope: Scope, row: Row) -> dict[int, str]:
    found = scope.ask(asked.of_pair, "qk_prompts", row["q_sae"], row["k_sae"]).to_pylist()
    return {one["prompt"]: one["text"] for one in found}


def render() -> None:
    """One pair, and another beside it if asked for."""
    scope = state.scope()
    rows = scope.ask(asked.pairs, scope.model.model)
    style.title("Queries and keys", scope.model.model)
    if not rows:
        st.info("This release has no head with SAEs on its queries and its keys. This makes one:")
        st.code("atlas study qk", language="bash")
        return
    one, two, three = st.columns([1.2, 1.2, 2.6], vertical_alignment="bottom")
    row = _choose(rows, "pair", "Head and SAEs", one, needed=True)
    beside = _choose(rows, "beside", "Beside it", two, needed=False)
    if row is None:
        return
    prompts = _prompts_of(scope, row)
    number = three.selectbox("Prompt", list(prompts), format_func=prompts.__getitem__, key="qk_prompt") or 0
    texts = Texts(scope.ask(overview.vocabulary, scope.model.model))
    shown = [row] if beside is None else [row, beside]
    for place, (column, pair) in enumerate(zip(st.columns(len(shown)), shown, strict=True)):
        with column:
            _one(scope, pair, texts, f"{place}", number)
    style.section("Made again by", "the study of docs-2l; any build with SAEs on q and k makes these tables")
    st.code("atlas study qk", language="bash")
