"""The Celery task, and the housekeeping that every worker does beside it."""

import logging
from functools import partial
from typing import Any

from celery import Task, shared_task
from celery.signals import worker_init, worker_ready, worker_shutdown, worker_shutting_down

from atlas.db.engine import UnreachableError
from atlas.errors import AtlasError
from atlas.logs import working_on
from atlas.pipeline.retries import back_off
from atlas.queue import TASK, BrokerError
from atlas.settings import load_settings
from workers import leaving, presence
from workers import live as _live  # noqa: F401 - its task is one of a worker's
from workers.steps import housekeep
from workers.steps import run_one as _run_one

log = logging.getLogger("atlas.worker")

HOUSEKEEPING_SECONDS = 15.0


@shared_task(name=TASK, bind=True, max_retries=20)  # type: ignore[untyped-decorator]
def run_step(self: Task, run_id: str, step_name: str) -> None:
    """Carry out one step of a run; delivered twice it does nothing the second time."""
    with working_on(run_id, step_name):
        _run_step(self, run_id, step_name)


def _run_step(self: Task, run_id: str, step_name: str) -> None:
    try:
        outcome = _run_one(load_settings(), run_id, step_name, self.request.hostname or "")
    except (UnreachableError, BrokerError) as error:
        # The step's own state could not be written or passed on: the message is the only thing left to keep.
        log.warning("step %s of %s: %s", step_name, run_id, error)
        raise self.retry(exc=error, countdown=back_off(self.request.retries + 1)) from error
    except AtlasError as error:
        log.error("step %s of %s: %s", step_name, run_id, error)
        return
    log.info("step %s of %s: %s", step_name, run_id, outcome)


def _housekeep_now(sender: Any) -> None:
    """Say that this worker lives, then look after what others left; one failing must not keep the other."""
    settings = load_settings()
    for work in (partial(presence.note, settings, sender), partial(housekeep, settings)):
        try:
            work()
        except AtlasError as error:
            log.warning("housekeeping: %s", error)


@worker_ready.connect  # type: ignore[untyped-decorator]
def _begin_housekeeping(sender: Any, **_: object) -> None:
    """Use the worker's own timer, not a thread: its children are forked from a single-threaded parent."""
    _housekeep_now(sender)
    sender.timer.call_repeatedly(HOUSEKEEPING_SECONDS, _housekeep_now, (sender,))


@worker_init.connect  # type: ignore[untyped-decorator]
def _stay(**_: object) -> None:
    leaving.stay()


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _leave(**_: object) -> None:
    """SIGTERM or Ctrl-C: running steps are handed back at once, and others go on with them."""
    leaving.ask()


@worker_shutdown.connect  # type: ignore[untyped-decorator]
def _gone(sender: Any, **_: object) -> None:
    try:
        presence.forget(load_settings(), sender)
    except AtlasError as error:
        log.warning("the worker's row stays until it is seen as gone: %s", error)
