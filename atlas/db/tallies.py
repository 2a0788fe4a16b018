"""Counts over all runs, for metrics: states, attempts, leases, how long steps have waited."""

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import func, select

from atlas.db.leases import ACTIVE, LEASE_SECONDS
from atlas.db.models import Run, RunStep
from atlas.db.rows import StepRow, step_row
from atlas.db.session import clock, reading
from atlas.settings import Settings


@dataclass(frozen=True)
class Tally:
    """The service's runs and steps at one moment."""

    runs: dict[str, int]
    """Runs by status."""
    steps: dict[tuple[str, str], int]
    """Steps by queue and status."""
    attempts: int
    """Attempts of all steps."""
    failures: dict[str, int]
    """Steps that failed for good, by kind."""
    running: tuple[tuple[StepRow, str], ...]
    """Steps that are worked on, each with its run's config."""
    lease_ages: tuple[float, ...]
    """Seconds since each lease was renewed last."""
    waiting: dict[str, float]
    """By queue: seconds that the longest waiting message has been out."""


def tally(settings: Settings) -> Tally:
    """Count everything in one view of the database."""
    with reading(settings) as session:
        now = clock(session)
        runs = session.execute(select(Run.status, func.count()).group_by(Run.status)).all()
        by_state = select(RunStep.queue, RunStep.status, func.count()).group_by(RunStep.queue, RunStep.status)
        steps = session.execute(by_state).all()
        attempts = session.scalar(select(func.sum(RunStep.attempts))) or 0
        failed = select(RunStep.kind, func.count()).where(RunStep.status == "failed").group_by(RunStep.kind)
        held = select(RunStep, Run.config_json).join(Run, Run.id == RunStep.run_id)
        running = session.execute(held.where(RunStep.status == "running")).all()
        ready = (
            select(RunStep.queue, func.min(RunStep.enqueued_at))
            .join(Run, Run.id == RunStep.run_id)
            .where(RunStep.status == "ready", Run.status.in_(ACTIVE), RunStep.enqueued_at.is_not(None))
            .group_by(RunStep.queue)
        )
        since = session.execute(ready).all()
        ages = [
            (now - (step.lease_until - timedelta(seconds=LEASE_SECONDS))).total_seconds()
            for step, _ in running
            if step.lease_until is not None
        ]
        return Tally(
            {row[0]: row[1] for row in runs},
            {(queue, status): n for queue, status, n in steps},
            int(attempts),
            {row[0]: row[1] for row in session.execute(failed).all()},
            tuple((step_row(step), config) for step, config in running),
            tuple(max(0.0, age) for age in ages),
            {queue: max(0.0, (now - first).total_seconds()) for queue, first in since if first is not None},
        )
