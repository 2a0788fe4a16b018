"""Runs: made from a plan, joined, listed, and which of their steps wait for a message to a worker."""

import hashlib
import secrets
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta

from sqlalchemy import and_, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from atlas.access import actor, demand
from atlas.db.leases import ACTIVE, changed, release_left, skip_steps, steps, withdraw
from atlas.db.models import Run, RunStep
from atlas.db.rows import PlanLike, RunRow, StepLike, StepRow, run_row, step_row
from atlas.db.session import clock, reading, writing
from atlas.db.states import ENDED, FINISHED, QUEUES, run_status
from atlas.errors import ConfigError, ConflictError, one_of
from atlas.settings import Settings

Current = Collection[str] | Callable[[], Collection[str]] | None


def plan_digest(plan: PlanLike) -> str:
    """SHA-256 over the names and digests of all steps: equal for plans that make the same things."""
    lines = sorted(f"{step.name} {step.digest}" for step in plan.steps)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check_plan(plan: PlanLike) -> None:
    seen: set[str] = set()
    for step in plan.steps:
        one_of("queue", step.queue, QUEUES)
        for need in step.needs:
            one_of(f"step {step.name!r} comes before or without what it needs:", need, sorted(seen))
        if step.name in seen:
            raise ConfigError(f"step {step.name!r} is in the plan twice; names must be unique")
        seen.add(step.name)


def _new_step(run_id: str, position: int, step: StepLike, states: Mapping[str, str]) -> RunStep:
    return RunStep(
        run_id=run_id,
        name=step.name,
        position=position,
        kind=step.kind,
        digest=step.digest,
        queue=step.queue,
        needs=list(step.needs),
        status=states[step.name],
        done=0,
        total=0,
        message="",
        attempts=0,
    )


def _first_states(plan: PlanLike, current: Collection[str]) -> dict[str, str]:
    states: dict[str, str] = {}
    for step in plan.steps:
        waits = any(states[need] not in FINISHED for need in step.needs)
        states[step.name] = "skipped" if step.name in current else "pending" if waits else "ready"
    return states


def create_run(
    settings: Settings,
    plan: PlanLike,
    *,
    executor: str = "local",
    current: Current = None,
) -> RunRow:
    """Record a run of a plan, or join the one of the same plan that is already under way.

    ``current`` names the steps whose outputs are there: they are skipped (None: not known, none are). A
    function is asked once the run is locked, so that steps which others end meanwhile are not missed.
    ``executor`` is ``local`` (this process) or ``queue`` (workers); joining moves the run to it. A run under
    way whose finished outputs were removed since is cancelled, and a new one made.

    Raises AccessError for somebody who may not start runs, ConfigError for a plan whose steps do not follow
    from each other, ConflictError while a run of the same plan is being cancelled.
    """
    one_of("executor", executor, ("local", "queue"))
    demand("jobs")
    _check_plan(plan)
    digest = plan_digest(plan)
    try:
        with writing(settings) as session:
            found = _active(session, digest)
            names = current() if callable(current) else current
            if found is not None and not _join(session, found, names):
                found = None
            if found is None:
                found = _insert_run(session, plan, digest, executor, names or ())
            found.executor = executor
            run_id = found.id
    except IntegrityError:
        # Somebody else recorded the same plan between our look and our insert.
        return create_run(settings, plan, executor=executor, current=current)
    return load_run(settings, run_id)


def _active(session: Session, digest: str) -> Run | None:
    """The run of this plan that is under way, its abandoned steps made ready."""
    query = select(Run).where(Run.digest == digest, Run.status.in_(ACTIVE)).with_for_update()
    found = session.scalars(query).one_or_none()
    if found is None:
        return None
    release_left(session, found, clock(session))
    if found.status in ACTIVE and found.cancel_requested:
        raise ConflictError(f"run {found.id} of the same plan is still stopping; wait for it: atlas status")
    return found if found.status in ACTIVE else None


def _join(session: Session, run: Run, current: Collection[str] | None) -> bool:
    """Bring a run under way up to what is current now; False if it had to be withdrawn."""
    if current is None:
        return True
    rows = steps(session, run.id)
    gone = any(row.status in FINISHED and row.name not in current for row in rows)
    if gone and not any(row.status == "running" for row in rows):
        withdraw(session, run, clock(session))
        return False
    skip_steps(session, run, current, clock(session))
    return True


