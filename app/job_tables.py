"""The tables of the jobs view, as HTML: steps or groups of steps, workers, log lines, a plan's costs."""

import html
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from app.colours import BLUE, RED
from app.dag import MARKS, WORDS, Box, grouped
from atlas.db.rows import RunRow, StepRow
from atlas.db.step_log import LogLine
from atlas.db.workers import WorkerRow
from atlas.units import Unit, amount, units_of

MANY = 24
"""From so many steps on, finished and waiting ones of a kind share a row."""


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


def spent(row: RunRow | StepRow) -> str:
    """How long a run or step has taken so far."""
    if row.started_at is None:
        return "–"
    return duration(((row.finished_at or datetime.now(UTC)) - row.started_at).total_seconds())


def rate_of(step: StepRow, unit: Unit | None) -> str:
    """A running step's speed: in tokens where its units are text, else in its units."""
    if step.status != "running" or not step.rate:
        return ""
    if unit is not None and unit.tokens:
        return f"{amount(step.rate * unit.tokens)} tokens/s"
    return f"{step.rate:,.3g} {unit.name if unit else ''}/s".replace(" /s", "/s")


def _share(step: StepRow) -> float:
    if step.status in ("done", "skipped"):
        return 1.0
    return min(1.0, step.done / step.total) if step.total else 0.0


def _bar(share: float, failed: bool) -> str:
    fill = f'<i style="width:{100 * share:.1f}%;background:{RED if failed else BLUE}"></i>'
    return f"<td style='width:12%'><div class='ha-progress'>{fill}</div></td>"


def _said(step: StepRow) -> str:
    """A step's error or last words; of one that nobody has been heard of for too long, that."""
    if step.status == "running" and step.lease_until is not None and step.lease_until < datetime.now(UTC):
        return "nothing was heard of its worker; it goes on when somebody takes it over"
    return step.error or step.message or ""


def step_line(step: StepRow, unit: Unit | None = None) -> str:
    """One step as a table row, escaped."""
    unit_name = f" {unit.name}" if unit and unit.name else ""
    cells = (
        f"{step.done:,} / {step.total:,}{unit_name}" if step.total else "",
        rate_of(step, unit),
        "" if step.seconds_left is None else duration(step.seconds_left),
        spent(step),
        f"{step.peak_rss_mb:,.0f} MB" if step.peak_rss_mb else "",
        str(step.attempts or ""),
        html.escape(step.queue),
    )
    numbers = "".join(f"<td>{cell}</td>" for cell in cells)
    said = html.escape(_said(step))
    return (
        f"<tr><td>{MARKS[step.status]} {html.escape(step.name)}</td>"
        f"<td class='ha-left ha-nowrap'>{WORDS.get(step.status, step.status)}</td>"
        f"{_bar(_share(step), step.status == 'failed')}{numbers}<td class='ha-left'>{said}</td></tr>"
    )


def group_line(box: Box, steps: Sequence[StepRow]) -> str:
    """Several steps of a kind that nobody has to look at one by one, as one row."""
    count: dict[str, int] = {}
    for step in steps:
        count[step.status] = count.get(step.status, 0) + 1
    words = ", ".join(f"{n} {WORDS.get(state, state)}" for state, n in count.items())
    share = sum(_share(step) for step in steps) / len(steps)
    peak = max((step.peak_rss_mb or 0 for step in steps), default=0)
    cells = ("", "", "", "", f"{peak:,.0f} MB" if peak else "", "", html.escape(steps[0].queue))
    numbers = "".join(f"<td>{cell}</td>" for cell in cells)
    name = f"{steps[0].kind} × {len(steps)}" + (" others" if len(steps) < len(box.steps) else "")
    return (
        f"<tr><td>≡ {html.escape(name)}</td><td class='ha-left'>{words}</td>"
        f"{_bar(share, False)}{numbers}<td class='ha-left'></td></tr>"
    )


_HEADINGS = ("status", "", "done", "rate", "left", "took", "peak memory", "tries", "queue", "says")


