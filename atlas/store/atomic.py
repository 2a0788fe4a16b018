"""Files and folders that appear whole or not at all, and locks that refuse a second writer.

Work is done under a hidden name beside the final one, flushed to the disk (unless that is not asked for), and
renamed. Whatever goes wrong on the way (a full disk, a missing permission, an exception of the caller) leaves
neither the hidden name nor a changed final name.
"""

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atlas.errors import ConflictError, StoreError

WORK_PREFIX = ".work-"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the disk in the block into a StoreError of one line with ``path`` and the reason.

    A connection that broke or a time-out, which the work in the block may meet as well, passes.
    """
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        if error.filename is not None and WORK_PREFIX not in str(error.filename):
            reason += f" ({error.filename})"
        raise StoreError(f"cannot write {path}: {reason}") from error


def work_path(final: Path) -> Path:
    """A fresh hidden name beside ``final``, on the same file system, that nobody else uses."""
    return final.with_name(f"{WORK_PREFIX}{final.name}-{os.getpid()}-{secrets.token_hex(4)}")


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in ``folder``; only for who holds the folder's lock."""
    for path in folder.glob(f"{WORK_PREFIX}*"):
        discard(path)


def sweep_for(final: Path) -> None:
    """Remove what killed processes left half-written of ``final``; only for who holds its lock."""
    for path in final.parent.glob(f"{WORK_PREFIX}{glob.escape(final.name)}-*"):
        discard(path)


def fsync_path(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename after it never shows an empty file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a file or folder if it is there; never raises, for it runs while other errors pass."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


@contextmanager
def atomic_file(final: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write; afterwards it replaces ``final`` in one step.

    Without ``flush`` a power cut may leave it empty: for files of a folder that is flushed as a whole, or not
    at all (:func:`atomic_dir`). An exception in the block discards what was written. Raises StoreError where
    the disk refuses or the block wrote nothing.
    """
    final = Path(final)
    work = work_path(final)
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield work
            if not work.exists():
                raise StoreError(f"cannot write {final}: nothing was written")
            if flush:
                fsync_path(work)
            work.replace(final)
            if flush:
                fsync_path(final.parent)
        finally:
            discard(work)


@contextmanager
def atomic_dir(final: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary folder to fill; afterwards it is renamed to ``final``, which must not exist.

    Without ``flush`` nobody waits for the disk, and a power cut may empty or spoil what was written in the
    half minute before it: for what is checked when it is read, and soon made again. Raises ConflictError if
    ``final`` exists (a published folder is never changed), StoreError where the disk refuses.
    """
    final = Path(final)
    if final.exists():
        raise ConflictError(f"{final} already exists; a published folder is never overwritten")
    work = work_path(final)
    with disk_errors(final):
        work.mkdir(parents=True)
        try:
            yield work
            for path in [*sorted(work.rglob("*")), work] if flush else ():
                fsync_path(path)
            _rename_dir(work, final)
            if flush:
                fsync_path(final.parent)
        finally:
            discard(work)


@contextmanager
def scratch_dir(final: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``final``, on the same file system, and remove it afterwards."""
    work = work_path(Path(final))
    with disk_errors(final):
        work.mkdir(parents=True)
        try:
            yield work
        finally:
            discard(work)


def _rename_dir(work: Path, final: Path) -> None:
    try:
        work.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise ConflictError(f"{final} was published by another process meanwhile") from None
        raise


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the exclusive lock of ``path`` for the block; it ends with the process, however that ends.

    Raises ConflictError naming the process that holds it. The lock file itself stays, until :func:`unlock`.
    """
    path = Path(path)
    descriptor = _locked(path)
    try:
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def unlock(path: Path) -> None:
    """Remove the file of a lock, only for who holds it."""
    discard(path)


def _locked(path: Path) -> int:
    """The file at ``path``, opened and locked.

    Who held it before may have removed it between our opening and our locking; then others would lock
    another file of the same name, so we look for that one.
    """
    while True:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take(descriptor, path)
            if _at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        raise ConflictError(f"{path} is held by process {holder or 'unknown'}; try again later") from None
    with disk_errors(path):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
