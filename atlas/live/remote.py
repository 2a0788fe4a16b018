"""Live calls through the task queue: sent to ``interactive``, the reply read from a queue of the asker's own.

The reply's queue is a transient one at the same broker, so no store of results is needed.
"""

import json
from collections.abc import Mapping
from queue import Empty
from typing import Any
from uuid import uuid4

from celery import Celery
from kombu import Connection
from kombu.exceptions import KombuError, OperationalError

from atlas.live.client import QUEUE, TASK, LiveError
from atlas.queue import BrokerError, make_app, shown_broker
from atlas.settings import Settings

_POLICY = {"max_retries": 1, "interval_start": 0.2, "interval_step": 0.2, "interval_max": 0.5}


def ask_worker(settings: Settings, call: str, given: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The reply of a worker that serves ``interactive``.

    A message that nobody takes in time is thrown away. Raises LiveError when no worker answers in time, and
    BrokerError when the broker cannot be reached.
    """
    try:
        with make_app(settings) as app, app.connection_for_write() as connection:
            connection.ensure_connection(**_POLICY)
            return _exchange(app, connection, (call, dict(given)), seconds)
    except Empty:
        raise LiveError(
            f"no worker answered within {seconds:g} seconds; does one serve the queue {QUEUE!r}? "
            f"(atlas worker --queues {QUEUE})"
        ) from None
    except (OperationalError, KombuError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BrokerError(f"broker {shown_broker(settings)} cannot be reached: {reason}") from error


def _exchange(
    app: Celery, connection: Connection, asked: tuple[str, dict[str, Any]], seconds: float
) -> dict[str, Any]:
    name = f"live-{uuid4().hex}"
    replies = connection.SimpleBuffer(name)
    try:
        app.send_task(
            TASK, args=[*asked, name], queue=QUEUE, expires=seconds, connection=connection, retry=True,
            retry_policy=_POLICY,
        )  # fmt: skip
        reply: dict[str, Any] = json.loads(replies.get(timeout=seconds).payload)
    finally:
        replies.queue.delete()
        replies.close()
    return reply


def send_reply(connection: Connection, name: str, reply: Mapping[str, Any]) -> None:
    """Put a reply where its asker waits."""
    replies = connection.SimpleBuffer(name)
    try:
        replies.put(json.dumps(reply))
    finally:
        replies.close()
