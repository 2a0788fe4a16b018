"""Carry out a plan in this process, step after step, recorded in the database like any other run."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from atlas.db.leases import cancel_step, claim_step, fail_step, finish_step, request_cancel
from atlas.db.owner import new_owner
from atlas.db.progress import DbProgress
from atlas.db.rows import RunRow
from atlas.db.runs import create_run, load_run
from atlas.db.schema import ensure_schema
from atlas.errors import Cancelled, ConflictError
from atlas.logs import explained
from atlas.pipeline.execute import current_steps, run_step, waiting_for
from atlas.pipeline.plan import Plan, Step
from atlas.progress import Progress
from atlas.settings import Settings
from atlas.units import unit_of

log = logging.getLogger("atlas.build")

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
    what is finished; the same command goes on from there.

    Raises:
        AtlasError: the first error of a step, after it has been recorded with the run.
    """
    waiting = waiting_for(plan, settings)
    if not waiting:
        return None
    ensure_schema(settings)
    run = create_run(settings, plan, executor="local", current=current_steps(plan, waiting))
    log.info("run %s of release %s: %d steps to do", run.id, run.name, len(waiting))
    owner = new_owner()
    for number, step in enumerate(waiting, 1):
        with shown(step, number, len(waiting)) as display:
            _one(plan, step, settings, run.id, owner, display)
    return load_run(settings, run.id)


def _one(plan: Plan, step: Step, settings: Settings, run_id: str, owner: str, display: Progress) -> None:
    if claim_step(settings, run_id, step.name, owner) is None:
        state = {s.name: s for s in load_run(settings, run_id).steps}[step.name]
        if state.status in ("done", "skipped"):
            return
        raise ConflictError(
            f"step {step.name!r} of run {run_id} is {state.status} and held by {state.lease_owner}; "
            "another process is building the same plan"
        )
    try:
        unit = unit_of(step.kind, plan.config)
        with DbProgress(settings, run_id, step.name, owner, kind=step.kind, unit=unit) as recorded:
            run_step(plan, step.name, settings, _Both(display, recorded))
    except (KeyboardInterrupt, Cancelled):
        request_cancel(settings, run_id)
        cancel_step(settings, run_id, step.name, owner)
        raise Cancelled(f"run {run_id} was stopped; the same command goes on from here") from None
    except Exception as error:
        fail_step(settings, run_id, step.name, owner, explained(error))
        raise
    finish_step(settings, run_id, step.name, owner)
