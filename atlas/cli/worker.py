"""``atlas worker``, and what ``atlas build`` does when a broker is set: submit a run and follow it."""

import logging
import os
import time
from collections.abc import Collection

import click
from rich.console import Console
from rich.live import Live

from atlas.cli.metrics import beside_worker
from atlas.cli.status import NO_WORKER, no_worker_yet, run_view
from atlas.db.engine import UnreachableError
from atlas.db.rows import PlanLike, RunRow
from atlas.db.runs import create_run, load_run
from atlas.db.schema import ensure_schema
from atlas.db.states import QUEUES
from atlas.errors import AtlasError, Cancelled
from atlas.logs import set_up_logging
from atlas.queue import make_app, parse_queues, send_ready, shown_broker
from atlas.settings import Settings, load_settings

POLL_SECONDS = 0.5
AWAY_SECONDS = 300.0
"""How long a database may be away before nobody looks any more; the run goes on by itself."""


@click.command()
@click.option(
    "--queues", default=",".join(QUEUES), show_default=True, help="Queues to serve, comma-separated."
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Steps to run at once. A step uses all cores by itself (bound it with ATLAS_THREADS).",
)
@click.option("--name", help="The worker's name at this host; two on one host need different ones.")
@click.option(
    "--metrics-port",
    type=click.IntRange(1, 65535),
    envvar="ATLAS_METRICS_PORT",
    help="Serve /metrics (Prometheus) and /healthz here.  [env: ATLAS_METRICS_PORT]",
)
@click.option("--metrics-address", default="127.0.0.1", show_default=True, help="Where to serve them.")
def worker(
    queues: str, concurrency: int, name: str | None, metrics_port: int | None, metrics_address: str
) -> None:
    """Carry out build steps that the broker at ATLAS_BROKER_URL hands out, until stopped."""
    settings = load_settings()
    parse_queues(queues)
    with beside_worker(metrics_port, metrics_address):
        _work(settings, queues, concurrency, name)


def _work(settings: Settings, queues: str, concurrency: int, name: str | None) -> None:
    names = parse_queues(queues)
    app = make_app(settings, include=("workers.tasks",))
    ensure_schema(settings)
    set_up_logging(settings, service=True)
    # Each message and its end are logged by us, with the run and the step; Celery's own lines say no more.
    for logger in ("celery.app.trace", "celery.worker.strategy"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    click.echo(f"serving {', '.join(names)} from {shown_broker(settings)} with {concurrency} process(es)")
    app.worker_main(
        [
            "worker",
            "--pool=prefork",
            f"--concurrency={concurrency}",
            f"--queues={','.join(names)}",
            f"--loglevel={settings.log_level}",
            f"--hostname={name or f'atlas-{os.getpid()}'}@%h",
            "--without-gossip",
            "--without-mingle",
        ]
    )


def submit(plan: PlanLike, settings: Settings, *, current: Collection[str] | None = None) -> str:
    """Record a run of the plan for the workers, send its ready steps, and return the run's id.

    A run of the same plan that is under way is joined; its ready steps are sent again, which is harmless.
    """
    run = create_run(settings, plan, executor="queue", current=current)
    send_ready(settings, run.id)
    return run.id


def wait(run_id: str, settings: Settings) -> RunRow:
    """Show a run's progress until it ends; Ctrl-C stops looking, not the run.

    Raises AtlasError when the run failed and Cancelled when it was cancelled.
    """
    try:
        run = _follow(run_id, settings)
    except KeyboardInterrupt:
        click.echo(f"\nthe run goes on; look: atlas status {run_id} --watch; stop it: atlas cancel {run_id}")
        return load_run(settings, run_id)
    if run.status == "failed":
        raise AtlasError(f"run {run.id} failed: {run.error}")
    if run.status == "cancelled":
        raise Cancelled(f"run {run.id} was cancelled; what was finished is kept")
    return run


def _look(run_id: str, settings: Settings) -> RunRow:
    """The run as it is now; a database that restarts is waited for."""
    patience = time.monotonic() + AWAY_SECONDS
    while True:
        try:
            return load_run(settings, run_id)
        except UnreachableError:
            if time.monotonic() > patience:
                raise
            time.sleep(POLL_SECONDS)


def _follow(run_id: str, settings: Settings) -> RunRow:
    console = Console(stderr=True)
    if not console.is_terminal:
        return _follow_lines(run_id, settings)
    with Live(console=console, refresh_per_second=4) as live:
        while True:
            run = _look(run_id, settings)
            live.update(run_view(run))
            if run.ended:
                return run
            time.sleep(POLL_SECONDS)


def _follow_lines(run_id: str, settings: Settings) -> RunRow:
    """One line per change, for logs and pipes."""
    said: dict[str, str] = {}
    warned = False
    while True:
        run = _look(run_id, settings)
        for step in run.steps:
            if step.status != said.get(step.name, "pending"):
                click.echo(f"{step.name}: {step.status}{f' ({step.error})' if step.error else ''}", err=True)
            said[step.name] = step.status
        if run.ended:
            return run
        if no_worker_yet(run) and not warned:
            click.echo(NO_WORKER, err=True)
            warned = True
        time.sleep(POLL_SECONDS)
