"""Builds: which ran and run, how far each step is, what it said; builds are started and stopped here."""

import streamlit as st

from app import access, job_start, state, style
from app.dag import MARKS, dag_html
from app.job_tables import MANY, log_html, spent, steps_table, workers_table
from atlas.db import runs
from atlas.db.leases import request_cancel
from atlas.db.rows import RunRow
from atlas.db.schema import exists
from atlas.db.step_log import read_lines
from atlas.db.workers import list_workers
from atlas.errors import AtlasError
from atlas.settings import Settings, load_settings

EVERY_SECONDS = 2.0
SHOWN_LINES = 200
ALL = "all steps"


def _may_run() -> bool:
    """Whether the person here may start, stop and retry builds."""
    return access.can("jobs")


def _act(what: str, work: object, *args: object) -> None:
    """Carry out a button's work; what goes wrong is said, not raised."""
    try:
        work(*args)  # type: ignore[operator]
        st.toast(what)
    except AtlasError as error:
        state.say_error(error)


def _buttons(settings: Settings, run: RunRow) -> None:
    if not _may_run():
        return
    if not run.ended:
        asked = run.cancel_requested
        label = "Stopping…" if asked else "Cancel"
        help_ = "Running steps stop at their next report; what is finished is kept."
        if st.button(label, key=f"cancel_{run.id}", disabled=asked, help=help_):
            _act("The run is stopping.", request_cancel, settings, run.id)
    elif run.status in ("failed", "cancelled"):
        help_ = "A new run of the same config; what this one finished is not done again."
        if st.button("Retry", key=f"retry_{run.id}", help=help_):
            _act("A new run is being planned.", job_start.start_again, settings, run.config_json)


def _facts(run: RunRow) -> None:
    finished = sum(step.status in ("done", "skipped") for step in run.steps)
    facts = [
        ("run", run.id),
        ("steps", f"{finished}/{len(run.steps)}"),
        ("where", "workers" if run.executor == "queue" else "in process"),
        ("took", spent(run)),
    ]
    if run.started_by:
        facts.append(("started by", run.started_by))
    if run.cancel_requested:
        facts.append(("asked to stop by", run.cancelled_by or "somebody"))
    retried = sum(max(0, step.attempts - 1) for step in run.steps)
    if retried:
        facts.append(("repeated attempts", str(retried)))
    style.facts(facts)


def _log(settings: Settings, run: RunRow) -> None:
    """What the steps said: of all, or of one."""
    urgent = [s.name for s in run.steps if s.status == "failed"] + [
        s.name for s in run.steps if s.status == "running"
    ]
    names = [ALL, *urgent, *(s.name for s in run.steps if s.name not in urgent)]
    chosen = st.selectbox("Log, newest first, of", names, key=f"log_{run.id}", width=420)
    lines = read_lines(settings, run.id, step=None if chosen == ALL else chosen, last=SHOWN_LINES)
    if lines:
        st.html(log_html(lines, with_step=chosen == ALL))
    else:
        st.caption("No lines yet.")


def _run(settings: Settings, run: RunRow, open_: bool) -> None:
    when = f"{run.created_at:%Y-%m-%d %H:%M} UTC"
    title = state.plain(f"{MARKS[run.status]} {run.name} · {run.status} · {spent(run)} · {when}")
    with st.expander(title, expanded=open_, key=f"run_{run.id}", on_change="rerun") as box:
        if not box.open:
            return
        whole = runs.load_run(settings, run.id)
        left, right = st.columns([6, 1], vertical_alignment="center")
        with left:
            _facts(whole)
        with right:
            _buttons(settings, whole)
        if whole.error:
            st.error(state.plain(whole.error), icon=":material/error:")
        st.html(dag_html(whole.steps))
        every = False
        if len(whole.steps) >= MANY:
            every = st.toggle("Every step in a row of its own", key=f"every_{run.id}")
        st.html(steps_table(whole, every=every))
        _log(settings, whole)


def _workers(settings: Settings) -> None:
    known = list_workers(settings)
    if known:
        alive = sum(one.alive for one in known)
        style.section("Workers", f"{alive} alive, {len(known) - alive} gone")
        st.html(workers_table(known))
    elif settings.broker_url is not None:
        st.warning(
            "No worker has said that it is there. Start one: `atlas worker`", icon=":material/warning:"
        )


@st.fragment(run_every=EVERY_SECONDS)
def _list(settings: Settings) -> None:
    access.gate(settings)  # a page that reads by itself ends with its login, too
    job_start.say_started()
    if not exists(settings):
        st.info("Nothing was built yet, so there is no database. A build makes both:")
        st.code("atlas build --model docs-12l --sites z --layers all", language="bash")
        return
    known = runs.list_runs(settings, limit=30)
    asked = st.query_params.get("run")
    if not known:
        st.info("Nothing was built yet. A build makes a release:")
        st.code("atlas build --model docs-12l --sites z --layers all", language="bash")
    for place, run in enumerate(known):
        _run(settings, run, run.id == asked if asked else not run.ended or place == 0)
    _workers(settings)


def render() -> None:
    """Recent runs, the newest first; what runs is read again every two seconds."""
    settings = load_settings()
    style.title("Jobs", "builds and their steps; read again every two seconds")
    if _may_run():
        job_start.form(settings)
    else:
        st.caption("Starting, stopping and retrying builds is for admins.")
    _list(settings)
