"""The JavaScript components: registered once per session of the server, mounted by these functions."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import streamlit as st

from app.navigation import follow, go, href
from app.whole import whole

_FOLDER = Path(__file__).parent
MORE = {"examples": ("save.js", "examples_bar.js"), "verdicts": ("naming.js",)}
"""Scripts that a component has beside its own and the common one."""


def _read(*names: str) -> str:
    return "\n".join((_FOLDER / name).read_text("utf-8") for name in names)


@st.cache_resource(show_spinner=False)
def _sources(name: str) -> tuple[str, str]:
    """JavaScript and style of a component, with what all share in front."""
    more = MORE.get(name, ())
    return _read("common.js", *more, f"{name}.js"), _read("common.css", f"{name}.css")


def _nothing() -> None:
    """A component calls back only to make its trigger known."""


def packed(data: dict[str, Any]) -> bytes:
    """JSON of the data with its digest as ``version``, written once: what is sent may be a quarter megabyte.

    >>> packed({"a": 1})[:18], packed({}) == packed({}), packed({}) == packed({"a": 1})
    (b'{"a":1,"version":"', True, False)
    """
    body = json.dumps(data, separators=(",", ":")).encode()
    version = hashlib.blake2b(body, digest_size=16).hexdigest().encode()
    return body[:-1] + (b"," if data else b"") + b'"version":"' + version + b'"}'


def _mount(name: str, key: str, data: dict[str, Any], **changes: Any) -> Any:
    """Draw a component; ``changes`` are the names of its states, as ``on_NAME_change``."""
    script, style = _sources(name)
    mount = st.components.v2.component(
        f"head_atlas_{name}", html='<div class="root"></div>', js=script, css=style
    )
    return mount(key=key, data=packed(data), on_open_change=_nothing, **changes)


def heads_grid(key: str, data: dict[str, Any], model: str) -> None:
    """The grid of heads; a click opens the head."""
    clicked = getattr(_mount("grid", key, data), "open", None)
    if clicked:
        go(href("head", model=model, head=f"L{clicked['layer']}H{clicked['head']}"))


Acts = Mapping[str, Callable[[], object]]
"""What the keys of a form can ask for: save, next, before, after, unseen, undo, redo."""


@st.cache_resource(show_spinner=False)
def _keys_script() -> str:
    return _read("keys_fields.js", "keys_hold.js", "keys_help.js", "keys_feature.js", "keys.js")


def form_keys(key: str, place: str, prefix: str, acts: Acts, kind: str = "head") -> None:
    """Invisible: the keys of the form about a head or feature; drawn after it, to tell when that is there.

    What a key asks for comes as a value with a number. It is done once, and only for the place that it was
    asked for; the number goes back as the answer. ``prefix`` is what the keys of the widgets begin with.
    """
    answered = f"{key} answered"

    @whole
    def asked() -> None:
        sent = st.session_state[key].get("asked") or {}
        number = sent.get("seq", 0)
        if number <= st.session_state.get(answered, 0):
            return
        st.session_state[answered] = number
        if sent.get("at") == place and sent.get("do") in acts:
            acts[sent["do"]]()

    mount = st.components.v2.component("head_atlas_keys", js=_keys_script())
    data = {"place": place, "kind": kind, "prefix": prefix, "does": list(acts)}
    mount(key=key, data={**data, "answered": st.session_state.get(answered, 0)}, on_asked_change=asked)


def verdict_list(key: str, data: dict[str, Any], changed: Callable[[], None]) -> None:
    """The top features of a head with a verdict on each; ``changed`` is called when one was given."""
    script, style = _sources("verdicts")
    mount = st.components.v2.component(
        "head_atlas_verdicts", html='<div class="root"></div>', js=script, css=style
    )
    mount(key=key, data=data, on_verdicts_change=changed)


def feature_cards(key: str, data: dict[str, Any]) -> None:
    """The features of a head as cards, or their places; links open the feature."""
    follow(_mount("cards", key, data, on_wanted_change=_nothing))


def wanted(key: str) -> str | None:
    """Of which cards the browser said, in the component of that key, that the reader is near."""
    return (st.session_state.get(key) or {}).get("wanted")


def feature_examples(key: str, data: dict[str, Any]) -> None:
    """The examples of a feature with the panel of heads and sources."""
    follow(_mount("examples", key, data))


def related_features(key: str, data: dict[str, Any]) -> None:
    """Features near one feature, in groups; their links open the feature."""
    follow(_mount("related", key, data))


def sql_complete(key: str, data: dict[str, Any]) -> None:
    """Invisible: suggestions for the SQL editor; their list is part of the page, so that it can be named."""
    mount = st.components.v2.component(
        "head_atlas_complete", html='<div class="root"></div>', isolate_styles=False,
        js=_read("common.js", "sql_words.js", "complete.js"), css=_read("complete.css"),
    )  # fmt: skip
    mount(key=key, data=data)
