"""``atlas status`` and ``atlas cancel``: what runs, how far it is, and how to stop it."""

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from atlas.db.leases import request_cancel
from atlas.db.owner import is_dead
from atlas.db.rows import RunRow, StepRow
from atlas.db.runs import list_runs, load_run
from atlas.settings import Settings, load_settings
from atlas.units import Unit, units_of

PATIENCE_SECONDS = 10.0
WIDE = 160
NO_WORKER = "no worker has taken a step yet; start one: atlas worker"
_COLOURS = {"done": "green", "skipped": "green", "running": "yellow", "failed": "red", "cancelled": "magenta"}


def _coloured(status: str) -> Text:
    return Text(status, style=_COLOURS.get(status, ""))


def readable_seconds(seconds: float | None) -> str:
    """A duration in at most two units.

    >>> [readable_seconds(s) for s in (None, 8.4, 75, 3700, 200000)]
    ['', '8s', '1m 15s', '1h 01m', '2d 07h']
    """
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600:02d}h"


def readable_rate(rate: float | None) -> str:
    """Units per second in three digits.

    >>> [readable_rate(r) for r in (None, 0.25, 12.34, 5600.0)]
    ['', '0.25/s', '12.3/s', '5.6k/s']
    """
    if rate is None:
        return ""
    return f"{rate / 1000:.3g}k/s" if rate >= 1000 else f"{rate:.3g}/s"


def _rate(step: StepRow, unit: Unit | None) -> str:
    """A running step's speed: in tokens where its units are text."""
    if step.status != "running" or step.rate is None:
        return ""
    if unit is not None and unit.tokens:
        return readable_rate(step.rate * unit.tokens).replace("/s", " tok/s")
    return readable_rate(step.rate)


def _took(row: RunRow | StepRow) -> float | None:
    if row.started_at is None:
        return None
    return ((row.finished_at or datetime.now(UTC)) - row.started_at) / timedelta(seconds=1)


def _said(step: StepRow) -> str:
    if step.status == "running" and step.lease_owner is not None and is_dead(step.lease_owner):
        return "its process is gone; it goes on when somebody takes it over"
    return step.error or step.message


def _progress(step: StepRow) -> str:
    if not step.total or step.status not in ("running", "failed", "cancelled"):
        return ""
    return f"{100 * step.done / step.total:.0f}%"


def no_worker_yet(run: RunRow) -> bool:
    """Whether a run has waited for a worker for so long that there may be none."""
    waited = (datetime.now(UTC) - run.created_at) / timedelta(seconds=1)
    return run.executor == "queue" and run.status == "pending" and waited > PATIENCE_SECONDS


def run_view(run: RunRow) -> Group:
    """One run with its steps: state, progress, rate, time left, attempts, last words."""
    table = Table(box=None, pad_edge=False)
    units = units_of(run.config_json, [step.kind for step in run.steps])
    for heading in ("step", "queue", "status", "", "rate", "left", "took", "tries", "MB"):
        table.add_column(heading, no_wrap=True)
    table.add_column("", overflow="ellipsis", no_wrap=True)
    for step in run.steps:
        memory = "" if step.peak_rss_mb is None else f"{step.peak_rss_mb:.0f}"
        table.add_row(
            step.name,
            step.queue,
            _coloured(step.status),
            _progress(step),
            _rate(step, units.get(step.kind)),
            readable_seconds(step.seconds_left),
            readable_seconds(_took(step)),
            str(step.attempts or ""),
            memory,
            Text(_said(step)),
        )
    done = sum(step.status in ("done", "skipped") for step in run.steps)
    head = Text.assemble(
        f"run {run.id}  {run.name}  ", _coloured(run.status), f"  {done}/{len(run.steps)} steps"
    )
    if run.cancel_requested and not run.ended:
        head.append("  stopping", style="magenta")
    parts: list[Text | Table] = [head, table]
    if no_worker_yet(run):
        parts.append(Text(NO_WORKER, style="yellow"))
    if run.error:
        parts.append(Text(run.error, style="red"))
        parts.append(Text(f"what its steps said: atlas logs {run.id}"))
    return Group(*parts)


def as_fields(run: RunRow) -> dict[str, Any]:
    """A run as plain values: times in ISO 8601, its config as a table, each step with its time left."""
    fields = asdict(run) | {"config": json.loads(run.config_json)}
    del fields["config_json"]
    for step, row in zip(fields["steps"], run.steps, strict=True):
        step["seconds_left"] = row.seconds_left
    moments = {name: value.isoformat() for name, value in fields.items() if isinstance(value, datetime)}
    for step in fields["steps"]:
        step.update({name: v.isoformat() for name, v in step.items() if isinstance(v, datetime)})
    return fields | moments


def runs_view(runs: list[RunRow]) -> Table | Text:
    """The most recent runs, a line each."""
    if not runs:
        return Text("no runs yet; start one: atlas build")
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "release", "where", "status", "created (UTC)", "took"):
        table.add_column(heading, no_wrap=True)
    table.add_column("", overflow="ellipsis", no_wrap=True)
    for run in runs:
        where = "workers" if run.executor == "queue" else "in process"
        created = f"{run.created_at:%Y-%m-%d %H:%M:%S}"
        took = readable_seconds(_took(run))
        table.add_row(run.id, run.name, where, _coloured(run.status), created, took, Text(run.error or ""))
    return table


def _view(settings: Settings, run_id: str | None) -> tuple[Group | Table | Text, bool]:
    """What to show, and whether it can still change."""
    if run_id is None:
        return runs_view(list_runs(settings)), True
    run = load_run(settings, run_id)
    return run_view(run), not run.ended


@click.command()
@click.argument("run", required=False)
@click.option("--watch", is_flag=True, help="Keep the view up to date until the run ends or Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="As JSON: a list of runs, or one run with its steps.")
def status(run: str | None, watch: bool, as_json: bool) -> None:
    """Show the recent runs, or the steps of one RUN."""
    settings = load_settings()
    if as_json:
        found = [as_fields(one) for one in list_runs(settings)] if run is None else None
        click.echo(json.dumps(as_fields(load_run(settings, run)) if run is not None else found, default=str))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)  # a table cut to 80 columns says nothing in a log or a pipe
    view, alive = _view(settings, run)
    if not watch:
        console.print(view)
        return
    try:
        with Live(view, console=console, refresh_per_second=4) as live:
            while alive:
                time.sleep(0.5)
                view, alive = _view(settings, run)
                live.update(view)
    except KeyboardInterrupt:
        return


@click.command()
@click.argument("run")
def cancel(run: str) -> None:
    """Ask RUN to stop. What is finished is kept; building again goes on from there."""
    settings = load_settings()
    request_cancel(settings, run)
    now = load_run(settings, run)
    running = [step.name for step in now.steps if step.status == "running"]
    if running:
        click.echo(f"run {run} is stopping: {', '.join(running)} will end at the next report")
    else:
        click.echo(f"run {run} is {now.status}")
