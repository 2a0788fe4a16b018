"""Folders in the lake that appear whole or not at all: outputs of steps, imported SAEs.

A folder's files are written under a name of their own, ``<prefix>/<name>/<attempt>/...``; then one small
object, ``<prefix>/<name>/inventory.json``, makes them the folder's: by one conditional write, so of two that
publish at once one wins and the other takes the winner's. What a dead writer left belongs to no inventory
(``orphans``).
"""

import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from atlas.store.atomic import atomic_dir
from atlas.store.lake.errors import LakeError, LakeMissingError
from atlas.store.lake.remote import Remote, Stored

INVENTORY = "inventory.json"


@dataclass(frozen=True)
class Inventory:
    """What a folder in the lake holds: each file's size in bytes and SHA-256, and the name they lie under."""

    attempt: str
    files: dict[str, tuple[int, str]]
    tag: str = ""
    """Of the inventory object, for replacing it."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())

    def dump(self) -> bytes:
        """As it is stored."""
        return json.dumps({"attempt": self.attempt, "files": self.files}, indent=0, sort_keys=True).encode()


@dataclass(frozen=True)
class Entry:
    """A folder in the lake as a listing tells: its bytes and when it was published (seconds since 1970)."""

    name: str
    size: int
    changed: float


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def inventory_of(folder: Path) -> Inventory:
    """A new inventory of a folder on this disk; hidden files are left out."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith("."))
    files = {p.relative_to(folder).as_posix(): (p.stat().st_size, file_digest(p)) for p in found}
    return Inventory(secrets.token_hex(8), files)


def _parse(content: bytes, tag: str) -> Inventory:
    given = json.loads(content)
    files = {str(path): (int(size), str(digest)) for path, (size, digest) in given["files"].items()}
    if any(Path(path).is_absolute() or ".." in Path(path).parts for path in files):
        raise ValueError("a file lies outside")
    return Inventory(str(given["attempt"]), files, tag)


