"""States of trainings in the lake, so that another machine goes on where a dead one stopped.

While a step works, a thread uploads what it saved (``*.safetensors`` in its scratch folder, which appear by a
rename) every ``ATLAS_LAKE_SECONDS``, or less often where an upload takes longer than a fifth of the time.
``scratch/<step>/state.json`` names the files of the newest upload. It is written last and the last writer
wins: every state is a true one, so a worker that was given up for dead and writes late costs time and nothing
else.
"""

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from atlas.errors import StoreError
from atlas.store.atomic import atomic_file, disk_errors, scratch_dir
from atlas.store.lake.errors import LakeError
from atlas.store.lake.folders import Entry, file_digest
from atlas.store.lake.remote import Remote

log = logging.getLogger("atlas.lake")

PREFIX, STATE, FILES = "scratch", "state.json", "*.safetensors"
PATIENCE = 4
"""Times as long as the last upload took is waited before the next."""


Stamp: TypeAlias = list[tuple[str, int]]
"""Names and times of change of what a step saved."""


@dataclass(frozen=True)
class _File:
    size: int
    digest: str
    saved: int


class States:
    """What unfinished steps saved, by the name of their output."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote

    def _key(self, name: str, *rest: str) -> str:
        return "/".join((PREFIX, name, *rest))

    def _read(self, name: str) -> tuple[str, dict[str, _File]] | None:
        content = self.remote.read(self._key(name, STATE))
        if content is None:
            return None
        try:
            given = json.loads(content)
            files = {str(file): _File(*values) for file, values in given["files"].items()}
            return str(given["attempt"]), files
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def restore(self, name: str, scratch: Path) -> bool:
        """Fetch the saved state into a scratch folder, unless what is there is newer; whether it did.

        A state that is damaged or just being replaced is left where it is: the step begins anew.
        """
        found = self._read(name)
        if found is None:
            return False
        attempt, files = found
        done = False
        for file, known in files.items():
            path = scratch / file
            if "/" in file or (path.exists() and path.stat().st_mtime_ns >= known.saved):
                continue
            try:
                with atomic_file(path) as work:
                    self.remote.fetch({self._key(name, attempt, file): work})
                    if work.stat().st_size != known.size or file_digest(work) != known.digest:
                        raise LakeError(f"{self.remote.shown(self._key(name, attempt, file))} is damaged")
                    os.utime(work, ns=(known.saved, known.saved))
                done = True
            except LakeError as error:
                log.warning("the saved state of %s cannot be used: %s", name, error)
        return done

    def save(self, name: str, scratch: Path) -> None:
        """Upload what a step saved; then what was there before goes."""
        attempt = secrets.token_hex(8)
        before = self._read(name)
        with scratch_dir(scratch / "upload") as work:
            with disk_errors(scratch):
                for path in scratch.glob(FILES):
                    # A second name: the step may put a newer file in the place of the first at any moment.
                    (work / path.name).hardlink_to(path)
            paths = sorted(work.iterdir())
            files = {p.name: (p.stat().st_size, file_digest(p), p.stat().st_mtime_ns) for p in paths}
            self.remote.send({self._key(name, attempt, path.name): path for path in paths})
        self.remote.write(self._key(name, STATE), json.dumps({"attempt": attempt, "files": files}).encode())
        if before is not None:
            self.remote.remove(self._key(name, before[0], ""))

    def clear(self, name: str) -> None:
        """Remove what a finished step saved."""
        self.remote.delete([self._key(name, STATE)])
        self.remote.remove(self._key(name, ""))

    def entries(self) -> list[Entry]:
        """Every state with its bytes and when it was last written."""
        found = []
        for name in self.names():
            listing = self.remote.listing(self._key(name, ""))
            if listing:
                size, changed = (
                    sum(s.size for s in listing.values()),
                    max(s.changed for s in listing.values()),
                )
                found.append(Entry(name, size, changed))
        return found

    def names(self) -> list[str]:
        """Steps that left a state."""
        return self.remote.folders(f"{PREFIX}/")

    @contextmanager
    def following(self, name: str, scratch: Path, seconds: float) -> Iterator[None]:
        """Fetch the state of an unfinished step, and upload it while the block works.

        When the block ends well, the state is cleared; when it fails, the last upload stays.
        """
        self.restore(name, scratch)
        stop, arguments = threading.Event(), (name, scratch, seconds, _stamp(scratch))
        work = threading.Thread(
            target=self._follow, args=(*arguments, stop), name=f"lake {name}", daemon=True
        )
        work.start()
        try:
            yield
        finally:
            stop.set()
        work.join()
        with suppress(LakeError):
            self.clear(name)

    def _follow(
        self, name: str, scratch: Path, seconds: float, uploaded: Stamp, stop: threading.Event
    ) -> None:
        pause = seconds
        while not stop.wait(max(pause, 0.05)):
            stamp = _stamp(scratch)
            if stamp == uploaded:
                continue
            began = time.monotonic()
            try:
                self.save(name, scratch)
                uploaded = stamp
            except (StoreError, OSError) as error:
                log.warning("the state of %s was not uploaded: %s", name, error)
            pause = max(seconds, PATIENCE * (time.monotonic() - began))


def _stamp(scratch: Path) -> Stamp:
    """Changes with every file that a step saves."""
    found = []
    for path in sorted(scratch.glob(FILES)):
        with suppress(OSError):
            found.append((path.name, path.stat().st_mtime_ns))
    return found
