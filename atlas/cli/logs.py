"""``atlas logs``: what the steps of a run said while they ran."""

import json
from time import sleep

import click

from atlas.db.runs import load_run
from atlas.db.step_log import KEEP_LINES, LogLine, read_lines
from atlas.errors import one_of
from atlas.settings import Settings, load_settings

POLL_SECONDS = 0.5
OVERLAP = 200
"""Ids read again while following: a line of another worker may be committed after one with a higher id."""


def shown_line(line: LogLine, *, with_step: bool) -> str:
    """A line as people read it; a traceback goes on below, indented."""
    head = f"{line.at:%Y-%m-%d %H:%M:%S} {line.level:7}"
    step = f" {line.step}" if with_step else ""
    return f"{head}{step} [{line.worker}] {line.line}".replace("\n", "\n    ")


def json_line(run_id: str, line: LogLine) -> str:
    """The same fields as JSON."""
    fields = {"run": run_id, "step": line.step, "time": line.at.isoformat(), "level": line.level}
    return json.dumps({**fields, "worker": line.worker, "message": line.line})


def _print(run_id: str, lines: list[LogLine], *, as_json: bool, with_step: bool) -> None:
    for line in lines:
        click.echo(json_line(run_id, line) if as_json else shown_line(line, with_step=with_step))


def _follow(settings: Settings, run_id: str, step: str | None, seen: list[LogLine], *, as_json: bool) -> None:
    known = {line.id for line in seen}
    while True:
        run = load_run(settings, run_id)
        ended = run.ended or any(s.name == step and s.finished_at is not None for s in run.steps)
        newest = max(known, default=0)
        found = read_lines(settings, run_id, step=step, after=max(0, newest - OVERLAP))
        new = [line for line in found if line.id not in known and line.id > min(known, default=0)]
        _print(run_id, new, as_json=as_json, with_step=step is None)
        known.update(line.id for line in new)
        if ended:
            return
        sleep(POLL_SECONDS)


@click.command()
@click.argument("run")
@click.argument("step", required=False)
@click.option("--follow", "-f", is_flag=True, help="Go on until the run (or the step) ends, or Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option(
    "--lines",
    default=KEEP_LINES,
    show_default=True,
    type=click.IntRange(min=1),
    help="Most lines to begin with, the last ones.",
)
def logs(run: str, step: str | None, follow: bool, as_json: bool, lines: int) -> None:
    """Show what the steps of RUN said, or one STEP: begun, how far, warnings, errors with their causes.

    The last 400 lines of each step are kept in the database, so this works wherever the step ran.
    """
    settings = load_settings()
    known = [s.name for s in load_run(settings, run).steps]
    if step is not None:
        one_of("step", step, known)
    found = read_lines(settings, run, step=step, last=lines)
    _print(run, found, as_json=as_json, with_step=step is None)
    if follow:
        try:
            _follow(settings, run, step, found, as_json=as_json)
        except KeyboardInterrupt:
            return
    elif not found:
        click.echo("no lines yet", err=True)
