"""What may go from the folder of step outputs, and taking it away beside running builds.

Kept are the outputs that a run under way needs, those of each release's newest runs (so that the next build
goes on cheaply), trained SAEs that a kept release names (so that they can be exported), and whatever is
younger than a grace period. Releases, imported SAEs and annotations are never looked at.

A folder is taken away under the lock of its step. It is set aside first and the runs are asked again: a build
that began in between has either been seen, and gets it back, or sees that it is gone and makes it again
(:func:`atlas.pipeline.local.begin` looks after it has recorded its run).
"""

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from atlas.db.runs import wanted_outputs
from atlas.errors import ConflictError
from atlas.interop.dashboards.weights import tensors_digest
from atlas.pipeline.execute import is_complete
from atlas.sae.library import WEIGHTS
from atlas.settings import Settings
from atlas.store import atomic, release
from atlas.store.atomic import WORK_PREFIX
from atlas.store.connection import open_release

SCRATCH, LOCK = ".scratch-", ".lock-"
_FOLDER = re.compile(r"[a-z]+-[0-9a-f]{16}")
_HIDDEN = re.compile(r"\.(?:scratch|lock|work)-([a-z]+-[0-9a-f]{16})(?:-.*)?")


@dataclass(frozen=True)
class Freed:
    """One thing that was removed, or would be."""

    name: str
    what: str
    """output, checkpoint, residual stream, lock, or half-written: output, release, upload."""
    size: int
    """Bytes."""


def collect(settings: Settings, *, grace: float, dry_run: bool = False) -> list[Freed]:
    """Remove what nothing needs; ``grace`` in seconds is how old an output or checkpoint has to be.

    What a running step holds is passed over. With ``dry_run`` nothing changes.
    """
    work = _Work(settings, grace, dry_run)
    found: list[Freed] = []
    for name in sorted(_names(settings.steps)):
        path = settings.steps / f"{LOCK}{name}"
        left = [Freed(path.name, "lock", _size(path))] if path.exists() else []
        with suppress(ConflictError), atomic.lock(path):
            found += [*work.step(name), *left]
            if not (dry_run and left):
                atomic.unlock(path)
    found += _left_releases(settings, dry_run)
    found += _left_residuals(settings, grace, dry_run)
    if settings.lake_url is not None:
        from atlas.pipeline.garbage_lake import collect_lake

        found += collect_lake(settings, grace=grace, dry_run=dry_run)
    return found


def _names(steps: Path) -> set[str]:
    """Every output that something in the folder belongs to."""
    matches = [_HIDDEN.fullmatch(path.name) for path in steps.glob(".*")]
    names = {match[1] for match in matches if match}
    return names | {path.name for path in steps.glob("*") if _FOLDER.fullmatch(path.name)}


class _Work:
    """Decides about one step after another, each while its lock is held."""

    def __init__(self, settings: Settings, grace: float, dry_run: bool) -> None:
        self.settings, self.grace, self.dry_run = settings, grace, dry_run
        self.wanted, self.saes = _wanted(settings), _sae_digests(settings)

    def step(self, name: str) -> list[Freed]:
        """Remove what can go of a step's output and of what lies beside it."""
        output, scratch = self.settings.steps / name, self.settings.steps / f"{SCRATCH}{name}"
        left = sorted(self.settings.steps.glob(f"{WORK_PREFIX}{name}-*"))
        found = [self._remove(path, path.name, "half-written output") for path in left]
        unneeded = name not in self.wanted
        if output.exists() and unneeded and self._old(output) and not self._holds_sae(output):
            found += self._remove_output(output)
        if scratch.exists() and (is_complete(output) or (unneeded and self._old(scratch))):
            found.append(self._remove(scratch, scratch.name, "checkpoint"))
        return found

    def _remove_output(self, output: Path) -> list[Freed]:
        """Set an output aside, ask the runs again, and only then remove it."""
        if self.dry_run:
            return [Freed(output.name, "output", _size(output))]
        aside = atomic.work_path(output)
        output.rename(aside)
        if output.name in _wanted(self.settings):
            aside.rename(output)
            return []
        return [self._remove(aside, output.name, "output")]

    def _remove(self, path: Path, name: str, what: str) -> Freed:
        freed = Freed(name, what, _size(path))
        if not self.dry_run:
            atomic.discard(path)
        return freed

    def _old(self, folder: Path) -> bool:
        newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
        return time.time() - newest > self.grace

    def _holds_sae(self, output: Path) -> bool:
        """Whether a step's output holds weights of an SAE that a release names."""
        return any(tensors_digest(path) in self.saes for path in output.glob(f"*/{WEIGHTS}"))


def _wanted(settings: Settings) -> set[str]:
    """Names of the outputs that runs need."""
    return {f"{kind}-{digest[:16]}" for kind, digest in wanted_outputs(settings)}


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())


def _sae_digests(settings: Settings) -> set[str]:
    """Digests of the SAEs that any version of any release names; with a lake, outputs here are but copies."""
    found: set[str] = set()
    if settings.lake_url is not None:
        return found
    for info in release.list_releases(settings.releases):
        with open_release(info.path) as connection:
            found |= {digest for (digest,) in connection.execute("SELECT digest FROM saes").fetchall()}
    return found


def _left_residuals(settings: Settings, grace: float, dry_run: bool) -> list[Freed]:
    """Residual streams of builds that ended before DFA read them."""
    if not settings.residuals.is_dir():
        return []
    from atlas.sae.cache_folder import unused

    found = unused(settings.residuals, grace, remove=not dry_run)
    return [Freed(folder.name, "residual stream", size) for folder, size in found]


def _left_releases(settings: Settings, dry_run: bool) -> list[Freed]:
    """What a killed ``publish`` left half-written beside the releases; the releases themselves stay."""
    found = []
    for folder in sorted(settings.releases.iterdir()) if settings.releases.is_dir() else ():
        if not any(folder.glob(f"{WORK_PREFIX}*")):
            continue
        with suppress(ConflictError), atomic.lock(folder / ".lock"):
            for path in sorted(folder.glob(f"{WORK_PREFIX}*")):
                found.append(Freed(f"{folder.name}/{path.name}", "half-written release", _size(path)))
                if not dry_run:
                    atomic.discard(path)
    return found