class Folders:
    """The folders below one prefix of the lake."""

    def __init__(self, remote: Remote, prefix: str) -> None:
        self.remote, self.prefix = remote, prefix

    def _inventory(self, name: str) -> str:
        return f"{self.prefix}/{name}/{INVENTORY}"

    def _key(self, name: str, attempt: str, path: str = "") -> str:
        return f"{self.prefix}/{name}/{attempt}/{path}"

    def find(self, name: str) -> Inventory | None:
        """What a folder holds; None if it is not there or its inventory is damaged."""
        found = self.remote.read_tagged(self._inventory(name))
        if found is None:
            return None
        try:
            return _parse(*found)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def is_whole(self, name: str) -> bool:
        """Whether a folder is there with all its files in their sizes."""
        inventory = self.find(name)
        return inventory is not None and self._is_whole(name, inventory)

    def _is_whole(self, name: str, inventory: Inventory) -> bool:
        start = self._key(name, inventory.attempt)
        there = {key.removeprefix(start): stored.size for key, stored in self.remote.listing(start).items()}
        return there == {path: size for path, (size, _) in inventory.files.items()}

    def publish(self, name: str, folder: Path, *, replace: bool = False) -> tuple[Inventory, bool]:
        """Make a folder of this disk the lake's; a whole one that is there stays unless ``replace``.

        Returns the inventory that counts now, and whether the folder has just these files. Raises LakeError
        where an upload was cut short; nothing is published then.
        """
        key, mine = self._inventory(name), inventory_of(folder)
        seen = self.remote.read_tagged(key)
        known = self.find(name) if seen else None
        same = known is not None and known.files == mine.files
        if known is not None and (same or not replace) and self._is_whole(name, known):
            return known, same
        try:
            self.remote.send({self._key(name, mine.attempt, p): folder / p for p in mine.files})
            if not self._is_whole(name, mine):
                raise LakeError(
                    f"{self.remote.shown(self._key(name, mine.attempt))} was cut short; try again"
                )
            won = (
                self.remote.swap(key, mine.dump(), seen[1]) if seen else self.remote.create(key, mine.dump())
            )
        except LakeError:
            with suppress(LakeError):
                self.remote.remove(self._key(name, mine.attempt))
            raise
        lost = known.attempt if won and known is not None else None if won else mine.attempt
        if lost is not None:
            self.remote.remove(self._key(name, lost))
        winner = mine if won else self._winner(name)
        return winner, winner.files == mine.files

    def _winner(self, name: str) -> Inventory:
        found = self.find(name)
        if found is None:
            raise LakeError(f"{self.remote.shown(self._inventory(name))} was removed meanwhile; try again")
        return found

    def fetch(self, name: str, inventory: Inventory, final: Path) -> None:
        """Copy a folder to this disk, where it must not exist, every file checked against its SHA-256.

        Raises LakeError for a damaged file; the folder is then withdrawn, so that it is made anew.
        """
        with atomic_dir(final) as work:
            wrong = self._copy(name, inventory, list(inventory.files), work)
            if wrong:  # once more: it may have been the connection
                wrong = self._copy(name, inventory, wrong, work)
            if wrong:
                self._withdraw(name, inventory)
                where = self.remote.shown(self._key(name, inventory.attempt, wrong[0]))
                raise LakeError(f"{where} is damaged or gone; the next `atlas build` makes it anew")

    def _copy(self, name: str, inventory: Inventory, paths: list[str], work: Path) -> list[str]:
        """Fetch files and return those that are not what was published."""
        try:
            self.remote.fetch({self._key(name, inventory.attempt, path): work / path for path in paths})
        except LakeMissingError:
            return [path for path in paths if not _is(work / path, *inventory.files[path])]
        return [path for path in paths if not _is(work / path, *inventory.files[path])]

    def _withdraw(self, name: str, inventory: Inventory) -> None:
        found = self.find(name)
        if found is not None and found.attempt == inventory.attempt:
            self.remove(name)

    def names(self) -> list[str]:
        """Names of all folders, whole or not."""
        return self.remote.folders(f"{self.prefix}/")

    def entries(self) -> list[Entry]:
        """Every published folder with its bytes and age, by name: what a clean-up chooses from."""
        return [
            Entry(name, sum(s.size for s in found.values()), found[self._inventory(name)].changed)
            for name, found in self._by_name()
            if self._inventory(name) in found
        ]

    def orphans(self, before: float) -> dict[str, int]:
        """Keys and bytes of what dead writers left, all of it written before a time (seconds since 1970).

        Give a time some hours ago: what a writer is just uploading belongs to no inventory either.
        """
        keys: dict[str, int] = {}
        for name, found in self._by_name():
            inventory = self.find(name)
            mine = self._key(name, inventory.attempt) if inventory else None
            rest = {
                key: stored
                for key, stored in found.items()
                if key != self._inventory(name) and not (mine and key.startswith(mine))
            }
            newest: dict[str, float] = {}
            for key, stored in rest.items():
                attempt = key.split("/")[2]
                newest[attempt] = max(newest.get(attempt, 0.0), stored.changed)
            keys |= {key: one.size for key, one in rest.items() if newest[key.split("/")[2]] < before}
        return keys

    def _by_name(self) -> Iterator[tuple[str, dict[str, Stored]]]:
        for name in self.names():
            yield name, self.remote.listing(f"{self.prefix}/{name}/")

    def remove(self, name: str) -> None:
        """Remove a folder: first its inventory, so that nobody finds half of it."""
        self.remote.delete([self._inventory(name)])
        self.remote.remove(f"{self.prefix}/{name}/")


def _is(path: Path, size: int, digest: str) -> bool:
    """Whether a file is there with that size and SHA-256."""
    try:
        return path.stat().st_size == size and file_digest(path) == digest
    except OSError:
        return False
