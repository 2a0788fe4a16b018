"""Copies, on this machine, of what lies in the lake: those unused for longest go when the disk gets scarce.

A copy is a folder or a file with a note beside it, ``.copy-NAME``: its bytes, and as time of change when it
was last used. Only what has a note may go, and it has one only once it is in the lake. Steps name the copies
that they work on in a file that they keep locked, so nobody takes those away; the lock ends with the process.
A file that somebody has open stays readable after it went (POSIX), so releases need no such lock; those used
in the last minute stay in any case, for a reader that was given a path and is about to open it.
"""

import fcntl
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from atlas.store.atomic import discard, disk_errors, work_path
from atlas.store.lake.waiting import exclusive

log = logging.getLogger("atlas.lake")

NOTE, HELD = ".copy-", ".held-"
GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Copy:
    """One copy: where it lies, its bytes, when it was last used (seconds since 1970)."""

    path: Path
    size: int
    used: float


def _note_of(path: Path) -> Path:
    return path.with_name(f"{NOTE}{path.name}")


class Cache:
    """The copies below a folder and the most bytes that they may take together."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit
        self._mutex = root / ".lock-copies"

    def copies(self) -> list[Copy]:
        """Every copy, the one unused for longest first."""
        found = []
        for note in [*self.root.glob(f"*/{NOTE}*"), *self.root.glob(f"*/*/{NOTE}*")]:
            try:
                size, used = int(note.read_text("ascii") or 0), note.stat().st_mtime
            except (OSError, ValueError):  # it went meanwhile
                continue
            found.append(Copy(note.with_name(note.name.removeprefix(NOTE)), size, used))
        return sorted(found, key=lambda copy: (copy.used, str(copy.path)))

    def add(self, path: Path, size: int) -> None:
        """Note a copy of so many bytes, which is in the lake."""
        note = _note_of(path)
        work = work_path(note)
        with disk_errors(note):
            work.write_text(str(size), "ascii")
            work.replace(note)

    @staticmethod
    def touch(path: Path) -> None:
        """Note that a copy is used now."""
        try:
            os.utime(_note_of(path))
        except OSError:
            return

    @contextmanager
    def holding(self) -> "Iterator[Held]":
        """A list of copies that stay while the block runs."""
        path = self.root / f"{HELD}{os.getpid()}-{secrets.token_hex(4)}"
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(self._mutex):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield Held(self, descriptor)
        finally:
            discard(path)
            os.close(descriptor)

    def hold(self, descriptor: int, path: Path) -> None:
        """Write a copy's name into an open list of held ones."""
        with exclusive(self._mutex):
            os.write(descriptor, f"{path}\n".encode())
            self.touch(path)

    def _held(self) -> set[Path]:
        """The copies on all lists; lists of processes that are gone are removed."""
        names: set[Path] = set()
        for path in self.root.glob(f"{HELD}*"):
            try:
                with path.open("r+", encoding="utf8") as file:
                    if _is_free(file.fileno()):
                        discard(path)
                    else:
                        names |= {Path(line) for line in file.read().splitlines()}
            except OSError:  # it ended meanwhile
                continue
        return names

    def make_room(self, needed: int) -> None:
        """Take copies away until ``needed`` more bytes fit; a warning if those in use leave too little."""
        gone: list[Path] = []
        with exclusive(self._mutex):
            copies = self.copies()
            total = sum(copy.size for copy in copies) + needed
            if total > self.limit:
                held, recent = self._held(), time.time() - GRACE_SECONDS
                for copy in copies:
                    if total > self.limit and copy.path not in held and copy.used < recent:
                        gone.append(_set_aside(copy.path))
                        total -= copy.size
        for path in gone:
            discard(path)
        if total > self.limit:
            log.warning(
                "copies of the lake in use take %.2f GB; ATLAS_CACHE_GB allows %.2f",
                total / 1e9,
                self.limit / 1e9,
            )


class Held:
    """Copies that stay until the block of ``Cache.holding`` ends."""

    def __init__(self, cache: Cache, descriptor: int) -> None:
        self._cache, self._descriptor = cache, descriptor

    def add(self, path: Path) -> None:
        """Keep this copy, whether it is there already or about to come."""
        self._cache.hold(self._descriptor, path)


def _is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _set_aside(path: Path) -> Path:
    """Rename a copy, which is quick and whole, so that nobody finds half of it while it is deleted."""
    discard(_note_of(path))
    aside = work_path(path)
    try:
        path.rename(aside)
    except OSError:
        return path
    return aside
