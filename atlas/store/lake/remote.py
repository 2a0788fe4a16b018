"""One place on an object store: small objects read and swapped, files sent and fetched.

Writers are kept apart by *conditional writes*: an object is created only if it is not there, or replaced only
if it is still the one that was read (https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html).

| Store | ``create`` | ``swap`` |
|---|---|---|
| S3 | ``If-None-Match: *`` | ``If-Match`` with the ETag |
| a folder | hard link of a finished file | rename under a lock |
| others | fsspec's ``mode="create"`` where there is one, else checked first | checked first |

Where it is only checked first, the last of two writers in the same moment wins. Their content is the same,
for outputs are deterministic, and leases in the database keep them apart in the first place.
"""

import hashlib
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlas.store.atomic import discard, fsync_path, work_path
from atlas.store.lake.errors import Explainer, http_status, shown_url
from atlas.store.lake.opening import changed_at, open_objects
from atlas.store.lake.waiting import exclusive

THREADS = 8
"""Objects that are sent or fetched at once."""
_CHECKED = threading.RLock()
"""Held while a store that may know no conditional writes is checked and written: threads take turns."""


@dataclass(frozen=True)
class Stored:
    """An object as a listing tells: its size in bytes and when it was written (seconds since 1970)."""

    size: int
    changed: float


class Remote:
    """The objects below a URL; keys are relative to it, with '/'.

    Every method raises LakeError where the store refuses and LakeUnreachableError where it does not answer.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self._explainer = Explainer(url, options or {})
        self.url = shown_url(url)
        self._fs, self._root, self._kind = open_objects(url, dict(options or {}))

    def _at(self, key: str) -> str:
        return f"{self._root}/{key}"

    def shown(self, key: str) -> str:
        """An object's URL as it may be shown."""
        return f"{self.url}/{key}"

    def read(self, key: str) -> bytes | None:
        """The content of a small object; None if it is not there."""
        with self._explainer.explain(f"read {key}"):
            try:
                return bytes(self._fs.cat_file(self._at(key)))
            except FileNotFoundError:
                return None

    def read_tagged(self, key: str) -> tuple[bytes, str] | None:
        """The content of a small object and a tag that ``swap`` takes; None if it is not there."""
        with self._explainer.explain(f"read {key}"):
            try:
                # The tag first: content that is newer than its tag makes a swap fail, never succeed wrongly.
                tag = str(self._fs.info(self._at(key), refresh=True)["ETag"]) if self._kind == "s3" else ""
                content = bytes(self._fs.cat_file(self._at(key)))
            except FileNotFoundError:
                return None
        return content, tag or hashlib.sha256(content).hexdigest()

    def create(self, key: str, content: bytes) -> bool:
        """Write an object unless one of that key is there; whether it holds this content now.

        A request whose answer was lost is sent again and finds its own object, so contents should be unique.
        """
        with self._explainer.explain(f"write {key}"):
            if self._kind == "folder":
                return self._create_file(Path(self._at(key)), content)
            try:
                # The store in memory looks first and writes then; S3 does both at once.
                with _CHECKED if self._kind == "other" else nullcontext():
                    self._fs.pipe_file(self._at(key), content, mode="create")
            except FileExistsError:
                return self.read(key) == content  # the answer to an earlier try of ours may have been lost
            except (NotImplementedError, TypeError, ValueError):
                return self._checked(key, content, None)
        return True

    def swap(self, key: str, content: bytes, tag: str) -> bool:
        """Replace the object that ``read_tagged`` gave with ``tag``; False if it changed meanwhile.

        As with ``create``, contents should be unique.
        """
        with self._explainer.explain(f"replace {key}"):
            if self._kind == "s3":
                return self._swap_s3(key, content, tag)
            if self._kind == "folder":
                path = Path(self._at(key))
                with exclusive(path.with_name(f".lock-{path.name}")):
                    return self._checked(key, content, tag)
            return self._checked(key, content, tag)

    def write(self, key: str, content: bytes) -> None:
        """Write an object, whatever was there."""
        with self._explainer.explain(f"write {key}"):
            if self._kind == "folder":
                _place(Path(self._at(key)), content)
            else:
                self._fs.pipe_file(self._at(key), content)

    def _swap_s3(self, key: str, content: bytes, tag: str) -> bool:
        try:
            self._fs.pipe_file(self._at(key), content, IfMatch=tag)
        except FileNotFoundError:
            return False
        except Exception as error:
            if http_status(error) in (409, 412):
                return self.read(key) == content  # the answer to an earlier try of ours may have been lost
            if http_status(error) == 501:  # the store knows no conditional writes
                return self._checked(key, content, tag)
            raise
        return True

    def _checked(self, key: str, content: bytes, tag: str | None) -> bool:
        with _CHECKED:
            found = self.read_tagged(key)
            if (found[1] if found else None) != tag:
                return False
            self.write(key, content)
            return True

    @staticmethod
    def _create_file(path: Path, content: bytes) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = work_path(path)
        try:
            work.write_bytes(content)
            fsync_path(work)
            path.hardlink_to(work)
        except FileExistsError:
            return path.read_bytes() == content
        finally:
            discard(work)
        return True

    def send(self, files: Mapping[str, Path]) -> None:
        """Upload files to their keys, several at once; nothing reads them before something names them."""
        self._each(files.items(), self._send_one)

    def _send_one(self, item: tuple[str, Path]) -> None:
        key, path = item
        with self._explainer.explain(f"write {key}"):
            self._fs.put_file(str(path), self._at(key))

    def fetch(self, files: Mapping[str, Path]) -> None:
        """Download objects to paths, several at once; LakeMissingError for one that is not there."""
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        self._each(files.items(), self._fetch_one)

    def _fetch_one(self, item: tuple[str, Path]) -> None:
        key, path = item
        with self._explainer.explain(f"read {key}"):
            self._fs.get_file(self._at(key), str(path))

    @staticmethod
    def _each(items: Iterable[tuple[str, Path]], work: Any) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(work, item) for item in items]:
                done.result()

    def listing(self, prefix: str) -> dict[str, Stored]:
        """Everything below a prefix that ends at a '/', by key."""
        with self._explainer.explain(f"list {prefix}"):
            self._fs.invalidate_cache(self._at(prefix))
            try:
                found = self._fs.find(self._at(prefix), detail=True)
            except FileNotFoundError:
                return {}
        start = len(self._root) + 1
        keys = {str(name)[start:]: Stored(int(i["size"]), changed_at(i)) for name, i in found.items()}
        return {key: stored for key, stored in keys.items() if not key.rpartition("/")[2].startswith(".")}

    def folders(self, prefix: str) -> list[str]:
        """Names of what lies directly below a prefix and holds something itself."""
        with self._explainer.explain(f"list {prefix}"):
            self._fs.invalidate_cache(self._at(prefix))
            try:
                found = self._fs.ls(self._at(prefix), detail=True)
            except FileNotFoundError:
                return []
        return sorted(Path(str(i["name"])).name for i in found if i["type"] == "directory")

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is gone already is no error."""
        for key in keys:
            with self._explainer.explain(f"delete {key}"):
                try:
                    self._fs.rm_file(self._at(key))
                except FileNotFoundError:
                    continue

    def remove(self, prefix: str) -> None:
        """Remove everything below a prefix."""
        self.delete(self.listing(prefix))
        if self._kind == "folder":
            discard(Path(self._at(prefix)))


def _place(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    work = work_path(path)
    try:
        work.write_bytes(content)
        fsync_path(work)
        work.replace(path)
    finally:
        discard(work)
