"""Live calls of the app, answered by a worker that serves the queue ``interactive``."""

from typing import Any

from celery import Task, shared_task

from atlas.live.client import SECONDS, START_SECONDS, TASK
from atlas.live.remote import send_reply
from atlas.live.serve import reply_to


@shared_task(  # type: ignore[untyped-decorator]
    name=TASK, bind=True, acks_late=False, time_limit=SECONDS + START_SECONDS, max_retries=0
)
def live_call(self: Task, call: str, given: dict[str, Any], reply_queue: str) -> None:
    """Answer a live call; nobody waits for a lost one, so it is never sent again."""
    reply = reply_to(call, given)
    with self.app.connection_for_write() as connection:
        send_reply(connection, reply_queue, reply)
