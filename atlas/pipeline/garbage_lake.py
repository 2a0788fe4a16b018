"""What may go from the lake: outputs and states that no run needs, and what dead writers left.

The same rules as for folders (:mod:`atlas.pipeline.garbage`), except that outputs with weights of SAEs always
stay: to know whether a release names them, every release and every SAE would have to be copied here. An
output is removed under the lock that its step would take. A database without runs is not the one that this
lake is used with, and says nothing of what is needed: then only what dead writers left goes.
"""

import time
from collections import defaultdict
from contextlib import suppress

from atlas.db.locks import locked
from atlas.db.runs import wanted_outputs
from atlas.errors import ConflictError
from atlas.pipeline.garbage import Freed
from atlas.sae.library import WEIGHTS
from atlas.settings import Settings
from atlas.store.lake.lake import Lake

LEAST_SECONDS = 3600.0
"""Uploads under way belong to nothing yet; what is younger stays, whatever the grace."""


def collect_lake(settings: Settings, *, grace: float, dry_run: bool = False) -> list[Freed]:
    """Remove what nothing needs from the lake; ``grace`` in seconds is how old it has to be."""
    lake, before = Lake(settings), time.time() - grace
    wanted = {f"{kind}-{digest[:16]}" for kind, digest in wanted_outputs(settings)}
    left = _left(lake, time.time() - max(grace, LEAST_SECONDS), dry_run)
    if not wanted:
        return left
    found = []
    for entry in lake.steps.entries():
        if entry.name in wanted or entry.changed >= before or _holds_sae(lake, entry.name):
            continue
        if dry_run or _removed(settings, lake, entry.name):
            found.append(Freed(entry.name, "output", entry.size))
    for entry in lake.states.entries():
        if entry.name in wanted or entry.changed >= before:
            continue
        found.append(Freed(entry.name, "checkpoint", entry.size))
        if not dry_run:
            lake.states.clear(entry.name)
    return found + left


def _holds_sae(lake: Lake, name: str) -> bool:
    inventory = lake.steps.find(name)
    return inventory is not None and any(path.endswith(f"/{WEIGHTS}") for path in inventory.files)


def _removed(settings: Settings, lake: Lake, name: str) -> bool:
    """Remove an output unless somebody makes it, or a run has come to need it, just now."""
    with suppress(ConflictError), locked(settings, f"step {name}"):
        if name not in {f"{kind}-{digest[:16]}" for kind, digest in wanted_outputs(settings)}:
            lake.steps.remove(name)
            return True
    return False


def _left(lake: Lake, before: float, dry_run: bool) -> list[Freed]:
    """What dead writers left, by the folder that it was meant for."""
    sizes: dict[str, int] = defaultdict(int)
    orphans = lake.orphans(before)
    for key, size in orphans.items():
        sizes["/".join(key.split("/")[:2])] += size
    if not dry_run:
        lake.delete(list(orphans))
    return [Freed(name, "half-written upload", size) for name, size in sorted(sizes.items())]
