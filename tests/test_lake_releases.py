"""Releases of a lake: readers see the old or the new one, keep a bounded copy, and go on with it alone."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from uuid import uuid4

import pyarrow as pa
import pytest
from click.testing import CliRunner

from atlas.api import open_atlas
from atlas.cli.releases import releases as releases_command
from atlas.errors import ConflictError, StoreError
from atlas.settings import load_settings
from atlas.store import published
from atlas.store.lake.cache import Cache
from atlas.store.lake.errors import LakeError, LakeUnreachableError
from atlas.store.lake.releases import Releases, releases_of
from atlas.store.lake.remote import Remote
from atlas.store.lake.shelf import Shelf
from atlas.store.parquet import write_table
from tests.s3_server import bucket, s3_server, wire
from tests.servers import PATIENCE, wait_until


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.server)])
def url(request, tmp_path):
    """An empty lake."""
    return request.getfixturevalue("bucket") if request.param == "s3" else str(tmp_path / "lake")


@pytest.fixture
def memory():
    return f"memory://{uuid4().hex}"


@pytest.fixture
def at(tmp_path):
    """Settings of a machine by its name, which asks the lake each time."""

    def settings(name, url, **given):
        return load_settings(
            {"ATLAS_HOME": str(tmp_path / name), "ATLAS_LAKE_URL": url, "ATLAS_LAKE_SECONDS": "0", **given}
        )

    yield settings
    releases_of.cache_clear()


@pytest.fixture
def publish(tmp_path):
    def publish(settings, n, name="little"):
        """A release whose vocabulary has n tokens."""
        rows = {"model": ["m"] * n, "token": pa.array(range(n), pa.int32())}
        rows |= {"text": [f"t{i}" for i in range(n)], "bytes": [b"x"] * n}
        path = tmp_path / "parts" / f"{uuid4().hex}.parquet"
        write_table(path, "vocab", pa.table(rows))
        return published.publish(settings, name, {"vocab": [path]}, {"seed": "0"})

    return publish


def tokens(settings, name=None):
    with open_atlas(name, settings) as atlas:
        return atlas.sql("SELECT count(*) AS n FROM vocab")["n"][0].as_py()


def stored(url):
    return sorted(Remote(url).listing("releases/"))


def test_a_release_is_read_on_another_machine(at, publish, url):
    maker, reader = at("maker", url), at("reader", url)
    with pytest.raises(StoreError, match=r"there is no release in .*; existing: none yet"):
        published.current(reader)
    made = publish(maker, 3)
    assert (made.label, made.current, made.note) == ("little@1", True, "")
    found = published.current(reader)
    assert (found.label, found.digest, found.size, found.note) == ("little@1", made.digest, made.size, "")
    assert found.path != made.path
    assert found.path.read_bytes() == made.path.read_bytes()
    assert tokens(reader) == 3
    with open_atlas(None, reader) as old:
        assert publish(maker, 5).label == "little@2"
        assert tokens(reader) == 5
        assert old.sql("SELECT count(*) AS n FROM vocab")["n"][0].as_py() == 3
    assert tokens(reader, "little@1") == 3
    assert publish(maker, 5).label == "little@2", "the same content is no new version"
    assert [info.label for info in published.list_releases(reader)] == ["little@1", "little@2"]
    with pytest.raises(StoreError, match=r"no release 'other' in .*; existing: little"):
        published.current(reader, "other")


def test_versions_are_removed(at, publish, memory):
    maker, reader = at("maker", memory), at("reader", memory)
    publish(maker, 3)
    publish(maker, 4)
    with pytest.raises(ConflictError, match="little@2 is the current one"):
        published.remove(maker, "little@2")
    with pytest.raises(StoreError, match="'little@7' does not exist; existing: little@1, little@2"):
        published.remove(maker, "little@7")
    assert published.remove(maker, "little@2", force=True).version == 2
    assert tokens(reader) == 3
    published.remove(maker, "little@1", force=True)
    assert published.names(reader) == []
    assert [key.rpartition("/")[2] for key in stored(memory)] == ["index.json"]


def test_of_two_publishers_at_once_one_wins(at, publish, url, monkeypatch):
    """Both have uploaded before either changes the index: with one content there is one version."""
    met, change = threading.Barrier(2), Shelf.change

    def meet(self, *arguments):
        met.wait(PATIENCE)
        return change(self, *arguments)

    monkeypatch.setattr(Shelf, "change", meet)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda name: publish(at(name, url), 3), ("one", "two")))
    assert found[0].label == found[1].label == "little@1"
    assert found[0].digest == found[1].digest
    assert len(stored(url)) == 2


def test_of_two_contents_at_once_the_second_is_refused(at, publish, memory, monkeypatch):
    met, change = threading.Barrier(2), Shelf.change

    def meet(self, *arguments):
        met.wait(PATIENCE)
        return change(self, *arguments)

    def attempt(n):
        try:
            return publish(at(f"machine-{n}", memory), n).label
        except ConflictError as error:
            return str(error)

    monkeypatch.setattr(Shelf, "change", meet)
    with ThreadPoolExecutor(2) as pool:
        found = sorted(pool.map(attempt, (3, 4)))
    assert found == ["little@1", "version 1 of release 'little' was just published"]
    assert len(stored(memory)) == 2, "the loser's file is gone"


@pytest.mark.server
def test_a_reader_goes_on_with_its_copy_while_the_store_is_away(
    at, publish, bucket, wire, caplog, monkeypatch
):
    impatient = (
        '{"endpoint_url": "%s", "config_kwargs": {"connect_timeout": 2, "retries": {"max_attempts": 0}}}'
    )
    reader = at("reader", bucket, ATLAS_LAKE_OPTIONS=impatient % wire.url)
    publish(at("maker", bucket), 3)
    assert tokens(reader) == 3
    wire.cut_after(0)
    patient = replace(reader, lake_seconds=60)  # as a process that starts now: it was told nothing yet
    found = published.current(patient)
    assert found.label == "little@1"
    assert found.note.startswith(f"lake {bucket}: cannot ")
    assert found.note.endswith("Shown is what was copied here before.")
    assert "hush-hush" not in caplog.text + found.note
    with monkeypatch.context() as patched:  # it is not asked again at once
        patched.setattr(Shelf, "names", lambda self: pytest.fail("the store was asked again"))
        assert tokens(patient) == 3
    with pytest.raises(LakeUnreachableError, match=bucket):
        published.list_releases(patient)
    with pytest.raises(LakeUnreachableError, match=bucket):
        published.current(at("new", bucket, ATLAS_LAKE_OPTIONS=impatient % wire.url))


def test_a_new_version_that_cannot_be_copied_leaves_the_old_one(at, publish, memory, monkeypatch):
    maker, reader = at("maker", memory), at("reader", memory)
    publish(maker, 3)
    assert tokens(reader) == 3
    publish(maker, 4)

    def away(self, files):
        raise LakeUnreachableError("lake memory://x: cannot read: away")

    with monkeypatch.context() as patched:
        patched.setattr(Remote, "fetch", away)
        found = published.current(reader)
        assert (found.version, found.current) == (1, False)
        assert found.note == "lake memory://x: cannot read: away. Shown is what was copied here before."
    assert published.current(reader).version == 2


def test_the_app_is_given_the_old_version_while_the_new_one_is_copied(at, publish, memory, monkeypatch):
    maker, reader = at("maker", memory), at("reader", memory)
    publish(maker, 3)
    assert published.current(reader, wait=False).version == 1
    publish(maker, 4)
    go, fetch = threading.Event(), Remote.fetch

    def slowly(self, files):
        assert go.wait(PATIENCE)
        fetch(self, files)

    monkeypatch.setattr(Remote, "fetch", slowly)
    for _ in range(3):
        found = published.current(reader, wait=False)
        assert (found.version, found.note) == (1, "Version 2 of little is being copied.")
    go.set()
    wait_until("the new version is here", lambda: published.current(reader, wait=False).version == 2)
    assert published.current(reader, wait=False).note == ""


def test_a_damaged_release_is_refused_and_published_anew(at, publish, memory):
    maker, reader, remote = at("maker", memory), at("reader", memory), Remote(memory)
    info = publish(maker, 3)
    key = f"releases/little/{info.path.name}"
    whole = remote.read(key)
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1]):
        remote.write(key, damaged)
        with pytest.raises(LakeError, match=r"\.duckdb is damaged"):
            published.current(reader)
        assert not list((reader.releases / "little").glob("little*.duckdb"))
    assert publish(maker, 3).version == 2
    assert tokens(reader) == 3


def test_copies_take_no_more_than_they_may(at, publish, memory):
    maker = at("maker", memory)
    size = [publish(maker, n).size for n in (3, 4, 5)][-1]
    reader = at("reader", memory, ATLAS_CACHE_GB=str(2.5 * size / 1e9))
    with open_atlas("little@1", reader) as oldest:
        for label in ("little@1", "little@2", "little@3"):
            for note in (reader.releases / "little").glob(".copy-*"):
                os.utime(note, (time.time() - 1000, time.time() - 1000))
            published.current(reader, label)
        here = sorted(p.name[:12] for p in (reader.releases / "little").glob("little*.duckdb"))
        assert len(here) == 2
        assert "little-v0003" in here
        assert oldest.sql("SELECT count(*) AS n FROM vocab")["n"][0].as_py() == 3, (
            "an open file stays readable"
        )
    assert tokens(reader, "little@1") == 3, "and is copied again when it is wanted"


def test_what_a_dead_publisher_left_is_found(at, publish, memory, tmp_path):
    publish(at("maker", memory), 3)
    (tmp_path / "half").write_bytes(b"half")
    Remote(memory).send({"releases/little/little-v0002-dead.duckdb": tmp_path / "half"})
    shelf = Shelf(Remote(memory))
    assert shelf.orphans(time.time() - 3600) == {}
    assert shelf.orphans(time.time() + 60) == {"releases/little/little-v0002-dead.duckdb": 4}


def test_the_command_lists_without_copying_and_removes(at, publish, memory, monkeypatch):
    publish(at("maker", memory), 3)
    publish(at("maker", memory), 4)
    reader = at("reader", memory)
    monkeypatch.setenv("ATLAS_HOME", str(reader.home))
    monkeypatch.setenv("ATLAS_LAKE_URL", memory)
    listed = CliRunner().invoke(releases_command).output.splitlines()
    assert [line.split()[0] for line in listed] == ["RELEASE", "little@1", "little@2"]
    assert listed[2].endswith("current")
    assert not list(reader.local.rglob("little*.duckdb"))
    assert CliRunner().invoke(releases_command, ["--remove", "little@1"]).output == "removed little@1\n"
    assert [info.label for info in published.list_releases(reader)] == ["little@2"]
