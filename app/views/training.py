"""Trainings: how they went, and how those that run now are going."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from app import access, navigation, state, style, training_charts
from app.job_tables import duration
from app.state import Scope
from atlas import figures
from atlas.errors import StoreError, one_of
from atlas.settings import Settings, load_settings
from atlas.store.live import LiveReader, LiveTraining
from atlas.store.queries import quality
from atlas.store.queries import training as queries

RELEASE = "release"
EVERY_SECONDS = 2.0
SILENT_SECONDS = 120.0
"""A training that has written nothing for this long may have been stopped."""
AT_FIRST, AT_MOST = 12, 24
MAKE_ONE = "atlas build --model docs-12l --sites z --layers all"


@st.cache_resource(show_spinner=False)
def _reader(steps: str) -> LiveReader:  # noqa: ARG001 - one reader per folder
    return LiveReader()


def _running(settings: Settings) -> list[LiveTraining]:
    return _reader(str(settings.steps)).trainings(settings)


def _silent(one: LiveTraining) -> bool:
    """Whether a training has written nothing for so long that it was probably stopped."""
    return time.time() - one.changed > SILENT_SECONDS


def _known(settings: Settings, *, released: bool) -> dict[str, str]:
    """Trainings and what they are called: those that run, the release's, those that were stopped."""
    found = _running(settings)
    names = {one.step: f"running: {one.step[:14]}" for one in found if not _silent(one)}
    names |= {RELEASE: "in the release"} if released else {}
    return names | {one.step: f"stopped: {one.step[:14]}" for one in found if _silent(one)}


def _choose_run(names: Mapping[str, str]) -> str:
    """Which training is shown: the one that the address names, else what runs, else the release's."""
    known = list(names)
    asked = st.query_params.get("run")
    if asked is not None:
        if asked not in known:
            return asked  # it has ended, or never was; the view says so
        st.session_state["training_run"] = asked
    elif st.session_state.get("training_run") not in known:
        st.session_state["training_run"] = known[0]
    if len(known) == 1:
        return known[0]
    chosen = st.segmented_control(
        "Training", known, format_func=names.__getitem__, key="training_run", required=True,
        label_visibility="collapsed", on_change=_to_address,
    )  # fmt: skip
    return str(chosen)


def _to_address() -> None:
    """The address follows the choice; SAEs of another training do not stay chosen."""
    st.query_params["run"] = st.session_state["training_run"]
    st.query_params.pop("sae", None)


