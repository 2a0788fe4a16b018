"""``atlas metrics``: the service's numbers for Prometheus; and the same server beside a worker."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from atlas.errors import ConfigError
from atlas.settings import Settings, load_settings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from atlas.observe.health import Check

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Where a worker's children count; prometheus_client reads it when it is first imported."""
LOOK_SECONDS = 0.5


@click.command()
@click.option("--port", default=9101, show_default=True, type=click.IntRange(1, 65535), help="Port.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 for all.")
@click.option("--once", is_flag=True, help="Print the metrics and end.")
@click.option(
    "--of-worker", type=int, hidden=True, help="Serve the counters of this process, and end with it."
)
def metrics(port: int, address: str, once: bool, of_worker: int | None) -> None:
    """Serve /metrics (queues, runs, steps, tokens per second, failures, leases, workers) and /healthz."""
    settings = load_settings()
    registry = _registry(settings, of_worker)
    if once:
        from prometheus_client import generate_latest

        click.echo(generate_latest(registry).decode(), nl=False)
        return
    from atlas.observe.health import check_health, process_check
    from atlas.observe.server import serve

    def health() -> "list[Check]":
        process = [] if of_worker is None else [process_check(of_worker)]
        return [*process, *check_health(settings)]

    server = serve(address, port, registry, health)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    click.echo(f"metrics: http://{address}:{port}/metrics, health: http://{address}:{port}/healthz", err=True)
    while not ended.wait(LOOK_SECONDS):
        if of_worker is not None and os.getppid() != of_worker:
            break
    server.shutdown()


def _registry(settings: Settings, of_worker: int | None) -> "CollectorRegistry":
    """What is served: a worker's own counters, or the whole service."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    if of_worker is not None:
        from prometheus_client.multiprocess import MultiProcessCollector

        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return registry
    from atlas.observe.collector import ServiceCollector

    registry.register(ServiceCollector(settings))
    return registry


@contextmanager
def beside_worker(port: int | None, address: str) -> Iterator[None]:
    """A process that serves this worker's metrics; nothing without a port.

    It is a process of its own, because a worker's parent forks and must have no threads.
    """
    if port is None:
        yield
        return
    if "prometheus_client" in sys.modules and FOLDER not in os.environ:
        raise ConfigError("metrics of a worker have to be asked for before anything is counted")
    folder = Path(tempfile.mkdtemp(prefix="atlas-metrics-"))
    os.environ[FOLDER] = str(folder)
    command = [sys.executable, "-m", "atlas", "metrics", f"--port={port}", f"--address={address}"]
    # Ctrl-C reaches the whole group of a terminal; the server waits for the worker's end.
    server = subprocess.Popen(
        [*command, f"--of-worker={os.getpid()}"], stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)
