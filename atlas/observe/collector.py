"""The service as Prometheus sees it: read from the database and the broker whenever somebody asks.

Names, labels and units are explained in docs/operations.md.
"""

import shutil
from collections.abc import Iterable, Iterator

from kombu import Connection
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from atlas import __version__
from atlas.configs import BuildConfig
from atlas.db.models import RUN_STATUS, STEP_STATUS
from atlas.db.states import QUEUES
from atlas.db.tallies import Tally, tally
from atlas.db.workers import WorkerRow, list_workers
from atlas.errors import AtlasError, ConfigError
from atlas.settings import Settings
from atlas.units import unit_of

SECONDS = 5.0


def queue_lengths(settings: Settings) -> dict[str, int]:
    """Messages that wait in the broker, by queue, and under ``unacked`` those that workers hold.

    Raises whatever the broker's client raises when it cannot be reached.
    """
    with Connection(settings.broker_url, connect_timeout=SECONDS) as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=SECONDS)
        channel = connection.default_channel
        lengths = {queue: int(channel.client.llen(queue)) for queue in QUEUES}
        return lengths | {"unacked": int(channel.client.hlen(channel.unacked_key))}


class ServiceCollector(Collector):
    """All numbers of one service; a part that does not answer gives ``atlas_up`` 0 and no numbers."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked of the database before the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Everything, as it is now."""
        up = GaugeMetricFamily("atlas_up", "Whether a part of the service answers", labels=["part"])
        yield from self._database(up)
        if self.settings.broker_url is not None:
            yield from self._broker(up)
        yield up
        info = GaugeMetricFamily("atlas_info", "The version that answers", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        if self.settings.home.exists():
            free = shutil.disk_usage(self.settings.home).free
            yield GaugeMetricFamily("atlas_home_free_bytes", "Free on the disk of ATLAS_HOME", value=free)

    def _database(self, up: GaugeMetricFamily) -> Iterator[Metric]:
        try:
            found, workers = tally(self.settings), list_workers(self.settings)
        except AtlasError:
            up.add_metric(["database"], 0)
            return
        up.add_metric(["database"], 1)
        yield from _states(found)
        yield from _work(found)
        yield from _workers(workers)

    def _broker(self, up: GaugeMetricFamily) -> Iterator[Metric]:
        try:
            lengths = queue_lengths(self.settings)
        except Exception:  # noqa: BLE001 (each kind of broker has errors of its own)
            up.add_metric(["broker"], 0)
            return
        up.add_metric(["broker"], 1)
        held = lengths.pop("unacked")
        waiting = GaugeMetricFamily(
            "atlas_queue_messages", "Messages that wait in the broker", labels=["queue"]
        )
        for queue, length in lengths.items():
            waiting.add_metric([queue], length)
        yield waiting
        yield GaugeMetricFamily("atlas_queue_unacked", "Messages that workers hold", value=held)


def _states(found: Tally) -> Iterator[Metric]:
    runs = GaugeMetricFamily("atlas_runs", "Runs by state", labels=["status"])
    for status in RUN_STATUS:
        runs.add_metric([status], found.runs.get(status, 0))
    steps = GaugeMetricFamily(
        "atlas_steps", "Steps of all runs by queue and state", labels=["queue", "status"]
    )
    for queue in QUEUES:
        for status in STEP_STATUS:
            steps.add_metric([queue, status], found.steps.get((queue, status), 0))
    failures = CounterMetricFamily("atlas_step_failures", "Steps that failed for good", labels=["kind"])
    for kind, number in sorted(found.failures.items()):
        failures.add_metric([kind], number)
    yield from (runs, steps, failures)
    yield CounterMetricFamily("atlas_step_attempts", "Attempts of all steps", value=found.attempts)


def _work(found: Tally) -> Iterator[Metric]:
    speed = GaugeMetricFamily("atlas_tokens_per_second", "Text worked through now", labels=["kind"])
    per_kind: dict[str, float] = {}
    for step, config_json in found.running:
        try:
            tokens = unit_of(step.kind, BuildConfig.from_json(config_json)).tokens
        except (ConfigError, ValueError):
            tokens = None
        per_kind[step.kind] = per_kind.get(step.kind, 0.0) + (step.rate or 0.0) * (tokens or 0)
    for kind, rate in sorted(per_kind.items()):
        speed.add_metric([kind], rate)
    oldest = max(found.lease_ages, default=0.0)
    waits = GaugeMetricFamily(
        "atlas_ready_wait_seconds", "How long the oldest message has waited for a worker", labels=["queue"]
    )
    for queue in QUEUES:
        waits.add_metric([queue], found.waiting.get(queue, 0.0))
    yield from (speed, waits)
    yield GaugeMetricFamily("atlas_lease_age_seconds", "Since the quietest lease was renewed", value=oldest)


def _workers(workers: list[WorkerRow]) -> Iterator[Metric]:
    alive = [worker for worker in workers if worker.alive]
    states = GaugeMetricFamily("atlas_workers", "Workers by whether they live", labels=["state"])
    states.add_metric(["alive"], len(alive))
    states.add_metric(["gone"], len(workers) - len(alive))
    serving = GaugeMetricFamily(
        "atlas_workers_serving", "Living workers that serve a queue", labels=["queue"]
    )
    for queue in QUEUES:
        serving.add_metric([queue], sum(queue in worker.queues for worker in alive))
    yield from (states, serving)
