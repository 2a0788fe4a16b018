"""Builds: which ran, which run, how far each step is, and what went wrong."""

import html
from datetime import UTC, datetime

import streamlit as st

from app import state, style
from app.colours import BLUE, RED
from atlas.db import runs
from atlas.db.rows import RunRow, StepRow
from atlas.db.schema import exists
from atlas.settings import Settings, load_settings

MARKS = {
    "pending": "○", "ready": "◌", "running": "◐", "done": "●", "skipped": "◎", "failed": "✕",
    "cancelled": "–",
}  # fmt: skip
EVERY_SECONDS = 2.0


def duration(seconds: float | None) -> str:
    """A time span as people say it.

    >>> duration(None), duration(4.2), duration(75), duration(7260)
    ('–', '4 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _spent(row: RunRow | StepRow) -> str:
    if row.started_at is None:
        return "–"
    return duration(((row.finished_at or datetime.now(UTC)) - row.started_at).total_seconds())


def step_line(step: StepRow) -> str:
    """One step as a table row in HTML, escaped."""
    share = 1.0 if step.status in ("done", "skipped") else step.done / step.total if step.total else 0.0
    colour = RED if step.status == "failed" else BLUE
    fill = f'<i style="width:{100 * min(1.0, share):.1f}%;background:{colour}"></i>'
    running = step.status == "running"
    cells = (
        f"{step.done:,} / {step.total:,}" if step.total else "",
        f"{step.rate:,.1f}/s" if step.rate and running else "",
        "" if step.seconds_left is None else duration(step.seconds_left),
        _spent(step),
        html.escape(step.queue),
    )
    numbers = "".join(f"<td>{cell}</td>" for cell in cells)
    return (
        f"<tr><td>{MARKS[step.status]} {html.escape(step.name)}</td><td class='ha-left'>{step.status}</td>"
        f"<td style='width:16%'><div class='ha-progress'>{fill}</div></td>{numbers}"
        f"<td class='ha-left'>{html.escape(step.error or step.message or '')}</td></tr>"
    )


HEADINGS = (
    "<tr><th>step</th><th class='ha-left'>status</th><th></th><th>done</th><th>rate</th><th>left</th>"
    "<th>took</th><th>queue</th><th class='ha-left'>says</th></tr>"
)


def _run(settings: Settings, run: RunRow, open_: bool) -> None:
    when = f"{run.created_at:%Y-%m-%d %H:%M} UTC"
    title = state.plain(f"{MARKS[run.status]} {run.name} · {run.status} · {_spent(run)} · {when}")
    with st.expander(title, expanded=open_, key=f"run_{run.id}", on_change="rerun") as box:
        if not box.open:
            return
        whole = runs.load_run(settings, run.id)
        finished = sum(step.status in ("done", "skipped") for step in whole.steps)
        asked = ", asked to stop" if run.cancel_requested and not run.ended else ""
        st.caption(state.plain(f"{run.id} · {finished}/{len(whole.steps)} steps · {run.executor}{asked}"))
        if run.error:
            st.error(state.plain(run.error), icon=":material/error:")
        lines = "".join(step_line(step) for step in whole.steps)
        st.html(f"<div class='ha-scroll'><table class='ha-table'>{HEADINGS}{lines}</table></div>")


@st.fragment(run_every=EVERY_SECONDS)
def _list(settings: Settings) -> None:
    known = runs.list_runs(settings, limit=30)
    if not known:
        st.info("Nothing was built yet. A build makes a release:")
        st.code("atlas build --model docs-12l --sites z --layers all", language="bash")
        return
    for place, run in enumerate(known):
        _run(settings, run, not run.ended or place == 0)


def render() -> None:
    """Recent runs, the newest first; what runs is read again every two seconds."""
    settings = load_settings()
    style.title("Jobs", "builds and their steps; read again every two seconds")
    if not exists(settings):
        st.info("Nothing was built yet, so there is no database. A build makes both:")
        st.code("atlas build --model docs-12l --sites z --layers all", language="bash")
        return
    _list(settings)
