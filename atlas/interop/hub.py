"""SAEs on the Hugging Face hub: what a repository holds, and its files, downloaded so that they go on.

A file is written to a ``.part`` beside its final name and named by its content, so a download that was
stopped, by Ctrl-C or with the machine, goes on where it was, and a file that changed on the hub starts anew.
What arrives is checked against the hub's own digest of it.
"""

import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from atlas.errors import AtlasError, SAEError
from atlas.store.atomic import disk_errors

PREFIX = "hf:"
_REPO = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((?:/[^/]+)*)/?")
Progress = Callable[[int], None]
"""Called with the number of bytes that have just arrived."""


class HubFolder(NamedTuple):
    """A model repository of the hub, or a folder of it."""

    repo: str
    folder: str

    @property
    def name(self) -> str:
        """As the user writes it."""
        return PREFIX + "/".join(part for part in (self.repo, self.folder) if part)


class HubFile(NamedTuple):
    """A file on the hub, with what names its content: SHA-256 for large files, git's SHA-1 for others."""

    path: str
    size: int
    digest: str


def hub_folder(text: str) -> HubFolder:
    """Read ``hf:OWNER/REPO[/FOLDER]``.

    >>> hub_folder("hf:fnlp/some-saes/L5R")
    HubFolder(repo='fnlp/some-saes', folder='L5R')
    """
    match = _REPO.fullmatch(text.removeprefix(PREFIX))
    if not text.startswith(PREFIX) or match is None or ".." in text:
        raise SAEError(
            f"hub id {text[:200]!r} cannot be read; write it like hf:OWNER/REPO or hf:OWNER/REPO/FOLDER"
        )
    return HubFolder(match[1], match[2].strip("/"))


def list_files(place: HubFolder) -> dict[str, HubFile]:
    """The files of a hub folder by their path below it.

    Raises:
        SAEError: the hub cannot be reached, or has no such repository or folder.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile

    _quiet()
    cut = len(place.folder) + 1 if place.folder else 0
    try:
        api = HfApi(endpoint=constants.ENDPOINT)
        entries = list(api.list_repo_tree(place.repo, place.folder or None, recursive=True))
    except Exception as error:  # noqa: BLE001 - the libraries underneath raise dozens of types
        raise unreachable(place.name, error) from None
    files = (entry for entry in entries if isinstance(entry, RepoFile))
    return {f.path[cut:]: HubFile(f.path, f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in files}


def _quiet() -> None:
    """No bars and no warnings of the library's own: what is said is said here."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def unreachable(what: str, error: Exception) -> SAEError:
    """One line about what the hub could not give and why."""
    from huggingface_hub import constants

    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return SAEError(f"{what} cannot be had from {constants.ENDPOINT}: {reason}")


def missing_bytes(file: HubFile, target: Path) -> int:
    """How much of a file is still to be downloaded."""
    if target.is_file():
        return 0
    part = part_of(file, target)
    return max(file.size - (part.stat().st_size if part.is_file() else 0), 0)


def part_of(file: HubFile, target: Path) -> Path:
    """Where a file lies while it is on its way."""
    return target.with_name(f"{target.name}.{file.digest[:12]}.part")


def cached(repo: str, file: HubFile) -> Path | None:
    """The same file in the Hugging Face cache, if somebody else's program has downloaded it whole."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file.path)
    path = Path(found) if isinstance(found, str) else None
    return path if path is not None and path.is_file() and is_whole(file, path) else None


def is_whole(file: HubFile, path: Path) -> bool:
    """Whether a file on the disk is the one on the hub."""
    if path.stat().st_size != file.size:
        return False
    git = len(file.digest) == 40
    digest = hashlib.sha1(usedforsecurity=False) if git else hashlib.sha256()
    if git:
        digest.update(f"blob {file.size}\0".encode())
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == file.digest


def download(repo: str, file: HubFile, target: Path, progress: Progress) -> None:
    """Bring a file to ``target``; what an earlier attempt left is continued.

    Raises:
        SAEError: the hub cannot be reached, or what arrived is not the file that it lists.
        StoreError: the disk refuses.
    """
    if target.is_file():
        return
    part = part_of(file, target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as handle:
            _append(repo, file, _Counted(handle, progress, target), part)
        if not is_whole(file, part):
            part.unlink()
            raise SAEError(f"{PREFIX}{repo}/{file.path} arrived damaged; run the same command again")
        part.replace(target)


def _append(repo: str, file: HubFile, handle: "_Counted", part: Path) -> None:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    _quiet()
    done = part.stat().st_size
    if done >= file.size:
        return
    url = hf_hub_url(repo, file.path, endpoint=constants.ENDPOINT)
    try:
        http_get(
            url,
            handle,  # type: ignore[arg-type]
            resume_size=done,
            headers=build_hf_headers(),
            expected_size=file.size,
        )
    except AtlasError:
        raise
    except Exception as error:  # noqa: BLE001 - the libraries underneath raise dozens of types
        raise unreachable(f"{PREFIX}{repo}/{file.path}", error) from None


class _Counted:
    """A file open for appending that tells how many bytes go in; a full disk is the disk's fault here."""

    def __init__(self, handle: BinaryIO, progress: Progress, target: Path) -> None:
        self._handle, self._progress, self._target = handle, progress, target

    def write(self, data: bytes) -> int:
        with disk_errors(self._target):
            written = self._handle.write(data)
        self._progress(len(data))
        return written

    def tell(self) -> int:
        return self._handle.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._handle.seek(offset, whence)

    def truncate(self, size: int | None = None) -> int:
        return self._handle.truncate(size)

    def flush(self) -> None:
        self._handle.flush()
