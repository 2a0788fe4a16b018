"""The folder of one activation cache: which blocks it holds, and room for more within a bound.

    ROOT/.lock               held for moments, by who counts bytes, makes room or renames
    ROOT/KEY.lock            shared by all who use the cache KEY; whoever takes it alone may delete the cache
    ROOT/KEY/about.json      what decides the values; its time says when the cache was last used
    ROOT/KEY/NAME.acts       a shard
    ROOT/KEY/.work-...       a shard being written, at its full size, locked by its writer

The bound covers the root: a shard that does not fit first evicts other caches that nobody uses, those
unused for longest first, and is then refused.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from atlas.errors import ConflictError, StoreError
from atlas.sae.cache_files import SUFFIX, DamagedShardError, Shard
from atlas.sites import Site
from atlas.store.atomic import WORK_PREFIX, atomic_file, discard, disk_errors, lock, work_path

ABOUT = "about.json"
PATIENCE = 5.0
"""Seconds to wait for the root's lock, which is held for moments."""


class Room(NamedTuple):
    """A file of the right size under a temporary name, open and locked."""

    path: Path
    descriptor: int


class Reading(NamedTuple):
    """Rows of a shard and their places in what was asked for."""

    shard: Shard
    rows: np.ndarray
    at: np.ndarray


