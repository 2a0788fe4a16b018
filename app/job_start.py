"""A new build from the app: its config, what it would cost, and its start."""

import streamlit as st

from app import state
from app.job_tables import costs_table
from atlas.configs import BuildConfig
from atlas.errors import AtlasError
from atlas.launch import Launched, beginning, launch, planned, read_config
from atlas.settings import Settings

TEMPLATE = """# every key and its meaning: docs/build.md
release = "my-atlas"

[model]
name = "docs-12l"      # bundled, a folder, or a hub name

[corpus]
source = "stdlib"
blocks = 8192

[sites]
kinds = ["z"]
layers = "all"

[[sae]]
architecture = "topk"
expansion = 8
k = 32

[train]
tokens = 2_000_000
"""
_TEXT, _PLAN, _STARTED = "job_config", "job_plan", "job_started"


def _check(settings: Settings, text: str) -> None:
    """Plan the build, which says what is wrong in the config and what the rest will cost."""
    st.session_state.pop(_PLAN, None)
    with st.spinner("Planning…"):
        st.session_state[_PLAN] = (text, planned(settings, read_config(text)))


def _start(settings: Settings, config: BuildConfig) -> None:
    st.session_state[_STARTED] = launch(settings, config)


def start_again(settings: Settings, config_json: str) -> None:
    """Build once more what a run asked for; finished steps are current, training goes on."""
    _start(settings, BuildConfig.from_json(config_json))


def form(settings: Settings) -> None:
    """A config to edit, to check and to start."""
    with st.expander("New build", icon=":material/add:", key="new_build"):
        text = st.text_area("Config (TOML)", TEMPLATE, height=380, key=_TEXT)
        left, right, _ = st.columns([1, 1, 5])
        try:
            if left.button("Check and estimate", key="job_check"):
                _check(settings, text)
            if right.button("Start", type="primary", key="job_start"):
                _start(settings, read_config(text))
        except AtlasError as error:
            state.say_error(error)
        found = st.session_state.get(_PLAN)
        if found is not None and found[0] == text:
            st.html(costs_table(found[1]))


def say_started() -> None:
    """What became of the build that this session started last, until its run is in the list."""
    started = st.session_state.get(_STARTED)
    if not isinstance(started, Launched):
        return
    so_far = beginning(started)
    if so_far.error is not None:
        st.error(state.plain(f"The build did not begin: {so_far.error}"), icon=":material/error:")
    elif so_far.run is not None:
        st.success(state.plain(f"Run {so_far.run} has begun."), icon=":material/check:")
    elif so_far.nothing:
        st.info("There was nothing to do: everything is current.")
    elif not so_far.alive:
        st.error(state.plain(f"The build ended without a word; see {started.log}"), icon=":material/error:")
    else:
        st.info("The build is being planned; its run appears below in a few seconds.")
