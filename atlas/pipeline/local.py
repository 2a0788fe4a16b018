"""Carry out a plan in this process, step after step, recorded in the database like any other run."""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial

from atlas.db.leases import (
    LeaseLostError,
    cancel_step,
    claim_step,
    fail_step,
    finish_step,
    request_cancel,
)
from atlas.db.owner import new_owner
from atlas.db.progress import DbProgress
from atlas.db.rows import RunRow
from atlas.db.runs import create_run, load_run
from atlas.db.schema import ensure_schema
from atlas.db.states import FINISHED
from atlas.errors import AtlasError, Cancelled, ConflictError
from atlas.pipeline.execute import current_steps, run_step, waiting_for
from atlas.pipeline.interrupts import interruptible
from atlas.pipeline.plan import Plan, Step
from atlas.pipeline.retries import judge, patiently
from atlas.progress import Progress
from atlas.settings import Settings
from atlas.units import unit_of

log = logging.getLogger("atlas.build")

POLL_SECONDS = 1.0
"""How often a step that another process does is looked at."""
Shown = Callable[[Step, int, int], AbstractContextManager[Progress]]


class _Both:
    """Progress told to two listeners."""

    def __init__(self, first: Progress, second: Progress) -> None:
        self.first, self.second = first, second

    def update(self, done: int, total: int, message: str = "") -> None:
        self.first.update(done, total, message)
        self.second.update(done, total, message)


def run_local(plan: Plan, settings: Settings, shown: Shown) -> RunRow | None:
    """Do what is not current. Returns the run, or None if everything is current.

    ``shown(step, number, total)`` gives the progress display of a step. Ctrl-C cancels the run and keeps
    what is finished; the same command goes on from there. Failures that may pass are tried again, as workers
    do; a step that another process of this run does is waited for.

    Raises:
        AtlasError: the first error of a step, after it has been recorded with the run.
    """
    if not waiting_for(plan, settings):
        return None
    ensure_schema(settings)
    run = begin(plan, settings, "local")
    waiting = [step for step in plan.steps if step.name not in run.finished]
    log.info("run %s of release %s: %d steps to do", run.id, run.name, len(waiting))
    for number, step in enumerate(waiting, 1):
        with shown(step, number, len(waiting)) as display:
            try:
                _one(plan, step, settings, run.id, display)
            except KeyboardInterrupt:
                with suppress(ConflictError):  # the run has ended meanwhile
                    request_cancel(settings, run.id)
                raise Cancelled(f"run {run.id} was stopped; the same command goes on from here") from None
    return load_run(settings, run.id)


def begin(plan: Plan, settings: Settings, executor: str) -> RunRow:
    """Record a run whose outputs are protected from ``atlas gc`` from now on, or join it.

    Outputs that were removed while it was recorded are made again.
    """
    while True:
        run = create_run(
            settings,
            plan,
            executor=executor,
            current=lambda: current_steps(plan, waiting_for(plan, settings)),
        )
        if not {step.name for step in waiting_for(plan, settings)} & run.finished:
            return run


def _one(plan: Plan, step: Step, settings: Settings, run_id: str, display: Progress) -> None:
    """One step to its end, here or in another process of the same run."""
    while True:
        owner = new_owner()
        held = claim_step(settings, run_id, step.name, owner)
        if held is None:
            if _ended_elsewhere(settings, run_id, step.name, display):
                return
            time.sleep(POLL_SECONDS)
            continue
        try:
            _work(plan, step, settings, run_id, owner, display)
            patiently(partial(finish_step, settings, run_id, step.name, owner))
            return
        except (KeyboardInterrupt, Cancelled):
            request_cancel(settings, run_id)
            cancel_step(settings, run_id, step.name, owner)
            raise Cancelled(f"run {run_id} was stopped; the same command goes on from here") from None
        except LeaseLostError as error:
            log.warning("%s", error)
        except Exception as error:
            verdict = judge(error, held.attempts)
            how = {"retry": verdict.again, "counts": verdict.counts}
            patiently(partial(fail_step, settings, run_id, step.name, owner, verdict.text, **how))
            if not verdict.again:
                raise
            log.warning("step %s is tried again in %.0f s: %s", step.name, verdict.wait, verdict.text)
            display.update(0, 1, f"again in {verdict.wait:.0f} s: {verdict.text}")
            time.sleep(verdict.wait)


def _work(plan: Plan, step: Step, settings: Settings, run_id: str, owner: str, display: Progress) -> None:
    unit = unit_of(step.kind, plan.config)
    with (
        DbProgress(settings, run_id, step.name, owner, kind=step.kind, unit=unit) as recorded,
        interruptible(recorded.wish),
    ):
        run_step(plan, step.name, settings, _Both(display, recorded))


def _ended_elsewhere(settings: Settings, run_id: str, name: str, display: Progress) -> bool:
    """Whether a step that cannot be claimed is finished; raises what ended it otherwise."""
    run = load_run(settings, run_id)
    step = next(row for row in run.steps if row.name == name)
    if step.status in FINISHED:
        return True
    if run.cancel_requested or step.status == "cancelled":
        raise Cancelled(f"run {run_id} was stopped; the same command goes on from here")
    if step.status == "failed":
        raise AtlasError(f"step {name!r} of run {run_id} failed elsewhere: {step.error}")
    display.update(step.done, max(step.total, 1), f"{step.status} in another process")
    return False
