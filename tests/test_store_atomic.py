"""Files and folders appear whole or not at all; a second writer is refused."""

import errno
import multiprocessing
import os

import pytest

from atlas.errors import ConflictError, StoreError
from atlas.store import atomic


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def fail_while_writing(manager, error):
    with manager as work:
        (work / "half" if work.is_dir() else work).write_text("half")
        raise error


def test_file_appears_whole_and_replaces(tmp_path):
    final = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with atomic.atomic_file(final) as work:
            work.write_text(text)
            assert not final.exists() or final.read_text() == "one"
    assert final.read_text() == "two"
    assert names(final.parent) == ["a.txt"]


def test_exception_leaves_the_old_file(tmp_path):
    final = tmp_path / "a.txt"
    final.write_text("old")
    with pytest.raises(ValueError, match="mine"):
        fail_while_writing(atomic.atomic_file(final), ValueError("mine"))
    assert final.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_disk_full_is_one_line_and_leaves_nothing(tmp_path):
    final = tmp_path / "a.txt"
    with pytest.raises(StoreError) as caught:
        fail_while_writing(atomic.atomic_file(final), OSError(errno.ENOSPC, "No space left on device"))
    assert str(caught.value) == f"cannot write {final}: No space left on device"
    assert names(tmp_path) == []


@pytest.mark.parametrize("flush", [True, False])
def test_a_disk_is_waited_for_unless_asked_not_to(tmp_path, monkeypatch, flush):
    flushed = []
    monkeypatch.setattr(atomic, "fsync_path", lambda path: flushed.append(path.name.split("-")[0]))
    with atomic.atomic_dir(tmp_path / "folder", flush=flush) as work:
        (work / "part").write_text("1")
    with atomic.atomic_file(tmp_path / "file", flush=flush) as work:
        work.write_text("1")
    assert names(tmp_path) == ["file", "folder"]
    here = tmp_path.name.split("-")[0]
    assert flushed == (["part", ".work", here, ".work", here] if flush else [])


def test_nothing_written_is_refused(tmp_path):
    with pytest.raises(StoreError, match="nothing was written"), atomic.atomic_file(tmp_path / "a"):
        pass


def test_missing_parent_that_is_a_file(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(StoreError, match="cannot write"), atomic.atomic_file(tmp_path / "f" / "a"):
        pass


def test_failed_rename_leaves_nothing(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(StoreError, match="Read-only file system"), atomic.atomic_file(tmp_path / "a") as work:
        work.write_text("x")
    assert names(tmp_path) == []


def test_dir_appears_whole_and_never_twice(tmp_path):
    final = tmp_path / "step"
    with atomic.atomic_dir(final) as work:
        (work / "deep").mkdir()
        (work / "deep" / "x").write_text("1")
        assert not final.exists()
    assert (final / "deep" / "x").read_text() == "1"
    with pytest.raises(ConflictError, match="already exists"), atomic.atomic_dir(final):
        pass
    assert names(tmp_path) == ["step"]


def test_dir_published_meanwhile_is_kept(tmp_path):
    final = tmp_path / "step"
    writer = atomic.atomic_dir(final)
    (writer.__enter__() / "x").write_text("second")
    with atomic.atomic_dir(final) as work:
        (work / "x").write_text("first")
    with pytest.raises(ConflictError, match="meanwhile"):
        writer.__exit__(None, None, None)
    assert (final / "x").read_text() == "first"
    assert names(tmp_path) == ["step"]


def test_dir_exception_leaves_nothing(tmp_path):
    with pytest.raises(StoreError, match="No space"):
        fail_while_writing(atomic.atomic_dir(tmp_path / "step"), OSError(errno.ENOSPC, "full"))
    assert names(tmp_path) == []


def test_lock_refuses_a_second_writer_and_names_the_first(tmp_path):
    path = tmp_path / "x.lock"
    with atomic.lock(path):
        with pytest.raises(ConflictError, match=f"held by process {os.getpid()}"), atomic.lock(path):
            pass
        with pytest.raises(ConflictError), atomic.lock(path):
            pass
    with atomic.lock(path):
        pass


def _hold_and_die(path, ready):
    with atomic.lock(path):
        ready.set()
        os._exit(9)


def test_lock_ends_with_its_process(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold_and_die, args=(tmp_path / "x.lock", ready))
    holder.start()
    holder.join()
    assert ready.is_set()
    with atomic.lock(tmp_path / "x.lock"):
        pass
