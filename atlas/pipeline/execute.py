"""Run one step of a plan: once, whole, and only if its output is not there.

The output is written under a temporary name and renamed; a lock keeps a second process from doing the same
step. What a step saves on its way (a training checkpoint) lies beside, and goes when the step is done. With a
lake (``ATLAS_LAKE_URL``) inputs are copied from there first and the output counts once it is there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atlas.errors import StoreError
from atlas.pipeline.plan import Plan, Step
from atlas.pipeline.sharing import NOT_SHARED, Shared, shared_of
from atlas.progress import Progress
from atlas.settings import Settings
from atlas.store import published
from atlas.store.atomic import atomic_dir, discard, lock, sweep_for
from atlas.store.lake.errors import LakeUnreachableError

_HASHED_AT_ONCE = 2
_SOON_MADE_AGAIN = {"shard", "effects", "summarise", "dfa", "attribute"}
"""Kinds whose outputs nobody waits to see on the disk. What a power cut spoils of them, sizes and digests
show where they are read, and the same build makes them again."""
RELEASE_NOTE, INVENTORY = "release.json", "files.json"


@dataclass(frozen=True)
class Context:
    """What a step function gets: the plan, the step, the machine, and where its inputs and output lie."""

    plan: Plan
    step: Step
    settings: Settings
    out: Path
    scratch: Path
    progress: Progress
    shared: Shared = NOT_SHARED
    """Where inputs come from that are not on this disk."""
    _found: dict[str, Path] = field(default_factory=dict, compare=False, repr=False)

    def input(self, name: str) -> Path:
        """Folder of a finished step that this one needs; looked at once."""
        if name not in self._found:
            self._found[name] = self._look(name)
        return self._found[name]

    def _look(self, name: str) -> Path:
        path = output_of(self.plan.step(name), self.settings)
        self.shared.bring(path, is_complete)
        if not is_complete(path):
            raise StoreError(
                f"step {self.step.name!r} needs {name!r}, whose output {str(path)!r} is missing or damaged"
            )
        self._check(name, path)
        return path

    def _check(self, name: str, path: Path) -> None:
        """Remove an input that is no longer what was published, so that the next build makes it again."""
        damaged = damaged_files(path)
        if not damaged:
            return
        with lock(self.settings.steps / f".lock-{path.name}"):
            discard(path)
        raise StoreError(
            f"step {self.step.name!r} needs {name!r}, whose output {str(path)!r} was changed on the disk "
            f"({', '.join(damaged[:3])}); it is removed, and the same build makes it again"
        )

    def inputs(self, kind: str) -> list[Path]:
        """Folders of all steps of a kind, in order."""
        return [self.input(step.name) for step in self.plan.of_kind(kind)]


StepFunction = Callable[[Context], None]


def output_of(step: Step, settings: Settings) -> Path:
    """Where a step's output lies or will lie."""
    return settings.steps / step.folder


def is_current(step: Step, settings: Settings) -> bool:
    """Whether the step's output is there; for ``publish``, whether that release is the current one."""
    folder, shared = output_of(step, settings), shared_of(settings)
    if not shared.has(folder, is_complete):
        return False
    if step.kind != "publish":
        return True
    shared.bring(folder, is_complete)
    try:
        note = json.loads((folder / RELEASE_NOTE).read_text(encoding="utf8"))
        info = published.current(settings, note["name"], fresh=True)
        size = info.path.stat().st_size if info.size is None else info.size
        return bool(info.digest == note["digest"] and size == note["bytes"])
    except LakeUnreachableError:
        raise
    except (OSError, ValueError, KeyError, TypeError, StoreError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    def fail(error: OSError) -> None:
        raise error

    found = {}
    for inside, _, names in os.walk(folder, onerror=fail):
        for name in set(names) - {INVENTORY}:
            path = Path(inside, name)
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return dict(sorted(found.items()))


def _inventory(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of every file that an output was published with."""
    found = json.loads((folder / INVENTORY).read_text(encoding="utf8"))
    # Up to version 0.9 the sizes alone were written.
    return {name: [value, None] if isinstance(value, int) else value for name, value in found.items()}


def is_complete(folder: Path) -> bool:
    """Whether a step's output holds the files it was published with, each of its size."""
    try:
        return {name: size for name, (size, _) in _inventory(folder).items()} == _sizes(folder)
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_inventory(folder: Path) -> None:
    sizes = _sizes(folder)
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        digests = pool.map(_digest, [folder / name for name in sizes])
    found = {name: [size, digest] for (name, size), digest in zip(sizes.items(), digests, strict=True)}
    (folder / INVENTORY).write_text(json.dumps(found), encoding="utf8")


_VERIFIED: set[tuple[str, int]] = set()


def _published(folder: Path) -> tuple[str, int]:
    return str(folder), (folder / INVENTORY).stat().st_mtime_ns


def damaged_files(folder: Path) -> list[str]:
    """Files of a complete output whose content is no longer what was published.

    Each is read once per process, when it is written or first asked for.
    """
    key = _published(folder)
    if key in _VERIFIED:
        return []
    known = _inventory(folder)
    found = [name for name, (_, digest) in known.items() if digest not in (None, _digest(folder / name))]
    if not found:
        _VERIFIED.add(key)
    return found


def is_sound(folder: Path) -> bool:
    """Whether a step's output is complete and its content what was published."""
    return is_complete(folder) and not damaged_files(folder)


def run_step(plan: Plan, name: str, settings: Settings, progress: Progress) -> None:
    """Carry out a step whose needs are met; does nothing if its output is current.

    Raises:
        ConflictError: another process is doing this step.
        AtlasError: whatever the step itself raises; nothing is published then.
    """
    from atlas.pipeline.memory import within_memory
    from atlas.pipeline.steps import STEPS

    step = plan.step(name)
    if is_current(step, settings):
        return
    final = output_of(step, settings)
    scratch = settings.steps / f".scratch-{step.folder}"
    with lock(settings.steps / f".lock-{step.folder}"), shared_of(settings).working(final, scratch) as shared:
        if is_current(step, settings) or (step.kind != "publish" and shared.give(final, is_sound)):
            return
        sweep_for(final)
        # A release that is no longer the current one, or an output that somebody damaged.
        discard(final)

        def make() -> None:
            with atomic_dir(final, flush=step.kind not in _SOON_MADE_AGAIN) as work:
                STEPS[step.kind](Context(plan, step, settings, work, scratch, progress, shared))
                _write_inventory(work)
            _VERIFIED.add(_published(final))

        within_memory(make, step)
        shared.give(final, is_complete, replace=step.kind == "publish")
        shutil.rmtree(scratch, ignore_errors=True)


def waiting_for(plan: Plan, settings: Settings) -> list[Step]:
    """The steps that are not current, in the order in which they can be done.

    A step whose output is there needs nothing any more, even if its inputs were cleaned away.
    """
    todo: list[Step] = []
    needed = {plan.steps[-1].name}
    for step in reversed(plan.steps):
        if step.name in needed and not is_current(step, settings):
            todo.append(step)
            needed.update(step.needs)
    return todo[::-1]


def current_steps(plan: Plan, waiting: Collection[Step]) -> set[str]:
    """Names of the steps that need not run: their output, or everything made from it, is there."""
    return {step.name for step in plan.steps} - {step.name for step in waiting}
