"""Published releases: one read-only DuckDB file per version, and a small file that says which is current.

``releases/<name>/<name>-v0001.duckdb`` is built under a hidden name and renamed; ``current.json`` is then
replaced in one step. The version is in the file's name because a process that still has the old file open
would see the old data through any new connection to the same name.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from atlas.configs import RELEASE_NAME
from atlas.errors import ConflictError, StoreError
from atlas.store import atomic
from atlas.store.build import build_file, read_manifest, read_provenance
from atlas.store.parquet import check_schema
from atlas.tables import table

_NAME = RELEASE_NAME
_FILE = re.compile(r"(?P<name>.+)-v(?P<version>\d{4,})\.duckdb")
CURRENT = "current.json"


@dataclass(frozen=True)
class ReleaseInfo:
    """One published version of a release."""

    name: str
    version: int
    path: Path
    digest: str
    """SHA-256 over the digests of all tables and the provenance."""
    created: str
    """UTC, ISO 8601."""
    current: bool
    size: int | None = None
    """Bytes of the file, where they are known without it."""
    rows: int | None = None
    """Rows of all tables, where they are known without the file."""
    note: str = ""
    """What a reader should know: that the lake does not answer and this is a copy made before."""

    @property
    def label(self) -> str:
        """Name and version as ``NAME@VERSION``."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class _Pointer:
    file: str
    version: int
    digest: str
    created: str


def check_name(name: str) -> str:
    """The name itself; StoreError unless it is safe as a folder's name."""
    if not _NAME.fullmatch(name):
        raise StoreError(f"release name {name!r} is not allowed; use letters, digits, '.', '_' and '-'")
    return name


def publish(
    releases_dir: Path,
    name: str,
    tables: Mapping[str, Sequence[Path]],
    provenance: Mapping[str, str],
) -> ReleaseInfo:
    """Build the next version of release ``name`` from Parquet parts and make it current.

    A table may have any number of parts in any order; tables without parts exist empty. If the content
    equals the current version's, that is returned and nothing changes. Raises StoreError for an unknown
    table, a part of the wrong shape, a key that occurs twice, or a disk that refuses; ConflictError while
    another process publishes the same name. After an error the old version is untouched.
    """
    for key, parts in tables.items():
        for part in parts:
            check_schema(Path(part), table(key))
    folder = Path(releases_dir) / check_name(name)
    with atomic.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic.lock(folder / ".lock"):
        atomic.sweep(folder)
        pointer = _read_pointer(folder)
        version = 1 + max((v for v, _ in _files(folder)), default=0)
        final = folder / f"{name}-v{version:04d}.duckdb"
        created = datetime.now(UTC).isoformat(timespec="microseconds")
        stamp = {"release": name, "release_version": str(version), "release_created": created}
        with atomic.scratch_dir(final) as work:
            digest = build_file(work / "release.duckdb", tables, provenance, stamp)
            if pointer is not None and pointer.digest == digest and _readable(folder / pointer.file):
                return _info(folder, pointer, current=True)
            atomic.fsync_path(work / "release.duckdb")
            (work / "release.duckdb").replace(final)
        return _point_to(folder, _Pointer(final.name, version, digest, created))


def _readable(path: Path) -> bool:
    """Whether a release file is there and opens; a damaged one is published anew."""
    try:
        return path.is_file() and bool(read_manifest(path))
    except StoreError:
        return False


def _point_to(folder: Path, pointer: _Pointer) -> ReleaseInfo:
    """Make a new file the current one, or take it away again."""
    try:
        _write_pointer(folder, pointer)
    except StoreError:
        atomic.discard(folder / pointer.file)
        raise
    return _info(folder, pointer, current=True)


def current(releases_dir: Path, name: str | None = None) -> ReleaseInfo:
    """The current version of ``name``, or of the most recently published release.

    ``name`` may also be ``NAME@VERSION``. Raises StoreError naming the releases that exist.
    """
    matches = (
        _pinned(releases_dir, name) if name is not None and "@" in name else _currents(releases_dir, name)
    )
    if not matches:
        known = ", ".join(sorted({r.name for r in _currents(releases_dir)})) or "none yet; run: atlas build"
        what = "release" if name is None else f"release {name!r}"
        raise StoreError(f"there is no {what} in {releases_dir}; existing: {known}")
    return max(matches, key=lambda r: r.created)