def _choose_saes(known: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The SAEs that are drawn: from the address, or the first few of the chosen kind of site."""
    by_name = {row["sae"]: row for row in known}
    asked = [name for name in st.query_params.get_all("sae") if name]
    for name in asked:
        one_of("SAE of this training", name, list(by_name), StoreError)
    sites = list(dict.fromkeys(str(row.get("site", "other")) for row in known))
    site = str(by_name[asked[0]].get("site", "other")) if asked else sites[0]
    right = st.container()
    if len(sites) > 1:
        left, right = st.columns([1, 4], vertical_alignment="bottom")
        with left:
            if asked or st.session_state.get(f"{key}_site") not in sites:
                st.session_state[f"{key}_site"] = site
            site = st.selectbox("Sites", sites, key=f"{key}_site", on_change=_forget, args=(key,))
    of_site = [row["sae"] for row in known if str(row.get("site", "other")) == site]
    options = list(dict.fromkeys([*of_site, *asked]))
    chosen = st.session_state.get(f"{key}_saes")
    if chosen is None or not set(chosen) <= set(options):
        st.session_state[f"{key}_saes"] = (asked or of_site)[: AT_MOST if asked else AT_FIRST]
    with right:
        names = st.multiselect(
            f"SAEs ({len(of_site)} of this kind of site)", options, key=f"{key}_saes",
            max_selections=AT_MOST, format_func=lambda name: name.rpartition("/")[2],
            on_change=_address_saes, args=(key,),
        )  # fmt: skip
    return [by_name[name] for name in names]


def _forget(key: str) -> None:
    st.session_state.pop(f"{key}_saes", None)
    st.query_params.pop("sae", None)


def _address_saes(key: str) -> None:
    st.query_params["sae"] = st.session_state[f"{key}_saes"]


def _of(rows: pa.Table, names: list[str]) -> pa.Table:
    return rows.filter(pc.is_in(rows["sae"], pa.array(names, pa.string())))


def _in_order(row: dict[str, Any]) -> tuple[Any, ...]:
    """By place, then by setting as a number; a name that says nothing comes first."""
    numbers = (-1 if row.get(name) is None else row[name] for name in ("layer", "head"))
    settings = (row.get(name) or 0 for name in ("d_sae", "l1_coefficient", "k"))
    return (*numbers, row.get("site", ""), *settings, row["sae"])


def _last(log: pa.Table) -> dict[str, dict[str, Any]]:
    """The last row of every SAE's log."""
    places = {sae: place for place, sae in enumerate(log["sae"].to_pylist())}
    return {row["sae"]: row for row in log.take(list(places.values())).to_pylist()}


def _facts(log: pa.Table, more: list[tuple[str, str]]) -> None:
    last = list(_last(log).values())
    newest = max(last, key=lambda row: row["step"])

    def span(name: str, percent: bool = False) -> str:
        values = [row[name] for row in last if row[name] is not None]
        if not values:
            return "–"
        low, high = (f"{v:.1%}" if percent else style.number(v) for v in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    style.facts([
        ("SAEs shown", str(len(last))), ("step", f"{newest['step']:,}"), ("tokens", f"{newest['tokens']:,}"),
        ("L0", span("l0")), ("variance explained", span("variance_explained", True)),
        ("dead", span("dead_fraction", True)),
        ("tokens per second", style.number(newest["tokens_per_second"])), *more,
    ])  # fmt: skip


def _details(rows: Callable[[str, str], pa.Table], saes: list[dict[str, Any]], key: str) -> None:
    """What is drawn for one SAE at a time; ``rows`` gives a table's rows of an SAE."""
    names = [row["sae"] for row in saes]
    if st.session_state.get(f"{key}_one") not in names:
        st.session_state[f"{key}_one"] = names[0]
    one = names[0]
    if len(names) > 1:
        one = st.selectbox("Firing rates and watched features of", names, key=f"{key}_one")
    with st.container(key=f"charts-{key}-density"):
        training_charts.density(rows("training_density", one), key)
    training_charts.watched(rows("training_watched", one), key)


def _finished(scope: Scope) -> None:
    known = scope.ask(queries.trained, scope.model.model).to_pylist()
    if not known:
        model = state.plain(scope.model.model)
        st.info(f"This release holds no training log of {model}; imported SAEs have none.")
        return
    saes = _choose_saes(known, "finished")
    if not saes:
        st.info("No SAE is chosen; choose one above.")
        return
    names = tuple(row["sae"] for row in saes)
    log = scope.ask(queries.rows_of, "training_log", names)
    _facts(log, [("release", scope.release.label)])
    training_charts.curves(log, saes, "finished")
    swept = scope.ask(quality.sweep, scope.model.model).to_pylist()
    training_charts.sweep([row for row in swept if row["sae"] in names], "finished", "on held-out text")
    _details(lambda name, sae: scope.ask(queries.rows_of, name, (sae,)), saes, "finished")


def _ended(step: str) -> None:
    st.info(f"Training {state.plain(step)} is not running: it is done, was removed, or never was.")
    st.page_link(navigation.page("jobs"), label="Go to the jobs")


@st.fragment(run_every=EVERY_SECONDS)
def _going(settings: Settings, step: str) -> None:
    access.gate(settings)
    found = next((one for one in _running(settings) if one.step == step), None)
    if found is None:
        _ended(step)
        return
    log = found.tables["training_log"]
    if not log.num_rows:
        st.info("This training has begun and has not logged a step yet.")
        return
    names = pc.unique(log["sae"]).to_pylist()
    known = sorted((figures.settings_of(name) for name in names), key=_in_order)
    saes = _choose_saes(known, "live")
    if not saes:
        st.info("No SAE is chosen; choose one above.")
        return
    chosen = [row["sae"] for row in saes]
    silent = max(0.0, time.time() - found.changed)
    log = _of(log, chosen)
    _facts(log, [("last written", f"{duration(silent)} ago")])
    if silent > SILENT_SECONDS:
        st.warning(f"Nothing was written for {duration(silent)}; the training may have been stopped.")
    training_charts.curves(log, saes, "live")
    last = _last(log)
    so_far = [{**row, **last[row["sae"]], "dead_share": last[row["sae"]]["dead_fraction"]} for row in saes]
    training_charts.sweep(so_far, "live", "so far, in the training text")
    _details(lambda name, sae: _of(found.tables[name], [sae]), saes, "live")


def render() -> None:
    """The curves of a training, finished or running."""
    settings = load_settings()
    style.title("Training", "how the SAEs learned; a running training is read again every two seconds")
    released = bool(state.release_names(settings))
    known = _known(settings, released=released)
    if not known and "run" not in st.query_params:
        st.info("No training runs, and there is no release yet. A build trains SAEs and publishes them:")
        st.code(MAKE_ONE, language="bash")
        return
    run = _choose_run(known)
    if run != RELEASE:
        _going(settings, run)
    elif released:
        _finished(state.scope())
    else:
        raise StoreError("run 'release' does not exist: there is no release yet")
