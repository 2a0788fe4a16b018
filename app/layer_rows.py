"""The layers of a model in a row each: quality of the SAE, and what its features are like (row B5)."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import streamlit as st

from app import style
from app.state import Scope
from atlas.db.annotations import HeadProgress
from atlas.store.queries import near

COLUMNS = {
    "variance_explained": ("variance explained", "1 - sum ||x - x^||^2 / sum ||x - mean(x)||^2", "%.3f"),
    "l0": ("L0", "mean number of active features per token", "%.1f"),
    "ce_recovered": ("CE score", "(ce_zero - ce_spliced) / (ce_zero - ce_clean)", "%.3f"),
    "alive": ("alive", "share of the features that fire in the evaluation tokens", "percent"),
    "syntactic": ("single tokens", "share of its features of the families single token, bigram, positional",
                  "percent"),
    "induction": ("induction", "share of its features of the family induction", "percent"),
    "context": ("context", "share of its features of the families local and long-range context", "percent"),
    "distance": ("DFA distance", "mean over heads of the mean DFA distance of their features, in tokens",
                 "%.1f"),
    "effective_features": ("effective features", "mean over heads", "%.0f"),
}  # fmt: skip
MOST_GROUPINGS = 4


def rows(scope: Scope, notes: Mapping[tuple[int, int], HeadProgress]) -> list[dict[str, Any]]:
    """One row per layer with a z SAE: numbers, heads that are done, and the commonest groupings."""
    saes = tuple(ref.sae for ref in scope.z_saes.values())
    found = []
    for row in scope.ask(near.layer_rows, saes) if saes else []:
        own = [note for (layer, _), note in notes.items() if layer == row["layer"]]
        words = Counter(word for note in own for word in note.groupings)
        found.append(
            {
                "layer": row["layer"], "SAE": row["sae"], **{name: row[name] for name in COLUMNS},
                "done": sum(note.status == "done" for note in own),
                "groupings": [word for word, _ in words.most_common(MOST_GROUPINGS)],
            }
        )  # fmt: skip
    return found


def show(scope: Scope, notes: Mapping[tuple[int, int], HeadProgress]) -> None:
    """The table below the grid; nothing where the release has no z SAE."""
    listed = rows(scope, notes)
    if not listed:
        return
    style.section("Layers", "the SAE of each layer, and what its features are like")
    column = st.column_config
    config: dict[str, Any] = {
        name: column.NumberColumn(told, help=meaning, format=shape)
        for name, (told, meaning, shape) in COLUMNS.items()
    }
    config["layer"] = column.NumberColumn("layer", width="small", pinned=True)
    config["done"] = column.NumberColumn("heads done", width="small")
    st.dataframe(
        listed, column_config=config, hide_index=True, height=min(600, 40 + 35 * len(listed)),
        alt="Quality of every layer's SAE and a summary of its features",
    )  # fmt: skip
