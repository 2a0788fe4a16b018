"""Live calls of this page: which model and SAEs of the release are meant, and answers that are kept."""

import json
from collections.abc import Sequence
from typing import Any

import streamlit as st

from app.state import Scope
from atlas.live.client import ask_live, prepare
from atlas.settings import Settings
from atlas.store.queries import overview
from atlas.store.queries.features import block_length
from atlas.store.queries.overview import SaeRef

Asked = dict[str, Any]


def model_of(scope: Scope, model: str) -> Asked:
    """The model as a live call wants it: the name that the build was given, and the digest of its files."""
    known = overview.find_model(scope.models, model)
    config = overview.readable(scope.ask(overview.provenance).get("config", ""))
    given = config.get("model", {}) if isinstance(config, dict) else {}
    name = str(given.get("name", ""))
    # A release of several models names one of them in its config.
    fits = name.rstrip("/").split("/")[-1] == known.model
    return {"name": name if fits else known.model, "processing": known.processing, "digest": known.digest}


def saes_of(scope: Scope, refs: Sequence[SaeRef]) -> list[Asked]:
    """SAEs as a live call wants them."""
    digests = scope.ask(overview.sae_digests)
    return [{"name": ref.sae, "digest": digests[ref.sae]} for ref in refs]


def most_tokens(scope: Scope) -> int:
    """Tokens of a text that are looked at: as many as a block of the analysed text has, at least 128."""
    return max(128, int(scope.ask(block_length)))


def warm(scope: Scope, refs: Sequence[SaeRef]) -> None:
    """Let the machine that answers load what the next question needs; once per session and question."""
    given = {"model": model_of(scope, refs[0].model), "saes": saes_of(scope, refs)}
    mark = f"warmed {json.dumps(given)}"
    if mark not in st.session_state:
        st.session_state[mark] = True
        prepare(scope.settings, given)


@st.cache_data(max_entries=100, ttl=3600, show_spinner=False)
def _answer(digest: str, call: str, given: str, _settings: Settings) -> Asked:  # noqa: ARG001 - part of the key
    return ask_live(_settings, call, json.loads(given))


def ask(scope: Scope, call: str, given: Asked) -> Asked:
    """The answer to a live call, asked once for the same question; LiveError says why there is none."""
    return _answer(scope.release.digest, call, json.dumps(given, sort_keys=True), scope.settings)