def _pinned(releases_dir: Path, label: str) -> list[ReleaseInfo]:
    return [r for r in list_releases(releases_dir) if r.label == label]


def _currents(releases_dir: Path, name: str | None = None) -> list[ReleaseInfo]:
    """The current version of each release (of one), told from the pointers alone."""
    found = []
    for folder in _folders(Path(releases_dir)):
        pointer = _read_pointer(folder) if name in (None, folder.name) else None
        if pointer is not None and (folder / pointer.file).is_file():
            found.append(_info(folder, pointer, current=True))
    return found


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if p.is_dir() and _NAME.fullmatch(p.name))


def list_releases(releases_dir: Path) -> list[ReleaseInfo]:
    """Every version of every release, by name, then version."""
    found = []
    for folder in _folders(Path(releases_dir)):
        pointer = _read_pointer(folder)
        for version, path in _files(folder):
            if pointer is not None and pointer.version == version:
                found.append(_info(folder, pointer, current=True))
            else:
                found.append(_info(folder, _stored_pointer(path, version), current=False))
    return found


def remove(releases_dir: Path, label: str, *, force: bool = False) -> ReleaseInfo:
    """Remove ``NAME@VERSION``; the current version only with ``force``.

    After a forced removal the newest version left becomes current. Raises StoreError for an unknown
    version, ConflictError for the current one without ``force``.
    """
    folder = _find(list_releases(releases_dir), label).path.parent
    with atomic.lock(folder / ".lock"):
        # Looked at again: another process may have published or removed meanwhile.
        found = list_releases(releases_dir)
        match = _find(found, label)
        if match.current and not force:
            raise ConflictError(f"release {label} is the current one; remove it with --force")
        if match.current:
            left = [r for r in found if r.name == match.name and r.version != match.version]
            if left:
                newest = max(left, key=lambda r: r.version)
                _write_pointer(folder, _stored_pointer(newest.path, newest.version))
            else:
                atomic.discard(folder / CURRENT)
        with atomic.disk_errors(match.path):
            match.path.unlink(missing_ok=True)
    return match


def _find(found: Sequence[ReleaseInfo], label: str) -> ReleaseInfo:
    for info in found:
        if info.label == label:
            return info
    known = ", ".join(r.label for r in found) or "none"
    raise StoreError(f"release {label!r} does not exist; existing: {known}")


def _files(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for path in folder.glob(f"{folder.name}-v*.duckdb"):
        match = _FILE.fullmatch(path.name)
        if match and match["name"] == folder.name:
            found.append((int(match["version"]), path))
    return sorted(found)


def _read_pointer(folder: Path) -> _Pointer | None:
    path = folder / CURRENT
    try:
        pointer = _Pointer(**json.loads(path.read_text("utf-8")))
        kinds = (str, int, str, str)
        values = (pointer.file, pointer.version, pointer.digest, pointer.created)
        if not all(isinstance(v, k) for v, k in zip(values, kinds, strict=True)):
            raise ValueError("a value has another type than it should")
        if not _FILE.fullmatch(pointer.file) or "/" in pointer.file:
            raise ValueError(f"file {pointer.file!r} is no release file")
        return pointer
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"cannot read {path}: {' '.join(str(error).split())}") from None


def _write_pointer(folder: Path, pointer: _Pointer) -> None:
    with atomic.atomic_file(folder / CURRENT) as work:
        work.write_text(json.dumps(asdict(pointer), indent=1) + "\n", "utf-8")


def _stored_pointer(path: Path, version: int) -> _Pointer:
    stored = read_provenance(path)
    return _Pointer(path.name, version, stored["release_digest"], stored["release_created"])


def _info(folder: Path, pointer: _Pointer, *, current: bool) -> ReleaseInfo:
    return ReleaseInfo(
        folder.name, pointer.version, folder / pointer.file, pointer.digest, pointer.created, current
    )
