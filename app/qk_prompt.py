"""One prompt through a head read on queries and keys: patterns side by side, outcomes, scans of a score."""

from typing import Any

import pyarrow as pa
import streamlit as st

from app import charts, navigation, qk_charts, state, style
from app.components.payload import Texts
from app.state import Scope
from atlas.store.queries import pairs as asked

Row = dict[str, Any]


def cells(prompt: Row, name: str, texts: Texts) -> pa.Table:
    """The cells of a stored pattern: query, source, attention and the two tokens' texts."""
    n = len(prompt["tokens"])
    words = [texts.text(token) for token in prompt["tokens"]]
    return pa.Table.from_pylist(
        [
            {"query": i, "source": j, "attention": prompt[name][i * n + j], "to": words[i], "from": words[j]}
            for i in range(n)
            for j in range(i + 1)
        ]
    )


def _pattern(prompt: Row, name: str, key: str, texts: Texts) -> None:
    words = [texts.text(token) for token in prompt["tokens"]]
    told = {"pattern": "Attention of the model", "rebuilt": "Attention with q and k rebuilt"}[name]
    style.section(told)
    charts.draw(cells(prompt, name, texts), qk_charts.pattern(words), 300, f"{name}_{key}", told)


def _outcomes(scope: Scope, row: Row, prompt: Row, key: str) -> None:
    found = scope.ask(asked.of_pair, "qk_outcomes", row["q_sae"], row["k_sae"]).to_pylist()
    mine = [one for one in found if one["prompt"] == prompt["prompt"]]
    order = ("original", "rebuilt", "without", "only")
    mine.sort(key=lambda one: order.index(one["variant"]))
    table = pa.table(
        {
            "variant": [qk_charts.TOLD[one["variant"]] for one in mine],
            "attention": [one["attention"] for one in mine],
            "log-probability (nats)": [one["log_prob"] for one in mine],
        }
    )
    st.dataframe(table, hide_index=True, key=f"outcomes_{key}", alt="Prediction by variant")


def _scans(scope: Scope, row: Row, prompt: Row, key: str) -> None:
    found = scope.ask(asked.of_pair, "qk_scans", row["q_sae"], row["k_sae"]).to_pylist()
    mine = [one for one in found if one["prompt"] == prompt["prompt"]]
    if not mine:
        st.info("This head's scores are more than q · k, so they do not split into features.")
        return
    for one in mine:
        one["what"] = f"{one['side']} {one['feature']}"
    mine.sort(key=lambda one: -abs(one["change"]))
    style.section("The score without each feature", f"rebuilt score {style.number(prompt['score_rebuilt'])}")
    spec = qk_charts.scan()
    charts.draw(pa.Table.from_pylist(mine[:40]), spec, 170, f"scan_{key}", "Change of the score by feature")
    best = scope.ask(asked.of_pair, "qk_feature_pairs", row["q_sae"], row["k_sae"]).to_pylist()
    best = [one for one in best if one["prompt"] == prompt["prompt"]][:10]
    with st.expander("Pairs of features that add most"):
        _pairs_table(row, best, key)


def feature_link(sae: str, feature: int) -> str:
    """Address of a feature."""
    return navigation.href("feature", sae=sae, feature=feature)


def _pairs_table(row: Row, best: list[Row], key: str) -> None:
    table = pa.table(
        {
            "q feature": [feature_link(row["q_sae"], one["q_feature"]) for one in best],
            "k feature": [feature_link(row["k_sae"], one["k_feature"]) for one in best],
            "product": [one["product"] for one in best],
            "contribution": [one["contribution"] for one in best],
        }
    )
    link = st.column_config.LinkColumn(display_text=r"feature=(\d+)")
    config = {"q feature": link, "k feature": link}
    st.dataframe(table, hide_index=True, column_config=config, key=f"pairs_{key}", alt="Pairs of features")


def draw(scope: Scope, row: Row, texts: Texts, key: str, number: int) -> None:
    """Both patterns of a prompt, what is predicted, and the features that decide where the head looks."""
    prompts = scope.ask(asked.of_pair, "qk_prompts", row["q_sae"], row["k_sae"]).to_pylist()
    prompt = next((one for one in prompts if one["prompt"] == number), None)
    if prompt is None:
        st.info("This pair was tried with no such prompt.")
        return
    source, target = (texts.text(token) for token in (prompt["tokens"][prompt["source"]], prompt["target"]))
    st.caption(
        f"From the last token the head looks most at {state.plain(source)} (position {prompt['source']}); "
        f"followed: the probability of {state.plain(target)}; key feature {prompt['k_feature']}; "
        f"pattern KL {style.number(prompt['pattern_kl'])} nats, "
        f"same strongest source {style.number(prompt['pattern_top1'])}"
    )
    left, right = st.columns(2)
    with left:
        _pattern(prompt, "pattern", key, texts)
    with right:
        _pattern(prompt, "rebuilt", key, texts)
    left, right = st.columns([1, 1.4])
    with left:
        _outcomes(scope, row, prompt, key)
    with right:
        _scans(scope, row, prompt, key)
