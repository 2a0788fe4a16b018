"""``atlas build --dry-run``: the steps, which are current, and what the others will cost."""

import json
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from atlas.cli.status import readable_seconds
from atlas.configs import BuildConfig
from atlas.errors import ConfigError
from atlas.pipeline.costs import Cost, total
from atlas.pipeline.estimates import estimate, measured_flops_per_second
from atlas.pipeline.execute import current_steps, waiting_for
from atlas.pipeline.plan import Plan, make_plan
from atlas.settings import Settings
from atlas.units import amount

MEASURED = "measured"


def read_rate(text: str | None) -> float | str | None:
    """FLOPs per second: a number above 0, ``measured``, or None where none is asked for.

    >>> read_rate("2e14"), read_rate("measured"), read_rate(None)
    (200000000000000.0, 'measured', None)
    """
    if text is None or text == MEASURED:
        return text
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ConfigError(f"flops {text!r} is no rate; allowed: FLOPs per second such as 2e14, or {MEASURED}")
    return rate


def plan_rows(plan: Plan, settings: Settings, flops_per_second: float | None) -> list[dict[str, Any]]:
    """Each step with its state and its cost; times are FLOPs at the given rate, and nothing else."""
    current, costs = current_steps(plan, waiting_for(plan, settings)), estimate(plan, settings)
    rows = []
    for step in plan.steps:
        cost = costs[step.name]
        seconds = None
        if flops_per_second and cost.flops is not None:
            seconds = cost.flops / flops_per_second
        rows.append(
            {
                "step": step.name,
                "kind": step.kind,
                "queue": step.queue,
                "state": "current" if step.name in current else "to do",
                "digest": step.digest,
                "needs": list(step.needs),
                **asdict(cost),
                "seconds": seconds,
            }
        )
    return rows


def _sum(rows: list[dict[str, Any]]) -> Cost:
    return total(Cost(row["tokens"], row["flops"], row["bytes"]) for row in rows)


def show_plan(
    config: BuildConfig, settings: Settings, *, as_json: bool = False, rate: float | str | None = None
) -> None:
    """Print the plan of a build with what is current, what will run and what it will cost; do nothing."""
    plan = make_plan(config, settings)
    per_second = measured_flops_per_second(settings) if rate == MEASURED else rate
    per_second = float(per_second) if per_second is not None else None
    rows = plan_rows(plan, settings, per_second)
    waiting = [row for row in rows if row["state"] == "to do"]
    whole = _sum(waiting)
    seconds = whole.flops / per_second if per_second and whole.flops else None
    if as_json:
        to_do = {"steps": len(waiting), **asdict(whole), "seconds": seconds}
        found = {
            "release": config.release_name,
            "flops_per_second": per_second,
            "steps": rows,
            "to_do": to_do,
        }
        click.echo(json.dumps(found))
        return
    _print(rows, waiting, whole, seconds, per_second)


def _print(
    rows: list[dict[str, Any]],
    waiting: list[dict[str, Any]],
    whole: Cost,
    seconds: float | None,
    per_second: float | None,
) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("state", "queue", "step", "digest"):
        table.add_column(heading, no_wrap=True)
    headings = ("tokens", "FLOP", "bytes", *(("time",) if per_second else ()))
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right")
    for row in rows:
        cells = [amount(row[key]) for key in ("tokens", "flops", "bytes")]
        cells += [readable_seconds(row["seconds"])] if per_second else []
        table.add_row(row["state"], row["queue"], row["step"], row["digest"][:16], *cells)
    cells = [amount(v) for v in (whole.tokens, whole.flops, whole.bytes)]
    cells += [readable_seconds(seconds)] if per_second else []
    table.add_row("", "", f"to do: {len(waiting)} of {len(rows)} steps", "", *cells, style="bold")
    # As wide as it needs to be: a line cut short would hide numbers from a pipe.
    Console(width=max(Console().width, 130)).print(table)
    if per_second:
        click.echo(f"times: matrix products alone, at {amount(per_second)}FLOP/s on one worker")
