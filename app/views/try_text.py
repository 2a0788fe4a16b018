"""A text through the SAEs: which features of every layer fire on it, and on which of its tokens."""

from collections import Counter
from typing import Any

import streamlit as st

from app import families, live, navigation, own_text, state, style
from app.components import draw
from app.components.payload import rounded
from app.state import Scope
from atlas.db import annotations
from atlas.errors import AtlasError
from atlas.store.queries import evidence, features
from atlas.store.queries.overview import SaeRef

MOST = 30
"""Features of each SAE that are asked for."""
NOTE = "each SAE's strongest features on the text; BOS left out"


def _group(scope: Scope, ref: SaeRef, found: list[dict[str, Any]], texts: list[str]) -> dict[str, Any]:
    """The features of one SAE, as links."""
    ids = tuple(sorted(one["feature"] for one in found))
    stats = scope.ask(features.summaries, ref.sae, ids)
    kinds = scope.ask(evidence.families, ref.sae, ids)
    labels = {note.feature: note.label for note in annotations.list_features(scope.settings, ref.sae)}
    rows = [
        {
            "href": navigation.href(
                "feature", sae=ref.sae, feature=one["feature"], text=st.query_params["text"]
            ),
            "sae": "", "feature": one["feature"], "label": labels.get(one["feature"]) or "",
            "values": [style.number(rounded(one["activation"])), str(one["position"]),
                       str(len(one["active"]))],
            "density": stats.get(one["feature"], {}).get("density"),
            "token": texts[one["position"]],
            "families": [families.spoken(name) for name in kinds.get(one["feature"], [])],
        }
        for one in found
    ]  # fmt: skip
    columns = [
        ["activation", "its largest on this text"],
        ["position", "where that is"],
        ["tokens", "of this text on which it fires"],
    ]
    return {"title": ref.sae, "note": "", "columns": columns, "rows": rows}


def _at(found: list[dict[str, Any]], position: int | None) -> list[dict[str, Any]]:
    """The features that fire at one position, strongest there first; all of them without one."""
    if position is None:
        return found[:10]
    at = [{**one, "activation": dict(map(tuple, one["active"]))[position], "position": position}
          for one in found if any(p == position for p, _ in one["active"])]  # fmt: skip
    return sorted(at, key=lambda one: (-one["activation"], one["feature"]))


def token_names(texts: list[str]) -> list[str]:
    """Tokens as the buttons show them; those of one text differ by marks of no width, as buttons must.

    >>> [len(name) for name in token_names(["a", "b", "a"])]
    [1, 1, 2]
    """
    seen: Counter[str] = Counter()
    names = []
    for text in texts:
        names.append(state.plain(text or "∅") + "\u200b" * seen[text])
        seen[text] += 1
    return names


def _answer(scope: Scope, refs: list[SaeRef], text: str) -> None:
    given = {"model": live.model_of(scope, refs[0].model), "saes": live.saes_of(scope, refs), "text": text,
             "most": live.most_tokens(scope), "k": MOST}  # fmt: skip
    try:
        with st.spinner("Asking the model"):
            answer = live.ask(scope, "features_on_text", given)
    except AtlasError as error:
        state.say_error(error)
        return
    texts = answer["texts"]
    if answer["cut"]:
        st.caption(f"The text is longer: its first {len(texts) - 1} tokens were read.")
    names = token_names(texts)
    position = st.pills(
        "Token", list(range(1, len(texts))), key="try_token", label_visibility="collapsed",
        format_func=names.__getitem__,
    )  # fmt: skip
    groups = []
    for ref in refs:
        found = _at(answer["saes"][ref.sae], position)
        if found:
            groups.append(_group(scope, ref, found, texts))
    empty = f"None of the {MOST} strongest features of any SAE fires on that token."
    draw.related_features("on text", {"groups": groups, "empty": empty})


def render() -> None:
    """The text, its tokens, and the features that fire."""
    scope = state.scope()
    style.title("Try a text", NOTE)
    refs = list(scope.z_saes.values())
    if not refs:
        st.info("This release has no SAE on z of a whole layer, so there is nothing to try a text with.")
        return
    live.warm(scope, refs)
    asked = st.query_params.get("text", "")
    st.session_state.setdefault("try_words", asked or own_text.SAMPLE)
    words = st.text_area("Text", key="try_words", height=110, max_chars=own_text.MOST_CHARACTERS)
    if st.button("Show", icon=":material/bolt:", type="primary", shortcut="Ctrl+Enter", key="try_show"):
        st.query_params["text"] = words
        st.session_state.pop("try_token", None)
    if st.query_params.get("text"):
        _answer(scope, refs, st.query_params["text"])
    else:
        st.caption("Show runs the model over the text and lists the features of every layer that fire on it.")
