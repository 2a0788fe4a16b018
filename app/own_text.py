"""One feature on a text that the user types: where it fires, and which heads and sources make it."""

from typing import Any

import streamlit as st

from app import live, navigation, state
from app.components import draw
from app.components.payload import rounded
from app.state import Scope
from atlas.errors import AtlasError
from atlas.store.queries.overview import SaeRef

SHOWN = 12
"""Positions of the text that are listed."""
SAMPLE = "Alice gave the book to Bob. Then Alice gave the"
MOST_CHARACTERS = 20_000


class Own:
    """Token texts of a typed text, each kept once."""

    def __init__(self, texts: list[str]) -> None:
        self.list = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(self.list)}
        self.places = [place[text] for text in texts]


def own_example(answer: dict[str, Any], rank: int, places: list[int]) -> dict[str, Any]:
    """What the component of examples draws for one position of the text."""
    one = answer["dfa"][rank]
    activations = dict(map(tuple, answer["active"]))
    activation = activations.get(one["position"])
    top, matched = one["top_source"], one["matched_prefix"]
    return {
        "g": "own", "r": rank, "b": 0, "p": one["position"], "a": rounded(activation or 0.0),
        "miss": None if activation is not None else rounded(one["pre_activation"]), "s": "your text",
        "t": places, "act": [[position, rounded(value)] for position, value in answer["active"]],
        "dfa": {
            "h": [rounded(value) or 0.0 for value in one["by_head"]],
            "sum": rounded(sum(one["by_head"]), 5), "bias": rounded(one["bias_term"]),
            "pre": rounded(one["pre_activation"]),
            "src": [[head, source, rounded(value) or 0.0] for head, source, value in one["sources"]],
            "match": [top, matched] if matched else None,
        },
    }  # fmt: skip


def _without_dfa(answer: dict[str, Any], places: list[int]) -> list[dict[str, Any]]:
    """Firing positions of an SAE whose site does not sum over heads, strongest first."""
    strongest = sorted(answer["active"], key=lambda one: (-one[1], one[0]))[:SHOWN]
    active = [[position, rounded(value)] for position, value in answer["active"]]
    return [
        {"g": "own", "r": rank, "b": 0, "p": position, "a": rounded(value), "miss": None, "s": "your text",
         "t": places, "act": active, "dfa": None}
        for rank, (position, value) in enumerate(strongest)
    ]  # fmt: skip


def own_data(answer: dict[str, Any], ref: SaeRef, why_no_dfa: str) -> dict[str, Any]:
    """What the component of examples draws for the whole answer."""
    texts = Own(answer["texts"])
    n = min(SHOWN, len(answer["dfa"]))
    listed = [own_example(answer, rank, texts.places) for rank in range(n)]
    listed = listed or _without_dfa(answer, texts.places)
    return {
        "layer": ref.layer,
        "heads": None if ref.head is None else [ref.head],
        "max": rounded(max((value for _, value in answer["active"]), default=0.0)),
        "why_no_dfa": why_no_dfa,
        "has_dfa": bool(answer["dfa"]),
        "head_href": navigation.href("head", model=ref.model) + f"&head=L{ref.layer}HHEAD",
        "examples": listed,
        "texts": texts.list,
    }


def try_text(scope: Scope, ref: SaeRef, feature: int, why_no_dfa: str) -> None:
    """A field for the text, and the answer; nothing is loaded before it is unfolded."""
    asked = st.query_params.get("text", "")
    with st.expander("Try your own text", key="own_text", on_change="rerun", expanded=bool(asked)) as box:
        if not box.open:
            return
        live.warm(scope, [ref])
        st.session_state.setdefault("own_words", asked or SAMPLE)
        text = st.text_area(
            "Text", key="own_words", height=90, max_chars=MOST_CHARACTERS,
            help="The model reads it after BOS. It stays on this server.",
        )  # fmt: skip
        if st.button("Show", icon=":material/bolt:", key="own_show"):
            st.query_params["text"] = text
        if st.query_params.get("text"):
            _answer(scope, ref, feature, why_no_dfa)
        else:
            st.caption("Show tells where this feature fires, and which heads and source tokens make it fire.")


def _answer(scope: Scope, ref: SaeRef, feature: int, why_no_dfa: str) -> None:
    (sae,) = live.saes_of(scope, [ref])
    given = {"model": live.model_of(scope, ref.model), "sae": sae, "feature": feature,
             "text": st.query_params["text"], "most": live.most_tokens(scope)}  # fmt: skip
    try:
        with st.spinner("Asking the model"):
            answer = live.ask(scope, "feature_on_text", given)
    except AtlasError as error:
        state.say_error(error)
        return
    fires = sum(position > 0 for position, _ in answer["active"])
    n = len(answer["texts"]) - 1
    cut = f" The text is longer: its first {n} tokens were read." if answer["cut"] else ""
    st.caption(f"It fires on {fires} of {n} tokens.{cut}")
    draw.feature_examples("own examples", own_data(answer, ref, why_no_dfa))
