"""One step from its message to its end: claim, do, record, send what follows.

Nothing here is lost when the process dies at any line: before the claim nothing has happened; under it the
lease runs out and somebody else goes on from the last checkpoint; after the output is published a second
attempt finds it current; and steps made ready whose message was not sent are found by the housekeeping.
"""

import logging
from functools import partial

from atlas.configs import BuildConfig
from atlas.db.leases import (
    LeaseLostError,
    cancel_step,
    claim_step,
    fail_step,
    finish_step,
    release_left_steps,
)
from atlas.db.owner import new_owner
from atlas.db.progress import DbProgress
from atlas.db.rows import StepRow
from atlas.db.runs import active_runs, load_run, unsent_steps
from atlas.errors import AtlasError, Cancelled, ConfigError, HandedBack
from atlas.pipeline.interrupts import interruptible
from atlas.pipeline.retries import MAX_ATTEMPTS, judge, patiently
from atlas.queue import empty_queues, send_ready, send_steps
from atlas.settings import Settings
from atlas.units import unit_of
from workers import leaving

log = logging.getLogger("atlas.worker")

HAND_BACK_SECONDS = 5.0
"""How long a worker that has to end waits for a database that is away."""
LOST_SECONDS, RESEND_SECONDS = 10.0, 600.0
"""After these a message is sent again: if its queue is empty, and in any case."""


def _work(settings: Settings, step: StepRow, owner: str) -> None:
    """Do the step. The pipeline, and torch with it, is imported here: never before a worker forks."""
    from atlas.pipeline.execute import run_step
    from atlas.pipeline.plan import make_plan

    config = BuildConfig.from_json(load_run(settings, step.run_id).config_json)
    plan = make_plan(config, settings)
    digests = {planned.name: planned.digest for planned in plan.steps}
    if digests.get(step.name) != step.digest:
        raise ConfigError(
            f"step {step.name!r} is {digests.get(step.name, 'not there')} in this worker's plan, "
            f"{step.digest} in the run's; run the same version of Head Atlas on the same files everywhere"
        )
    unit = unit_of(step.kind, config)
    with (
        DbProgress(
            settings, step.run_id, step.name, owner, kind=step.kind, unit=unit, leaving=leaving.asked
        ) as progress,
        interruptible(progress.wish),
    ):
        run_step(plan, step.name, settings, progress)


def _failed(settings: Settings, step: StepRow, owner: str, error: Exception) -> None:
    """Record a failure and, if it may pass, send the step again after a while."""
    verdict = judge(error, step.attempts)
    if verdict.counts:
        which = f"step {step.name} of {step.run_id} failed (attempt {step.attempts})"
        log.warning("%s: %s", which, verdict.text)
    else:
        log.info("step %s of %s waits: %s", step.name, step.run_id, verdict.text)
    if not isinstance(error, AtlasError):
        log.error("unexpected error in step %s of %s", step.name, step.run_id, exc_info=error)
    how = {"retry": verdict.again, "counts": verdict.counts}
    ready = patiently(partial(fail_step, settings, step.run_id, step.name, owner, verdict.text, **how))
    send_ready(settings, step.run_id, ready, countdown=verdict.wait)


def _hand_back(settings: Settings, step: StepRow, owner: str, error: HandedBack) -> None:
    """Give the step to another worker, from its last checkpoint; for this one it was no attempt."""
    given = partial(fail_step, settings, step.run_id, step.name, owner, str(error), retry=True, counts=False)
    ready = patiently(given, seconds=HAND_BACK_SECONDS)
    send_ready(settings, step.run_id, ready)


def run_one(settings: Settings, run_id: str, name: str, worker: str = "") -> str:
    """Carry out a step if it is to be had, and say what became of it; ``worker`` is the worker's name.

    Returns ``not mine`` (another holds it, or it has ended), ``done``, ``failed``, ``cancelled``, ``handed
    back`` (the worker has to end) or ``lost`` (taken over while we worked). Raises UnreachableError or
    BrokerError when that could not be recorded or passed on; calling again is safe.
    """
    owner = new_owner(worker)
    step = claim_step(settings, run_id, name, owner)
    if step is None:
        return "not mine"
    if step.attempts > MAX_ATTEMPTS:
        last = step.error or "no reason was recorded"
        fail_step(settings, run_id, name, owner, f"given up after {MAX_ATTEMPTS} attempts; the last: {last}")
        return "failed"
    try:
        return _outcome(settings, step, owner)
    except LeaseLostError as error:
        log.warning("%s", error)
        return "lost"


def _outcome(settings: Settings, step: StepRow, owner: str) -> str:
    """Do a held step and record what came of it."""
    run_id, name = step.run_id, step.name
    try:
        _work(settings, step, owner)
    except HandedBack as error:
        _hand_back(settings, step, owner, error)
        return "handed back"
    except Cancelled:
        patiently(partial(cancel_step, settings, run_id, name, owner))
        return "cancelled"
    except LeaseLostError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever a step raises is recorded with the step)
        _failed(settings, step, owner, error)
        return "failed"
    send_ready(settings, run_id, patiently(partial(finish_step, settings, run_id, name, owner)))
    return "done"


def housekeep(settings: Settings) -> None:
    """Find what fell between two stools: steps whose holder is gone, ready steps without a message.

    Every worker does this now and then; a second message for the same step does no harm.
    """
    for run in active_runs(settings, executor="queue"):
        left = release_left_steps(settings, run.id)
        if left:
            log.warning("run %s: the holder of %s is gone; it is sent again", run.id, ", ".join(left))
    for step in _unsent(settings):
        send_steps(settings, step.run_id, [step])


def _unsent(settings: Settings) -> list[StepRow]:
    """Ready steps of which no message is known, or whose message the broker seems to have lost.

    A message that no worker has taken waits in its queue. Where the queue is empty and the step still ready
    some seconds later, it is gone; a second one does no harm.
    """
    waiting = unsent_steps(settings, resend_after=LOST_SECONDS)
    if not waiting:
        return []
    empty = empty_queues(settings)
    long_ago = {(step.run_id, step.name) for step in unsent_steps(settings, resend_after=RESEND_SECONDS)}
    return [step for step in waiting if step.queue in empty or (step.run_id, step.name) in long_ago]