def steps_table(run: RunRow, *, every: bool = False) -> str:
    """All steps of a run; in a long one the finished and waiting of a kind share a row, unless ``every``."""
    units = units_of(run.config_json, [step.kind for step in run.steps])
    if every or len(run.steps) < MANY:
        lines = [step_line(step, units.get(step.kind)) for step in run.steps]
    else:
        lines = []
        for box in grouped(run.steps)[0].values():
            alone = [s for s in box.steps if s.status in ("running", "failed") or len(box.steps) == 1]
            rest = [s for s in box.steps if s not in alone]
            lines += [group_line(box, rest)] if rest else []
            lines += [step_line(step, units.get(step.kind)) for step in alone]
    left = {"status", "says"}
    head = "".join(
        f"<th{' class=ha-left' if h in left else ''}>{h}</th>" if h else "<td></td>" for h in _HEADINGS
    )
    body = "".join(lines)
    table = f"<table class='ha-table ha-steps'><tr><th>step</th>{head}</tr>{body}</table>"
    return f"<div class='ha-scroll'>{table}</div>"


def workers_table(workers: Sequence[WorkerRow]) -> str:
    """Who is there to do the work."""
    now = datetime.now(UTC)
    lines = []
    for one in workers:
        seen = "–" if one.seen_at is None else f"{duration(max(0, (now - one.seen_at).total_seconds()))} ago"
        state = "● alive" if one.alive else "✕ gone"
        cells = (one.name, state, ", ".join(one.queues), one.device, str(one.concurrency), one.version, seen)
        doing = ", ".join(one.steps) or "–"
        shown = "".join(f"<td class='ha-left'>{html.escape(cell)}</td>" for cell in (*cells, doing))
        lines.append(f"<tr>{shown}</tr>")
    names = ("worker", "state", "queues", "device", "at once", "version", "last word", "works on")
    head = "".join(f"<th class='ha-left'>{name}</th>" for name in names)
    return f"<div class='ha-scroll'><table class='ha-table'><tr>{head}</tr>{''.join(lines)}</table></div>"


def log_html(lines: Sequence[LogLine], *, with_step: bool) -> str:
    """Log lines, the newest first, escaped; warnings and errors are marked beside their word."""
    out = []
    for line in reversed(lines):
        kind = {"WARNING": "warn", "ERROR": "error", "CRITICAL": "error"}.get(line.level, "")
        step = f" {line.step}" if with_step else ""
        head = html.escape(f"{line.at:%H:%M:%S} {line.level}{step} [{line.worker}]")
        out.append(f'<div class="{kind}"><span>{head}</span> {html.escape(line.line)}</div>')
    return f'<div class="ha-log" tabindex="0" role="log" aria-label="Log">{"".join(out)}</div>'


def costs_table(plan: Mapping[str, Any]) -> str:
    """What a dry run found, one row per kind and state of step, with the sum of what is to do."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in plan["steps"]:
        groups.setdefault((row["kind"], row["state"]), []).append(row)
    lines = []
    for (kind, state), rows in groups.items():
        cells = [amount(_total(rows, key)) for key in ("tokens", "flops", "bytes")]
        lines.append(
            _cost_line(f"{kind} × {len(rows)}" if len(rows) > 1 else kind, state, rows[0]["queue"], cells)
        )
    to_do = plan["to_do"]
    sums = [amount(to_do[key]) for key in ("tokens", "flops", "bytes")]
    lines.append(_cost_line("to do in all", f"{to_do['steps']} steps", "", sums))
    head = "<th>step</th><th class='ha-left'>state</th><th class='ha-left'>queue</th>"
    head += "<th>tokens</th><th>FLOP</th><th>bytes</th>"
    return f"<div class='ha-scroll'><table class='ha-table'><tr>{head}</tr>{''.join(lines)}</table></div>"


def _total(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    known = [row[key] for row in rows if row[key] is not None]
    return sum(known) if known else None


def _cost_line(name: str, state: str, queue: str, cells: Sequence[str]) -> str:
    words = "".join(f"<td class='ha-left'>{html.escape(word)}</td>" for word in (state, queue))
    return f"<tr><td>{html.escape(name)}</td>{words}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