class CacheFolder:
    """The shards of one cache that hold any of ``sites``; ``about`` says what decides their values."""

    def __init__(
        self, root: Path, about: Mapping[str, object], sites: Sequence[Site], d_in: Callable[[Site], int]
    ) -> None:
        text = json.dumps(about, sort_keys=True)
        self.root, self.sites, self.d_in = root, frozenset(sites), d_in
        self.context, self.dtype = int(str(about["context"])), str(about["dtype"])
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._known: set[str] = set()
        self._holding: dict[int, list[tuple[Shard, int]]] = {}
        with disk_errors(self.folder):
            root.mkdir(parents=True, exist_ok=True)
            self._in_use = os.open(self.use_lock(self.folder), os.O_RDWR | os.O_CREAT, 0o644)
            weakref.finalize(self, os.close, self._in_use)
            _wait(lambda: fcntl.flock(self._in_use, fcntl.LOCK_SH | fcntl.LOCK_NB))
            self.folder.mkdir(exist_ok=True)
            if not (self.folder / ABOUT).exists():
                with atomic_file(self.folder / ABOUT) as work:
                    work.write_text(text, encoding="utf8")
            os.utime(self.folder / ABOUT)
        self.dropped: list[str] = []
        self.refresh()

    @staticmethod
    def use_lock(folder: Path) -> Path:
        """The file of a cache's lock, beside its folder."""
        return folder.with_name(folder.name + ".lock")

    def refresh(self) -> bool:
        """Look for shards that came since the last time; whether there were any."""
        names = [name for name in _listed(self.folder) if name.endswith(SUFFIX) and name not in self._known]
        for name in names:
            self._known.add(name)
            try:
                self._add(Shard(self.folder / name, self.d_in, self.context, self.dtype))
            except DamagedShardError as error:
                self._discard(self.folder / name, error)
            except OSError:  # gone, or not for us to read: the model is asked
                continue
        return bool(names)

    def _add(self, shard: Shard) -> None:
        if self.sites.intersection(shard.sites):
            for row, block in enumerate(shard.blocks):
                self._holding.setdefault(block, []).append((shard, row))

    def find(self, blocks: Sequence[int]) -> tuple[list[Reading], dict[int, frozenset[Site]]]:
        """Where the blocks are, and for each that is not whole here the sites that are missing."""
        readings, missing = self._find(blocks)
        if missing and self.refresh():
            readings, missing = self._find(blocks)
        return readings, missing

    def _find(self, blocks: Sequence[int]) -> tuple[list[Reading], dict[int, frozenset[Site]]]:
        rows: dict[Shard, list[tuple[int, int]]] = {}
        missing: dict[int, frozenset[Site]] = {}
        for place, block in enumerate(blocks):
            need = self.sites
            for shard, row in self._holding.get(block, ()):
                if need.intersection(shard.sites):
                    rows.setdefault(shard, []).append((row, place))
                    need = need.difference(shard.sites)
            if need:
                missing[block] = need
        found = [Reading(shard, *np.array(pairs).T) for shard, pairs in rows.items()]
        return found, missing

    def drop(self, shard: Shard, error: Exception) -> None:
        """Forget a shard that cannot be read; delete it if it is damaged."""
        for block in shard.blocks:
            self._holding[block] = [pair for pair in self._holding[block] if pair[0] is not shard]
        if isinstance(error, DamagedShardError):
            self._discard(shard.path, error)

    def _discard(self, path: Path, error: Exception) -> None:
        discard(path)
        self.dropped.append(str(error))
        if not path.exists():
            self._known.discard(path.name)

    def remove(self, blocks: range) -> None:
        """Delete the shards that hold some of these blocks and no other; with the last one, the folder."""
        shards = {shard for pairs in self._holding.values() for shard, _ in pairs}
        for shard in [shard for shard in shards if set(shard.blocks) <= set(blocks)]:
            discard(shard.path)
            for block in shard.blocks:
                self._holding[block] = [pair for pair in self._holding[block] if pair[0] is not shard]
        if any(name.endswith(SUFFIX) for name in _listed(self.folder)):
            return
        with suppress(OSError):  # others use it
            try:
                fcntl.flock(self._in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(self.folder)
            finally:
                fcntl.flock(self._in_use, fcntl.LOCK_SH)

    def has_room(self, size: int, limit: int) -> bool:
        """Whether so many bytes fit under the bound of all caches; others that nobody uses are evicted."""
        with self._locked():
            sizes = _sizes(self.root)
            self._evict(sizes, size, limit)
            return sum(sizes.values()) + size <= limit

    def reserve(self, name: str, size: int, limit: int) -> Room | None:
        """Room for a shard, or None where the bound is reached."""
        with self._locked():
            sizes = _sizes(self.root)
            self._evict(sizes, size, limit)
            if sum(sizes.values()) + size > limit:
                return None
            path = work_path(self.folder / name)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(descriptor, size)
            except OSError:
                discard(path)
                os.close(descriptor)
                raise
            return Room(path, descriptor)

    def publish(self, room: Room, name: str) -> None:
        """Show a written shard under its name. Not flushed: what a power cut spoils, its digests show."""
        with self._locked():
            room.path.replace(self.folder / name)

    def _evict(self, sizes: dict[Path, int], size: int, limit: int) -> None:
        """Delete half-written shards of dead writers, then unused caches as far as the bound asks."""
        for path in [p for p in sizes if p.name.startswith(WORK_PREFIX) and _abandoned(p)]:
            discard(path)
            del sizes[path]
        if sum(n for path, n in sizes.items() if path.parent == self.folder) + size > limit:
            return  # emptying the other caches would not help
        others = sorted({path.parent for path in sizes} - {self.folder}, key=_last_used)
        for folder in others:
            if sum(sizes.values()) + size <= limit:
                return
            with suppress(ConflictError), lock(self.use_lock(folder)):
                shutil.rmtree(folder, ignore_errors=True)
                for path in [p for p in sizes if p.parent == folder and not p.exists()]:
                    del sizes[path]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with ExitStack() as stack:
            _wait(lambda: stack.enter_context(lock(self.root / ".lock")))
            yield


def held_bytes(root: Path) -> int:
    """Bytes of all caches there."""
    return sum(_sizes(root).values())


def unused(root: Path, seconds: float, *, remove: bool) -> Iterator[tuple[Path, int]]:
    """The caches that nobody uses or has used for so long, and their bytes; taken away with ``remove``."""
    for about in sorted(root.glob(f"*/{ABOUT}")):
        folder = about.parent
        if time.time() - _last_used(folder) <= seconds:
            continue
        with suppress(ConflictError), lock(CacheFolder.use_lock(folder)):
            size = sum(n for path, n in _sizes(root).items() if path.parent == folder)
            if remove:
                shutil.rmtree(folder, ignore_errors=True)
            yield folder, size


def _wait(take: Callable[[], object]) -> None:
    """Try to take a lock that is held for moments."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            take()
            return
        except (ConflictError, BlockingIOError) as error:
            if time.monotonic() > until:
                raise StoreError(f"the activation cache is locked for {PATIENCE:g} s: {error}") from None
            time.sleep(0.01)


def _listed(folder: Path) -> list[str]:
    """Sorted names in a folder; none if it is gone."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _sizes(root: Path) -> dict[Path, int]:
    """Bytes of every shard of every cache, finished or not."""
    sizes = {}
    for path in [*root.glob(f"*/*{SUFFIX}"), *root.glob(f"*/{WORK_PREFIX}*{SUFFIX}-*")]:
        with suppress(OSError):
            sizes[path] = path.stat().st_size
    return sizes


def _last_used(folder: Path) -> float:
    try:
        return (folder / ABOUT).stat().st_mtime
    except OSError:
        return 0.0


def _abandoned(path: Path) -> bool:
    """Whether the process that wrote a half-written shard is gone: its lock went with it."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)
