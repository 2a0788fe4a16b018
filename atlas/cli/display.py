"""Progress on the terminal: a bar per step with rate and time left; plain lines where there is none."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from atlas.pipeline.plan import Step
from atlas.progress import NullProgress
from atlas.progress import Progress as AtlasProgress
from atlas.settings import load_settings

_LINE_SECONDS = 10.0


class _Bar:
    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._task = progress, progress.add_task(name, total=None, note="")

    def update(self, done: int, total: int, message: str = "") -> None:
        self._progress.update(self._task, completed=done, total=total, note=message)


class _Lines:
    """At most a line every ten seconds, for logs and pipes."""

    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name = console, name
        self._started = self._said = time.monotonic()

    def update(self, done: int, total: int, message: str = "") -> None:
        now = time.monotonic()
        if now - self._said < _LINE_SECONDS or not done:
            return
        self._said = now
        left = (now - self._started) / done * (total - done)
        self._console.print(f"  {self._name}: {done}/{total}, {left:.0f} s left {message}", highlight=False)


@contextmanager
def step_display(step: Step, number: int, total: int) -> Iterator[AtlasProgress]:
    """The display of one step of a build."""
    with display(f"{number}/{total} {step.name}") as progress:
        yield progress


@contextmanager
def display(name: str) -> Iterator[AtlasProgress]:
    """The display of any long work, under a name."""
    console = Console(stderr=True)
    started = time.monotonic()
    if load_settings().log_format is not None:
        # Each step says itself, in lines of the chosen form, how far it is.
        yield NullProgress()
        return
    if not console.is_terminal:
        yield _Lines(console, name)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            yield _Bar(bars, name)
    console.print(f"  {name}: done in {time.monotonic() - started:.1f} s", highlight=False)
