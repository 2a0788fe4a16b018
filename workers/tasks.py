"""The Celery task, and the housekeeping that every worker does beside it."""

import logging
from typing import Any

from celery import Task, shared_task
from celery.signals import worker_ready

from atlas.db.engine import UnreachableError
from atlas.errors import AtlasError
from atlas.queue import TASK, BrokerError
from atlas.settings import load_settings
from workers.steps import back_off, housekeep
from workers.steps import run_one as _run_one

log = logging.getLogger("atlas.worker")

HOUSEKEEPING_SECONDS = 15.0


@shared_task(name=TASK, bind=True, max_retries=20)  # type: ignore[untyped-decorator]
def run_step(self: Task, run_id: str, step_name: str) -> None:
    """Carry out one step of a run; delivered twice it does nothing the second time."""
    try:
        outcome = _run_one(load_settings(), run_id, step_name)
    except (UnreachableError, BrokerError) as error:
        # The step's own state could not be written or passed on: the message is the only thing left to keep.
        log.warning("step %s of %s: %s", step_name, run_id, error)
        raise self.retry(exc=error, countdown=back_off(self.request.retries + 1)) from error
    except AtlasError as error:
        log.error("step %s of %s: %s", step_name, run_id, error)
        return
    log.info("step %s of %s: %s", step_name, run_id, outcome)


def _housekeep_now() -> None:
    try:
        housekeep(load_settings())
    except AtlasError as error:
        log.warning("housekeeping: %s", error)


@worker_ready.connect  # type: ignore[untyped-decorator]
def _begin_housekeeping(sender: Any, **_: object) -> None:
    """Use the worker's own timer, not a thread: its children are forked from a single-threaded parent."""
    _housekeep_now()
    sender.timer.call_repeatedly(HOUSEKEEPING_SECONDS, _housekeep_now)
