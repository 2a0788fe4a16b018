"""Releases in the lake: one small object per name says which versions there are and which is current.

``releases/<name>/index.json`` is replaced by a conditional write after a version's file was uploaded, so a
reader sees the old or the new current version and never half of one. Publishing, removing and choosing the
current version are each one such write; who loses it reads the index again.
"""

import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from atlas.errors import ConflictError, StoreError
from atlas.store.lake.errors import LakeError
from atlas.store.lake.remote import Remote

PREFIX, INDEX = "releases", "index.json"
TRIES = 10


@dataclass(frozen=True)
class Version:
    """One version of a release: its file in the lake, what it holds and how to check it."""

    version: int
    file: str
    digest: str
    """Of the content: over tables and provenance."""
    created: str
    bytes: int
    sha256: str
    """Of the file."""
    rows: int


@dataclass(frozen=True)
class Index:
    """All versions of a release, oldest first, and the number of the current one."""

    current: int | None = None
    versions: tuple[Version, ...] = ()

    def find(self, version: int | None) -> Version | None:
        """The version of that number."""
        return next((one for one in self.versions if one.version == version), None)

    @property
    def next(self) -> int:
        """The number that a new version gets."""
        return 1 + max((one.version for one in self.versions), default=0)

    def with_version(self, new: Version) -> "Index":
        """With a new version, which is the current one.

        >>> version = Version(1, "a-v0001.duckdb", "d", "2026-01-01", 10, "s", 3)
        >>> Index().with_version(version).current
        1
        """
        return Index(new.version, (*self.versions, new))

    def without(self, version: int) -> "Index":
        """Without a version; if it was the current one, the newest that is left becomes current."""
        left = tuple(one for one in self.versions if one.version != version)
        current = self.current if self.current != version else left[-1].version if left else None
        return Index(current, left)

    def dump(self) -> bytes:
        """As it is stored."""
        return json.dumps(asdict(self), indent=1).encode()


def parse_index(content: bytes) -> Index:
    """An index as it was stored; ValueError for anything else.

    >>> parse_index(Index().dump()) == Index()
    True
    >>> parse_index(b"[]")
    Traceback (most recent call last):
    ...
    ValueError: no index of a release
    """
    try:
        given = json.loads(content)
        versions = tuple(Version(**one) for one in given["versions"])
        if any("/" in one.file or one.file.startswith(".") for one in versions):
            raise ValueError("a file lies outside")
        return Index(given["current"], versions)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("no index of a release") from error


class Shelf:
    """The releases of a lake."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote

    @staticmethod
    def key(name: str, file: str) -> str:
        """Where a file of a release lies."""
        return f"{PREFIX}/{name}/{file}"

    def names(self) -> list[str]:
        """Names of all releases, also of those whose versions were all removed."""
        return self.remote.folders(f"{PREFIX}/")

    def index(self, name: str) -> Index | None:
        """What there is of a release; None if there never was one of that name."""
        content = self.remote.read(self.key(name, INDEX))
        return None if content is None else self._parse(name, content)

    def _parse(self, name: str, content: bytes) -> Index:
        try:
            return parse_index(content)
        except ValueError as error:
            raise StoreError(f"{self.remote.shown(self.key(name, INDEX))} is damaged: {error}") from None

    def change(self, name: str, how: Callable[[Index], Index]) -> Index:
        """Replace the index by what ``how`` makes of it, again if somebody else changed it meanwhile."""
        key = self.key(name, INDEX)
        for _ in range(TRIES):
            found = self.remote.read_tagged(key)
            before = self._parse(name, found[0]) if found else Index()
            after = how(before)
            if after == before and found:
                return after
            if (
                self.remote.swap(key, after.dump(), found[1])
                if found
                else self.remote.create(key, after.dump())
            ):
                return after
        raise ConflictError(f"{self.remote.shown(key)} is changed by others all the time; try again later")

    def is_whole(self, name: str, version: Version) -> bool:
        """Whether a version's file is there in its size."""
        stored = self.remote.listing(f"{PREFIX}/{name}/").get(self.key(name, version.file))
        return stored is not None and stored.size == version.bytes

    def add(self, name: str, path: Path, version: Version, *, damaged: str = "") -> Index:
        """Upload a version's file and make it the current one.

        If the current one has the same digest, that stays, unless its file is the damaged one.
        ConflictError if the version's number was taken meanwhile.
        """
        file = f"{name}-v{version.version:04d}-{secrets.token_hex(4)}.duckdb"
        self._send(name, path, file, version.bytes)

        def put(index: Index) -> Index:
            now = index.find(index.current)
            if now is not None and now.digest == version.digest and now.file not in (file, damaged):
                return index
            if index.find(version.version) is not None:
                raise ConflictError(f"version {version.version} of release {name!r} was just published")
            return index.with_version(replace(version, file=file))

        try:
            index = self.change(name, put)
        except Exception:
            self._forget(name, file)
            raise
        if all(one.file != file for one in index.versions):
            self._forget(name, file)
        return index

    def _send(self, name: str, path: Path, file: str, size: int) -> None:
        key = self.key(name, file)
        try:
            self.remote.send({key: path})
            there = self.remote.listing(f"{PREFIX}/{name}/").get(key)
            if there is None or there.size != size:
                raise LakeError(f"{self.remote.shown(key)} was cut short; try again")
        except LakeError:
            self._forget(name, file)
            raise

    def _forget(self, name: str, file: str) -> None:
        try:
            self.remote.delete([self.key(name, file)])
        except LakeError:
            return  # the clean-up finds it: no index names it

    def drop(self, name: str, version: int, *, force: bool) -> Version:
        """Remove a version: from the index, then its file; the current one only with ``force``."""
        found: list[Version] = []

        def take(index: Index) -> Index:
            known = index.find(version)
            if known is None:
                raise StoreError(f"release '{name}@{version}' does not exist")
            if index.current == version and not force:
                raise ConflictError(f"release {name}@{version} is the current one; remove it with --force")
            found[:] = [known]
            return index.without(version)

        self.change(name, take)
        self._forget(name, found[0].file)
        return found[0]

    def orphans(self, before: float) -> dict[str, int]:
        """Keys and bytes of files that no index names, written before a time (seconds since 1970)."""
        keys: dict[str, int] = {}
        for name in self.names():
            listing = self.remote.listing(f"{PREFIX}/{name}/")
            index = self.index(name) or Index()
            named = {self.key(name, INDEX), *(self.key(name, one.file) for one in index.versions)}
            keys |= {k: one.size for k, one in listing.items() if k not in named and one.changed < before}
        return keys
