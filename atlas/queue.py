"""The task queue: how it is reached and the one message it carries.

A message names a step of a run and nothing more; what is to be done, whether it still is, and by whom, is in
the database. Messages may be lost or come twice. This module knows a task's name only, so that the command
line and the app can send work without importing what does it.
"""

from collections.abc import Collection, Sequence

from celery import Celery
from kombu import Connection, Queue
from kombu.exceptions import KombuError, OperationalError

from atlas.db.rows import StepRow
from atlas.db.runs import mark_enqueued, ready_steps
from atlas.db.states import QUEUES
from atlas.errors import AtlasError, ConfigError, one_of
from atlas.settings import Settings

TASK = "workers.tasks.run_step"
DAY = 24 * 3600


class BrokerError(AtlasError):
    """The broker of the task queue does not answer; the same call may succeed later."""


def broker_url(settings: Settings) -> str:
    """The broker's URL; ConfigError when none is set."""
    if settings.broker_url is None:
        raise ConfigError("ATLAS_BROKER_URL is not set; allowed: a broker such as redis://HOST:6379/0")
    return settings.broker_url


def shown_broker(settings: Settings) -> str:
    """The broker's URL as it may be shown: without its password."""
    return str(Connection(broker_url(settings)).as_uri())


def make_app(settings: Settings, include: Sequence[str] = ()) -> Celery:
    """A Celery application for the broker of these settings; ``include`` names modules with tasks.

    A message is acknowledged when its step has ended, and given back when the process under it dies. The
    broker's visibility time-out is a day: a shorter one would hand a long step out twice. No results are
    kept: they are in the database.
    """
    app = Celery("atlas", broker=broker_url(settings), include=list(include))
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_queues=[Queue(name, routing_key=name) for name in QUEUES],
        task_default_queue="cpu",
        worker_prefetch_multiplier=1,
        worker_max_tasks_per_child=50,
        # A new child that has not reported by then is killed; on a busy machine Celery's 4 seconds are few.
        worker_proc_alive_timeout=60,
        worker_hijack_root_logger=False,
        # Standard error is where our own log goes; redirected into the log, it would swallow that.
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": DAY,
            "socket_connect_timeout": 5,
            # A network that swallows packets must not hold a worker that sends: the step is sent later.
            "socket_timeout": 20,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
    )
    return app


def parse_queues(text: str) -> tuple[str, ...]:
    """The queues in a list such as ``cpu,io``; ConfigError for one that does not exist.

    >>> parse_queues("cpu, io")
    ('cpu', 'io')
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        one_of("queue", name, QUEUES)
    return names


def send_steps(settings: Settings, run_id: str, steps: Collection[StepRow], *, countdown: float = 0) -> None:
    """Send one message per step to its queue, to be worked on after ``countdown`` seconds.

    Raises BrokerError when the broker cannot be reached; the steps stay ready and are sent later.
    """
    if not steps:
        return
    policy = {"max_retries": 2, "interval_start": 0.2, "interval_step": 0.5, "interval_max": 1}
    try:
        with make_app(settings) as app, app.connection_for_write() as connection:
            for step in steps:
                app.send_task(
                    TASK,
                    args=[run_id, step.name],
                    queue=step.queue,
                    countdown=countdown or None,
                    connection=connection,
                    retry=True,
                    retry_policy=policy,
                )
    except (OperationalError, KombuError, OSError, KeyError) as error:
        raise _broker_error(settings, error) from error
    mark_enqueued(settings, run_id, [step.name for step in steps], countdown=countdown)


def empty_queues(settings: Settings) -> frozenset[str]:
    """The queues in which no message waits; BrokerError when the broker cannot be reached."""
    try:
        with make_app(settings) as app, app.connection_for_write() as connection:
            channel = connection.default_channel
            return frozenset(
                queue.name
                for queue in app.conf.task_queues
                if not queue(channel).queue_declare().message_count
            )
    except (OperationalError, KombuError, OSError) as error:
        raise _broker_error(settings, error) from error


def _broker_error(settings: Settings, error: Exception) -> BrokerError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return BrokerError(f"broker {shown_broker(settings)} cannot be reached: {reason}")


def send_ready(
    settings: Settings, run_id: str, names: Collection[str] | None = None, *, countdown: float = 0
) -> None:
    """Send the ready steps of a run, or those of them that are named."""
    steps = [step for step in ready_steps(settings, run_id) if names is None or step.name in names]
    send_steps(settings, run_id, steps, countdown=countdown)
