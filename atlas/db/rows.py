"""Runs and steps as plain data, and what they ask of a plan."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from atlas.db.models import Run, RunStep
from atlas.db.states import ENDED, FINISHED


class ConfigLike(Protocol):
    """What a run keeps of a build configuration."""

    @property
    def release_name(self) -> str:
        """The name of the release it makes."""

    def to_json(self) -> str:
        """The whole configuration."""


class StepLike(Protocol):
    """What a run keeps of a step of a plan."""

    @property
    def name(self) -> str:
        """Unique in the plan."""

    @property
    def kind(self) -> str:
        """What is done."""

    @property
    def digest(self) -> str:
        """Names the output by everything it depends on."""

    @property
    def queue(self) -> str:
        """cpu, gpu or io."""

    @property
    def needs(self) -> Sequence[str]:
        """Steps that have to be finished first."""


class PlanLike(Protocol):
    """A configuration and the steps that carry it out, each after those that it needs."""

    @property
    def config(self) -> ConfigLike:
        """The configuration."""

    @property
    def steps(self) -> Sequence[StepLike]:
        """The steps."""


@dataclass(frozen=True)
class StepRow:
    """One step of a run, as it was when read."""

    run_id: str
    name: str
    position: int
    kind: str
    digest: str
    queue: str
    needs: tuple[str, ...]
    status: str
    done: int
    total: int
    rate: float | None
    """Units of ``done`` per second."""
    message: str
    error: str | None
    attempts: int
    lease_owner: str | None
    lease_until: datetime | None
    enqueued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    peak_rss_mb: float | None

    @property
    def seconds_left(self) -> float | None:
        """Time left at the present rate, in seconds; None when that cannot be told."""
        if self.status != "running" or not self.rate or not self.total:
            return None
        return max(0, self.total - self.done) / self.rate


@dataclass(frozen=True)
class RunRow:
    """One run, as it was when read; ``steps`` is empty in lists of runs."""

    id: str
    digest: str
    name: str
    executor: str
    config_json: str
    status: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: str | None
    cancel_requested: bool
    started_by: str | None = None
    cancelled_by: str | None = None
    steps: tuple[StepRow, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ENDED

    @property
    def finished(self) -> frozenset[str]:
        """Names of the steps whose output is there."""
        return frozenset(step.name for step in self.steps if step.status in FINISHED)


def _fields(row: Run | RunStep, names: Collection[str]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}


def step_row(row: RunStep) -> StepRow:
    """A step as plain data."""
    return StepRow(**{**_fields(row, StepRow.__dataclass_fields__), "needs": tuple(row.needs)})


def run_row(row: Run, steps: Sequence[RunStep] = ()) -> RunRow:
    """A run, with the given steps, as plain data."""
    names = [name for name in RunRow.__dataclass_fields__ if name != "steps"]
    return RunRow(**_fields(row, names), steps=tuple(step_row(step) for step in steps))
