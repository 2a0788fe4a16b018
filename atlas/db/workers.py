"""Who is there to do the work: each worker says every few seconds that it lives, what it serves and where.

A worker that has said nothing for :data:`GONE_SECONDS` is taken for dead. What it worked on is decided by
the leases (:mod:`atlas.db.leases`), not here: this table is for people to look at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import delete, select

from atlas.db.models import RunStep
from atlas.db.owner import worker_of
from atlas.db.session import clock, reading, writing
from atlas.db.worker_models import Worker
from atlas.settings import Settings

GONE_SECONDS = 60.0
"""After this long without a word a worker counts as dead."""
FORGET_SECONDS = 24 * 3600.0
"""After this long its row is removed."""


@dataclass(frozen=True)
class WorkerRow:
    """One worker, as it was when read."""

    name: str
    """``NAME@HOST``."""
    host: str
    pid: int
    queues: tuple[str, ...]
    device: str
    """What it computes on, for people: ``cpu, 16 cores``, ``cuda: NVIDIA H200``."""
    concurrency: int
    """Steps that it does at once."""
    version: str
    """Version of Head Atlas."""
    started_at: datetime | None = None
    seen_at: datetime | None = None
    alive: bool = True
    steps: tuple[str, ...] = field(default=())
    """What it works on now, as ``RUN STEP``."""


def note_worker(settings: Settings, worker: WorkerRow) -> None:
    """Say that a worker is there, by the database's clock; rows silent for a day are removed."""
    with writing(settings) as session:
        now = clock(session)
        row = session.get(Worker, worker.name)
        if row is None:
            row = Worker(name=worker.name, started_at=now)
            session.add(row)
        elif row.pid != worker.pid or row.host != worker.host:
            row.started_at = now
        row.host, row.pid, row.seen_at = worker.host, worker.pid, now
        row.queues, row.device = list(worker.queues), worker.device[:200]
        row.concurrency, row.version = worker.concurrency, worker.version
        session.flush()
        session.execute(delete(Worker).where(Worker.seen_at < now - timedelta(seconds=FORGET_SECONDS)))


def forget_worker(settings: Settings, name: str) -> None:
    """Remove a worker that ends in good order."""
    with writing(settings) as session:
        session.execute(delete(Worker).where(Worker.name == name))


def list_workers(settings: Settings, *, now: datetime | None = None) -> list[WorkerRow]:
    """Every worker with what it works on: those alive first, then by name.

    One whose ``seen_at`` lies far from now either way (a clock was set) counts as gone until it speaks again.
    """
    with reading(settings) as session:
        now = now or clock(session)
        query = select(RunStep.run_id, RunStep.name, RunStep.lease_owner).where(RunStep.status == "running")
        running = [(worker_of(owner or ""), f"{run} {step}") for run, step, owner in session.execute(query)]
        rows = [_row(one, now, running) for one in session.scalars(select(Worker))]
    return sorted(rows, key=lambda row: (not row.alive, row.name))


def _row(one: Worker, now: datetime, running: Sequence[tuple[str, str]]) -> WorkerRow:
    alive = abs(now - one.seen_at) <= timedelta(seconds=GONE_SECONDS)
    return WorkerRow(
        name=one.name,
        host=one.host,
        pid=one.pid,
        queues=tuple(one.queues),
        device=one.device,
        concurrency=one.concurrency,
        version=one.version,
        started_at=one.started_at,
        seen_at=one.seen_at,
        alive=alive,
        steps=tuple(step for name, step in running if name == one.name) if alive else (),
    )
