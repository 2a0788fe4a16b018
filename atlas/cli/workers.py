"""``atlas workers``: who is there to do the work, what each serves, on what device, and what it works on."""

from datetime import UTC, datetime, timedelta

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atlas.cli.status import readable_seconds
from atlas.db.workers import WorkerRow, list_workers
from atlas.settings import load_settings


def workers_view(rows: list[WorkerRow], now: datetime) -> Table | Text:
    """The workers, a line each."""
    if not rows:
        return Text("no worker has said that it is there; start one: atlas worker")
    table = Table(box=None, pad_edge=False)
    for heading in ("worker", "", "queues", "device", "at once", "up", "last seen"):
        table.add_column(heading, no_wrap=True)
    table.add_column("works on", overflow="fold")
    for row in rows:
        state = Text("alive", style="green") if row.alive else Text("gone", style="red")
        up, seen = (readable_seconds(_since(moment, now)) for moment in (row.started_at, row.seen_at))
        cells = (row.name, state, ",".join(row.queues), row.device, str(row.concurrency), up, f"{seen} ago")
        table.add_row(*cells, "\n".join(row.steps))
    return table


def _since(moment: datetime | None, now: datetime) -> float | None:
    return None if moment is None else max(0.0, (now - moment) / timedelta(seconds=1))


@click.command()
def workers() -> None:
    """List the workers: queues, device, when each was last seen, and what it works on.

    A worker that has said nothing for a minute is shown as gone; its steps go on elsewhere.
    """
    Console().print(workers_view(list_workers(load_settings()), datetime.now(UTC)))
