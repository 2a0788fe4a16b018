"""Releases of the lake as readers and publishers on this machine see them: copied here, checked, bounded.

A reader asks the lake which version is current every ``ATLAS_LAKE_SECONDS`` at most, and keeps what it was
told beside the copies, so that it goes on with a copy while the lake does not answer.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from atlas.errors import StoreError
from atlas.settings import Settings
from atlas.store.atomic import atomic_file, discard, scratch_dir
from atlas.store.build import build_file, read_manifest
from atlas.store.lake.cache import Cache
from atlas.store.lake.errors import LakeError, LakeMissingError, LakeUnreachableError
from atlas.store.lake.folders import file_digest
from atlas.store.lake.opening import lake_url_of
from atlas.store.lake.remote import Remote
from atlas.store.lake.shelf import INDEX, Index, Shelf, Version, parse_index
from atlas.store.lake.waiting import exclusive
from atlas.store.parquet import check_schema
from atlas.store.release import ReleaseInfo, check_name
from atlas.tables import table

log = logging.getLogger("atlas.lake")


class Releases:
    """The releases of one lake and their copies in one home; may be shared by threads."""

    def __init__(self, settings: Settings) -> None:
        self.shelf = Shelf(Remote(*lake_url_of(settings)))
        self.folder, self._seconds = settings.releases, settings.lake_seconds
        self.cache = Cache(settings.local, int(settings.lake_cache_gb * 1e9))
        self._known: dict[str, Index] = {}
        self._asked: dict[str, float] = {}
        self._note = ""
        self._lock = threading.Lock()
        self._coming: set[Path] = set()

    def _look(self, name: str | None, *, fresh: bool = False) -> dict[str, Index]:
        """The index of one release or of all, not older than the settings allow (``fresh``: as it is now)."""
        with self._lock:
            now, key = time.monotonic(), name or ""
            if fresh or now - self._asked.get(key, float("-inf")) >= self._seconds:
                try:
                    self._ask(name)
                    self._note = ""
                except LakeUnreachableError as error:
                    self._recall()
                    if fresh or not any(one.versions for one in self._known.values()):
                        raise
                    log.warning("%s", error)
                    self._note = f"{error}. Shown is what was copied here before."
                self._asked[key] = time.monotonic()
            return {n: i for n, i in self._known.items() if name in (None, n) and i.versions}

    def _ask(self, name: str | None) -> None:
        names = self.shelf.names() if name is None else [name]
        for one in [*names, *(() if name else set(self._known) - set(names))]:
            self._remember(one, self.shelf.index(one) or Index())

    def _remember(self, name: str, index: Index) -> None:
        if self._known.get(name) == index:
            return
        self._known[name] = index
        try:
            with atomic_file(self.folder / name / INDEX) as work:
                work.write_bytes(index.dump())
        except StoreError as error:
            log.warning("%s", error)

    def _recall(self) -> None:
        """What earlier processes were told, for what this one does not know yet."""
        for path in self.folder.glob(f"*/{INDEX}"):
            try:
                self._known.setdefault(path.parent.name, parse_index(path.read_bytes()))
            except (OSError, ValueError):
                continue

    def names(self) -> list[str]:
        """Names of the releases that have a current version."""
        return sorted(name for name, index in self._look(None).items() if index.find(index.current))

    def all(self) -> list[ReleaseInfo]:
        """Every version of every release, by name, then version; nothing is copied."""
        found = sorted(self._look(None, fresh=True).items())
        return [self._info(name, one, index) for name, index in found for one in index.versions]

    def _info(self, name: str, one: Version, index: Index, note: str = "") -> ReleaseInfo:
        path, current = self.folder / name / one.file, one.version == index.current
        return ReleaseInfo(
            name, one.version, path, one.digest, one.created, current, one.bytes, one.rows, note or self._note
        )

    def find(self, asked: str | None, *, fresh: bool = False) -> tuple[str, Version, Index]:
        """Name, version and index of NAME, NAME@VERSION or, for None, the release published last.

        Raises StoreError naming the releases that exist.
        """
        name, _, number = (asked or "").partition("@")
        matches = [
            (key, one, index)
            for key, index in self._look(name or None, fresh=fresh).items()
            for one in index.versions
            if (str(one.version) == number if number else one.version == index.current)
        ]
        if not matches:
            known = ", ".join(self.names()) or "none yet; run: atlas build"
            what = "release" if asked is None else f"release {asked!r}"
            raise StoreError(f"there is no {what} in {self.shelf.remote.url}; existing: {known}")
        return max(matches, key=lambda match: match[1].created)

    def newest(self, asked: str | None = None) -> ReleaseInfo:
        """A release as the lake has it now; its file may not be on this disk."""
        name, version, index = self.find(asked, fresh=True)
        return self._info(name, version, index)

    def current(self, asked: str | None = None, *, wait: bool = True) -> ReleaseInfo:
        """A release with its file on this disk.

        With ``wait`` False a newer version is copied by a thread while an older copy is given. An older copy
        is given also where the lake does not answer; ``note`` says so. Raises StoreError for an unknown
        release, LakeError where there is no copy and none can be made.
        """
        name, version, index = self.find(asked)
        older = self._copied(name, index) if asked is None or "@" not in asked else None
        if not wait and older is not None and not self._is_here(name, version):
            self._bring_later(name, version)
            return self._info(name, older, index, f"Version {version.version} of {name} is being copied.")
        try:
            self._bring(name, version)
        except LakeMissingError:  # it was removed since we were told of it
            name, version, index = self.find(asked, fresh=True)
            self._bring(name, version)
        except LakeUnreachableError as error:
            if older is None:
                raise
            return self._info(name, older, index, f"{error}. Shown is what was copied here before.")
        return self._info(name, version, index)

    def _path(self, name: str, version: Version) -> Path:
        return self.folder / name / version.file

    def _is_here(self, name: str, version: Version) -> bool:
        try:
            return self._path(name, version).stat().st_size == version.bytes
        except OSError:
            return False

    def _copied(self, name: str, index: Index) -> Version | None:
        here = [one for one in index.versions if self._is_here(name, one)]
        return max(here, key=lambda one: one.version, default=None)

    def _bring(self, name: str, version: Version) -> None:
        """Copy a version's file to this disk unless it is here: whole, checked, and within the bound."""
        path = self._path(name, version)
        if not self._is_here(name, version):
            with exclusive(path.with_name(".lock-copying")):
                if not self._is_here(name, version):
                    self._copy(name, version, path)
        self.cache.touch(path)

    def _copy(self, name: str, version: Version, path: Path) -> None:
        self.cache.make_room(version.bytes)
        key = self.shelf.key(name, version.file)
        with atomic_file(path) as work:
            for _ in range(2):  # once more: it may have been the connection
                self.shelf.remote.fetch({key: work})
                if work.stat().st_size == version.bytes and file_digest(work) == version.sha256:
                    break
            else:
                raise LakeError(f"{self.shelf.remote.shown(key)} is damaged; build the release anew")
        self.cache.add(path, version.bytes)

    def _bring_later(self, name: str, version: Version) -> None:
        path = self._path(name, version)
        with self._lock:
            if path in self._coming:
                return
            self._coming.add(path)

        def bring() -> None:
            try:
                self._bring(name, version)
            except StoreError as error:
                log.warning("%s", error)
            finally:
                self._coming.discard(path)

        threading.Thread(target=bring, name=f"copy {path.name}", daemon=True).start()

    def publish(
        self, name: str, tables: Mapping[str, Sequence[Path]], provenance: Mapping[str, str]
    ) -> ReleaseInfo:
        """Build the next version from Parquet parts, upload it and make it current (``release.publish``)."""
        for key, parts in tables.items():
            for part in parts:
                check_schema(Path(part), table(key))
        before = self._look(check_name(name), fresh=True).get(name, Index())
        now = before.find(before.current)
        whole = now is not None and self.shelf.is_whole(name, now)
        created = datetime.now(UTC).isoformat(timespec="microseconds")
        stamp = {"release": name, "release_version": str(before.next), "release_created": created}
        with scratch_dir(self.folder / name / "release") as work:
            path = work / "release.duckdb"
            digest = build_file(path, tables, provenance, stamp)
            if now is not None and whole and now.digest == digest:
                return self._info(name, now, before)
            rows = sum(count for count, _ in read_manifest(path).values())
            size, sha256 = path.stat().st_size, file_digest(path)
            mine = Version(before.next, "", digest, created, size, sha256, rows)
            after = self.shelf.add(name, path, mine, damaged=now.file if now and not whole else "")
            made = after.find(after.current)
            if made is None:
                raise LakeError(f"release {name!r} was removed while it was published; try again")
            if made.sha256 == sha256:
                path.replace(self._path(name, made))
                self.cache.add(self._path(name, made), made.bytes)
        with self._lock:
            self._remember(name, after)
        self.cache.make_room(0)
        return self._info(name, made, after)

    def remove(self, label: str, *, force: bool = False) -> ReleaseInfo:
        """Remove ``NAME@VERSION`` (``release.remove``); copies elsewhere go when they are unused."""
        found = {info.label: info for info in self.all()}
        if label not in found:
            raise StoreError(f"release {label!r} does not exist; existing: {', '.join(found) or 'none'}")
        info = found[label]
        self.shelf.drop(info.name, info.version, force=force)
        discard(info.path)
        self._look(info.name, fresh=True)
        return replace(info, note="")


@lru_cache(maxsize=8)
def releases_of(settings: Settings) -> Releases:
    """The releases of these settings' lake; made once per process, for it remembers what it was told."""
    return Releases(settings)


os.register_at_fork(after_in_child=releases_of.cache_clear)  # locks and connections are not for two processes
