"""Who may work on which step, and what happens when it ends.

Whoever claims a step holds a lease on it: one conditional UPDATE that only one claimer can win, renewed while
the work goes on. A lease that ran out, or whose holder's process is gone, can be claimed again. Messages may
therefore be delivered more than once; what happens is decided here. The executor of this process and the
workers of a cluster call the same functions.

Times are the database's. Should its clock be set back, a lease would seem to hold for longer than any lease
may: it counts as run out too. Its holder, if it lives, hears at its next report that it was replaced.

Locks are always taken run first, then step, so that two transactions never wait for each other.
"""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, CursorResult, and_, or_, select, update
from sqlalchemy.orm import Session

from atlas.access import demand
from atlas.db.models import Run, RunStep
from atlas.db.owner import is_dead
from atlas.db.rows import StepRow, step_row
from atlas.db.session import clock, writing
from atlas.db.states import FINISHED, RUN_MOVES, check_move, run_status
from atlas.errors import ConfigError, ConflictError
from atlas.settings import Settings

LEASE_SECONDS = 40.0
"""A dead holder is noticed after this and one round of the housekeeping: within a minute."""
MOST_SECONDS = 600.0
"""Nobody holds a lease that ends later than this from now."""
ERROR_LENGTH = 4000
MESSAGE_LENGTH = 500
ACTIVE = ("pending", "running")


class LeaseLostError(ConflictError):
    """The step is no longer this holder's: it was taken over, ended or cancelled."""


def steps(session: Session, run_id: str) -> Sequence[RunStep]:
    """A run's steps as they are in the database now, in the plan's order."""
    query = select(RunStep).where(RunStep.run_id == run_id).order_by(RunStep.position)
    return session.scalars(query.execution_options(populate_existing=True)).all()


def locked_run(session: Session, run_id: str) -> Run:
    """The run's row, held until the transaction ends (SQLite's write transaction holds everything)."""
    run = session.get(Run, run_id, with_for_update=True)
    if run is None:
        raise ConfigError(f"run {run_id!r} does not exist; see: atlas status")
    return run


def _one_step(run_id: str, name: str) -> ColumnElement[bool]:
    return and_(RunStep.run_id == run_id, RunStep.name == name)


def changed(session: Session, where: ColumnElement[bool], **values: Any) -> int:
    """Update the steps that match and return how many there were."""
    statement = update(RunStep).where(where).values(**values).execution_options(synchronize_session=False)
    result = session.execute(statement)
    return result.rowcount if isinstance(result, CursorResult) else 0


def claim_step(
    settings: Settings,
    run_id: str,
    name: str,
    owner: str,
    *,
    seconds: float = LEASE_SECONDS,
    now: datetime | None = None,
) -> StepRow | None:
    """Take the lease of a step that is ready, or whose holder is gone; None when it is not to be had.

    ``owner`` comes from :func:`atlas.db.owner.new_owner`. ``now`` replaces the database's clock in tests.
    """
    with writing(settings) as session:
        run = locked_run(session, run_id)
        step = session.get(RunStep, (run_id, name))
        if step is None:
            raise ConfigError(f"run {run_id!r} has no step {name!r}; see: atlas status {run_id}")
        if run.cancel_requested or run.status not in ACTIVE:
            return None
        now = now or clock(session)
        if not _take_lease(session, step, owner, now, seconds):
            return None
        if run.status == "pending":
            run.status, run.started_at = "running", now
        session.flush()
        session.refresh(step)
        return step_row(step)


def _take_lease(session: Session, step: RunStep, owner: str, now: datetime, seconds: float) -> bool:
    """The conditional UPDATE: of several claimers exactly one changes a row."""
    late = now + timedelta(seconds=MOST_SECONDS)
    over = or_(RunStep.lease_until < now, RunStep.lease_until > late)
    free = [RunStep.status == "ready", and_(RunStep.status == "running", over)]
    if step.lease_owner is not None and is_dead(step.lease_owner):
        free.append(and_(RunStep.status == "running", RunStep.lease_owner == step.lease_owner))
    won = changed(
        session,
        and_(_one_step(step.run_id, step.name), or_(*free)),
        status="running",
        lease_owner=owner,
        lease_until=now + timedelta(seconds=seconds),
        attempts=RunStep.attempts + 1,
        started_at=now,
        finished_at=None,
        done=0,
        total=0,
        rate=None,
        message="",
    )
    return won == 1


def heartbeat(
    settings: Settings,
    run_id: str,
    name: str,
    owner: str,
    *,
    done: int = 0,
    total: int = 0,
    message: str = "",
    rate: float | None = None,
    peak_rss_mb: float | None = None,
    seconds: float = LEASE_SECONDS,
    now: datetime | None = None,
) -> bool:
    """Renew the lease, note the progress, and return whether a stop was asked for.

    Raises LeaseLostError when the step is no longer the owner's.
    """
    with writing(settings) as session:
        held = and_(_one_step(run_id, name), RunStep.status == "running", RunStep.lease_owner == owner)
        renewed = changed(
            session,
            held,
            lease_until=(now or clock(session)) + timedelta(seconds=seconds),
            done=done,
            total=total,
            message=message[:MESSAGE_LENGTH],
            rate=rate,
            peak_rss_mb=peak_rss_mb,
        )
        if not renewed:
            raise LeaseLostError(f"step {name!r} of run {run_id} is no longer held by {owner}")
        return bool(session.scalar(select(Run.cancel_requested).where(Run.id == run_id)))


