"""The library of imported SAEs: one folder each in ``$ATLAS_HOME/saes``, as ``atlas.sae.files`` writes them.

No torch here: a build plan needs only names, sites and digests.
"""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from atlas.errors import AtlasError, SAEError
from atlas.sites import Site
from atlas.store.atomic import WORK_PREFIX, discard

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
NOTE = "digest.json"
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_NAME = re.compile(f"{_PART}/{_PART}")


class Imported(NamedTuple):
    """An SAE of the library; ``digest`` is over both files, ``source`` says which file it was read from."""

    name: str
    path: Path
    digest: str
    site: Site
    d_in: int
    d_sae: int
    model: str
    processing: str
    architecture: str
    source: str


def library(home: Path) -> Path:
    """The library's folder below ``$ATLAS_HOME``."""
    return home / "saes"


def folder_of(home: Path, name: str) -> Path:
    """Where the SAE of that name lies, whether it is there or not; SAEError for a name that cannot be one.

    >>> folder_of(Path("/h"), "gpt2/L05.z.relu-49152-kissane").name
    'gpt2+L05.z.relu-49152-kissane'
    """
    if not _NAME.fullmatch(name):
        raise SAEError(
            f"SAE name {name[:120]!r} is not allowed; write MODEL/NAME in letters, digits, '.', '_' and '-', "
            "such as gpt2/L05.z.mine"
        )
    return library(home) / name.replace("/", "+")


def imported_names(home: Path) -> list[str]:
    """Names of everything in the library, readable or damaged."""
    root = library(home)
    if not root.is_dir():
        return []
    names = (path.name.replace("+", "/") for path in root.iterdir() if path.is_dir())
    return sorted(name for name in names if not name.startswith(WORK_PREFIX) and _NAME.fullmatch(name))


def find_imported(home: Path, name: str) -> Imported:
    """The imported SAE of that name.

    Raises:
        SAEError: the library has none of that name, which lists what there is, or its files are damaged.
    """
    path = folder_of(home, name)
    if not path.is_dir():
        there = imported_names(home)
        listed = f"; there are: {', '.join(there)}" if there else " yet; see `atlas import`"
        raise SAEError(f"no imported SAE is called {name!r} in {library(home)}{listed}")
    return _read(name, path)


def list_imported(home: Path) -> list[Imported]:
    """Everything in the library, by name; SAEError if one of them is damaged."""
    return [find_imported(home, name) for name in imported_names(home)]


def remove_imported(home: Path, name: str) -> None:
    """Remove an SAE, readable or damaged; SAEError if the library has none of that name."""
    path = folder_of(home, name)
    if not path.is_dir():
        find_imported(home, name)
    discard(path)
    if path.exists():
        raise SAEError(f"SAE {name!r} cannot be removed: no permission to change {path}")


def folder_digest(path: Path) -> str:
    """SHA-256 over both files of an SAE's folder; SAEError if one is missing.

    A digest noted when the files were written is believed while their sizes and times are the same.
    """
    known = noted(path)
    try:
        stamp = _stamp(path)
        same = known.get("stamp") == [list(item[1:]) for item in stamp]
        return str(known["digest"]) if same else _digest(stamp)
    except OSError as error:
        raise SAEError(f"SAE in {str(path)!r} cannot be read: {error.strerror}: {error.filename}") from None


def noted(path: Path) -> dict[str, Any]:
    """What was noted beside an SAE; nothing where the note is missing or damaged."""
    try:
        found = json.loads((path / NOTE).read_text(encoding="utf8"))
        whole = isinstance(found["digest"], str) and isinstance(found["source"], str)
        return found if whole else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def note_digest(path: Path, source: str = "") -> None:
    """Write the digest of a folder's files, and where they came from, beside them."""
    stamp = _stamp(path)
    note = {"digest": _digest(stamp), "stamp": [list(item[1:]) for item in stamp], "source": source}
    (path / NOTE).write_text(json.dumps(note), encoding="utf8")


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    files = (path / CONFIG, path / WEIGHTS)
    return tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)


@lru_cache(maxsize=1024)
def _digest(stamp: tuple[tuple[str, int, int], ...]) -> str:
    """The stamp only saves hashing the same files twice."""
    total = hashlib.sha256()
    for name, _, _ in stamp:
        with Path(name).open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


def _read(name: str, path: Path) -> Imported:
    digest = folder_digest(path)
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf8"))
        known = config["metadata"]["head_atlas"]
        site = Site.parse(known["site"])
        sizes = int(config["d_in"]), int(config["d_sae"])
        words = tuple(str(known[key]) for key in ("model", "processing", "architecture"))
    except (OSError, ValueError, KeyError, TypeError, AtlasError) as error:
        raise SAEError(f"imported SAE {name!r} is damaged ({CONFIG}: {error!r}); import it again") from None
    model, processing, architecture = words
    source = noted(path).get("source", "")
    return Imported(name, path, digest, site, *sizes, model, processing, architecture, source)
