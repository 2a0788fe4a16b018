"""The states of runs and steps, and which change into which: the only place that says so.

A step: ``pending`` (waits for others) -> ``ready`` -> ``running`` -> ``done``, ``failed`` or ``cancelled``;
back to ``ready`` when it is to be tried again; ``skipped`` where its output was there already. A run:
``pending`` -> ``running`` -> ``done``, ``failed`` or ``cancelled``. What ended stays ended: asking again
makes a new run, which finds the finished outputs current.
"""

from collections.abc import Iterable, Mapping

from atlas.errors import ConflictError

STEP_MOVES: Mapping[str, frozenset[str]] = {
    "pending": frozenset({"ready", "skipped", "cancelled"}),
    "ready": frozenset({"running", "skipped", "cancelled"}),
    "running": frozenset({"done", "failed", "cancelled", "ready"}),
    "done": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
    "skipped": frozenset(),
}
RUN_MOVES: Mapping[str, frozenset[str]] = {
    "pending": frozenset({"running", "done", "failed", "cancelled"}),
    "running": frozenset({"done", "failed", "cancelled"}),
    "done": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
QUEUES = ("cpu", "gpu", "io", "interactive")
"""Where steps wait: heavy on the processor, on the GPU, on disk and network; and short jobs of the app."""
FINISHED = frozenset({"done", "skipped"})
"""Steps whose output is there for those that need it."""
ENDED = frozenset({"done", "skipped", "failed", "cancelled"})
"""Steps and runs with nothing left to do."""


def check_move(what: str, old: str, new: str, moves: Mapping[str, frozenset[str]] = STEP_MOVES) -> None:
    """ConflictError unless ``old`` may become ``new``.

    >>> check_move("step 'merge'", "ready", "running")
    >>> check_move("step 'merge'", "done", "running")
    Traceback (most recent call last):
    ...
    atlas.errors.ConflictError: step 'merge' is 'done' and cannot become 'running'; allowed: nothing
    """
    if new not in moves[old]:
        allowed = ", ".join(sorted(moves[old])) or "nothing"
        raise ConflictError(f"{what} is {old!r} and cannot become {new!r}; allowed: {allowed}")


def run_status(steps: Iterable[str], current: str) -> str:
    """What a run is, given what its steps are.

    A failed step makes the run failed, but only when nothing is left to do beside it.

    >>> run_status(["done", "running"], "running")
    'running'
    >>> run_status(["done", "failed", "cancelled"], "running")
    'failed'
    >>> run_status(["failed", "ready"], "running")
    'running'
    >>> run_status(["skipped"], "pending")
    'done'
    """
    states = set(steps)
    if not states <= ENDED:
        return current
    if "failed" in states:
        return "failed"
    return "cancelled" if "cancelled" in states else "done"