def _end(
    settings: Settings,
    run_id: str,
    name: str,
    owner: str,
    status: str,
    error: str | None,
    *,
    counts: bool = True,
) -> tuple[str, ...]:
    """Move a held step to ``status``, let others follow, and return the names that became ready."""
    with writing(settings) as session:
        run = locked_run(session, run_id)
        step = session.get(RunStep, (run_id, name), populate_existing=True)
        if step is None or step.lease_owner != owner:
            raise LeaseLostError(f"step {name!r} of run {run_id} is no longer held by {owner}")
        if status == "ready" and run.cancel_requested:
            status = "cancelled"
        check_move(f"step {name!r}", step.status, status)
        now = clock(session)
        step.status, step.error, step.lease_owner, step.lease_until = status, error, None, None
        step.finished_at = None if status == "ready" else now
        step.enqueued_at = None
        step.attempts -= 0 if counts else 1
        if status == "done":
            step.done = step.total = max(step.done, step.total)
        session.flush()
        ready = _follow(session, run_id)
        _settle(session, run, now)
        return (name,) if status == "ready" else ready


def _follow(session: Session, run_id: str) -> tuple[str, ...]:
    """Make ready what has all it needs, cancel what never will; return the names made ready."""
    rows = steps(session, run_id)
    states = {step.name: step.status for step in rows}
    ready = []
    for step in rows:
        if step.status != "pending":
            continue
        lost = [need for need in step.needs if states[need] in ("failed", "cancelled")]
        if lost:
            step.status, step.message = "cancelled", f"needs {lost[0]}, which is {states[lost[0]]}"
        elif all(states[need] in FINISHED for need in step.needs):
            step.status = "ready"
            ready.append(step.name)
        states[step.name] = step.status
    session.flush()
    return tuple(ready)


def _settle(session: Session, run: Run, now: datetime) -> None:
    """End the run when its last step has ended."""
    rows = steps(session, run.id)
    status = run_status([step.status for step in rows], run.status)
    if status == run.status:
        return
    check_move(f"run {run.id}", run.status, status, RUN_MOVES)
    run.status, run.finished_at = status, now
    run.error = next((f"{s.name}: {s.error}" for s in rows if s.status == "failed"), None)
    session.flush()


def finish_step(settings: Settings, run_id: str, name: str, owner: str) -> tuple[str, ...]:
    """Mark a held step done and return the names of the steps that this made ready.

    Raises LeaseLostError when somebody else holds it by now.
    """
    return _end(settings, run_id, name, owner, "done", None)


def fail_step(
    settings: Settings,
    run_id: str,
    name: str,
    owner: str,
    error: str,
    *,
    retry: bool = False,
    counts: bool = True,
) -> tuple[str, ...]:
    """Record why a held step failed. With ``retry`` it becomes ready again, and is returned.

    Without, what needs it is cancelled; the rest of the run goes on. With ``counts`` False this was no
    attempt: the step found that it has to wait for another.
    """
    status = "ready" if retry else "failed"
    return _end(settings, run_id, name, owner, status, error[:ERROR_LENGTH], counts=counts)


def cancel_step(settings: Settings, run_id: str, name: str, owner: str) -> None:
    """Record that a held step stopped because it was asked to."""
    _end(settings, run_id, name, owner, "cancelled", None)


def request_cancel(settings: Settings, run_id: str) -> None:
    """Ask a run to stop: what has not begun is cancelled at once, what runs stops at its next report."""
    who = demand("jobs")
    with writing(settings) as session:
        run = locked_run(session, run_id)
        if run.status not in ACTIVE:
            raise ConflictError(
                f"run {run_id} is {run.status!r} already; only a run under way can be cancelled"
            )
        run.cancelled_by = who.name
        withdraw(session, run, clock(session))


def withdraw(session: Session, run: Run, now: datetime) -> None:
    """Cancel, in a transaction that holds the run, whatever nobody works on."""
    run.cancel_requested = True
    for step in steps(session, run.id):
        if step.status in ("pending", "ready") or (step.status == "running" and _left(step, now)):
            step.status, step.finished_at, step.lease_owner = "cancelled", now, None
    session.flush()
    _settle(session, run, now)


def skip_steps(session: Session, run: Run, names: Collection[str], now: datetime) -> None:
    """Mark waiting steps as skipped, in a transaction that holds the run, and let others follow."""
    for step in steps(session, run.id):
        if step.name in names and step.status in ("pending", "ready"):
            step.status = "skipped"
    session.flush()
    _follow(session, run.id)
    _settle(session, run, now)


def _left(step: RunStep, now: datetime) -> bool:
    """Whether nobody works on a running step any more."""
    late = now + timedelta(seconds=MOST_SECONDS)
    expired = step.lease_until is not None and not now <= step.lease_until <= late
    return expired or (step.lease_owner is not None and is_dead(step.lease_owner))


def release_left_steps(settings: Settings, run_id: str, *, now: datetime | None = None) -> tuple[str, ...]:
    """Make ready again (or, if the run is to stop, cancelled) the steps whose holder is gone.

    Returns the names made ready.
    """
    with writing(settings) as session:
        return release_left(session, locked_run(session, run_id), now or clock(session))


def release_left(session: Session, run: Run, now: datetime) -> tuple[str, ...]:
    """The same inside a transaction that holds the run."""
    left = [step for step in steps(session, run.id) if step.status == "running" and _left(step, now)]
    for step in left:
        step.status = "cancelled" if run.cancel_requested else "ready"
        step.error = f"its holder {step.lease_owner} is gone"
        step.lease_owner, step.lease_until, step.enqueued_at = None, None, None
    session.flush()
    _settle(session, run, now)
    return tuple(step.name for step in left if step.status == "ready")