def _insert_run(
    session: Session, plan: PlanLike, digest: str, executor: str, current: Collection[str]
) -> Run:
    now = clock(session)
    states = _first_states(plan, current)
    status = run_status(states.values(), "pending")
    run = Run(
        id=f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}",
        digest=digest,
        name=plan.config.release_name,
        executor=executor,
        config_json=plan.config.to_json(),
        status=status,
        created_at=now,
        finished_at=now if status in ENDED else None,
        cancel_requested=False,
        started_by=actor().name,
    )
    session.add(run)
    session.flush()
    session.add_all(_new_step(run.id, i, step, states) for i, step in enumerate(plan.steps))
    return run


def list_runs(settings: Settings, *, limit: int = 50) -> list[RunRow]:
    """The most recent runs, newest first, without their steps."""
    with reading(settings) as session:
        rows = session.scalars(select(Run).order_by(Run.created_at.desc(), Run.id.desc()).limit(limit))
        return [run_row(row) for row in rows]


def load_run(settings: Settings, run_id: str) -> RunRow:
    """One run with its steps in the plan's order; ConfigError when there is none of this id."""
    with reading(settings) as session:
        run = session.get(Run, run_id)
        if run is None:
            raise ConfigError(f"run {run_id!r} does not exist; see: atlas status")
        return run_row(run, steps(session, run_id))


def ready_steps(settings: Settings, run_id: str) -> list[StepRow]:
    """The steps of a run that could be claimed now, in the plan's order."""
    return [step for step in load_run(settings, run_id).steps if step.status == "ready"]


def mark_enqueued(settings: Settings, run_id: str, names: Collection[str], *, countdown: float = 0) -> None:
    """Note that a message for each of these steps was sent, to be worked on after ``countdown`` seconds."""
    with writing(settings) as session:
        where = and_(RunStep.run_id == run_id, RunStep.name.in_(names), RunStep.status == "ready")
        changed(session, where, enqueued_at=clock(session) + timedelta(seconds=countdown))


def unsent_steps(settings: Settings, *, resend_after: float) -> list[StepRow]:
    """Ready steps of queued runs for which no message was sent, or none for ``resend_after`` seconds."""
    with reading(settings) as session:
        now, patience = clock(session), timedelta(seconds=resend_after)
        sent = RunStep.enqueued_at
        query = (
            select(RunStep)
            .join(Run, Run.id == RunStep.run_id)
            .where(Run.executor == "queue", Run.status.in_(ACTIVE), RunStep.status == "ready")
            # Sent in the future: the clock was set back since.
            .where(or_(sent.is_(None), sent < now - patience, sent > now + patience))
        )
        return [step_row(row) for row in session.scalars(query)]


def active_runs(settings: Settings, *, executor: str) -> list[RunRow]:
    """Runs under way of one executor, oldest first, without their steps."""
    query = select(Run).where(Run.executor == executor, Run.status.in_(ACTIVE)).order_by(Run.created_at)
    with reading(settings) as session:
        return [run_row(row) for row in session.scalars(query)]


def wanted_outputs(settings: Settings) -> set[tuple[str, str]]:
    """(kind, digest) of the steps that runs under way need, and those of each release's newest runs.

    The newest run of a release name, however it ended, is the one to be gone on with; the newest that was
    done made what is published now.
    """
    with reading(settings) as session:
        runs = session.execute(
            select(Run.id, Run.name, Run.status).order_by(Run.created_at.desc(), Run.id.desc())
        )
        kept: dict[tuple[str, str], str] = {}
        for run_id, name, status in runs:
            if status in ACTIVE:
                kept["active", run_id] = run_id
            kept.setdefault(("newest", name), run_id)
            if status == "done":
                kept.setdefault(("done", name), run_id)
        where = RunStep.run_id.in_(set(kept.values()))
        return {
            (kind, digest)
            for kind, digest in session.execute(select(RunStep.kind, RunStep.digest).where(where))
        }
