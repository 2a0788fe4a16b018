"""What lies in the lake appears whole or not at all, whoever writes and wherever the connection breaks."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
from fsspec.implementations.memory import MemoryFile

from atlas.errors import ConfigError
from atlas.pipeline.retries import is_transient
from atlas.settings import load_settings
from atlas.store.atomic import atomic_file
from atlas.store.lake.cache import Cache
from atlas.store.lake.errors import LakeError, LakeUnreachableError
from atlas.store.lake.folders import Folders, inventory_of
from atlas.store.lake.lake import Lake
from atlas.store.lake.remote import Remote
from atlas.store.lake.states import States
from tests.s3_server import KEYS, bucket, s3_server, wire
from tests.servers import PATIENCE, wait_until

IMPATIENT = {"config_kwargs": {"connect_timeout": 2, "retries": {"max_attempts": 0}}}


@pytest.fixture(params=["memory", "folder", pytest.param("s3", marks=pytest.mark.server)])
def url(request, tmp_path):
    """An empty lake on each kind of store."""
    if request.param == "s3":
        return request.getfixturevalue("bucket")
    return f"memory://{uuid4().hex}" if request.param == "memory" else str(tmp_path / "lake")


@pytest.fixture
def remote(url):
    return Remote(url)


@pytest.fixture
def folder(tmp_path):
    """What a step could have made."""
    made = tmp_path / "made"
    (made / "00000").mkdir(parents=True)
    (made / "00000" / "cfg.json").write_text("{}")
    (made / "rows.parquet").write_bytes(os.urandom(100_000))
    (made / "empty").write_bytes(b"")
    return made


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tamper(remote, name, change):
    """Change the stored bytes of a published folder's rows."""
    inventory = Folders(remote, "steps").find(name)
    key = f"steps/{name}/{inventory.attempt}/rows.parquet"
    remote.write(key, change(remote.read(key)))


# Single objects


def test_an_object_is_created_once(remote):
    assert remote.read("a/b.json") is None
    assert remote.read_tagged("a/b.json") is None
    assert remote.create("a/b.json", b"one")
    assert not remote.create("a/b.json", b"two")
    assert remote.create("a/b.json", b"one"), "our own write, whose answer was lost"
    assert remote.read("a/b.json") == b"one"
    remote.delete(["a/b.json", "a/b.json"])
    assert remote.listing("a/") == {}


def test_of_many_threads_one_creates_an_object_in_memory(monkeypatch):
    """This store looks whether it is there and writes later: here, later than the others could look."""
    remote, commit = Remote(f"memory://{uuid4().hex}"), MemoryFile.commit

    def late(file):
        time.sleep(0.05)
        commit(file)

    monkeypatch.setattr(MemoryFile, "commit", late)
    with ThreadPoolExecutor(4) as pool:
        created = list(pool.map(lambda n: remote.create("a.json", b"%d" % n), range(4)))
    assert sorted(created) == [False, False, False, True]
    assert remote.read("a.json") == b"%d" % created.index(True)


def test_an_object_is_replaced_only_if_it_is_the_one_that_was_read(remote):
    remote.create("a.json", b"one")
    _, tag = remote.read_tagged("a.json")
    assert remote.swap("a.json", b"two", tag)
    assert not remote.swap("a.json", b"three", tag)
    _, tag = remote.read_tagged("a.json")
    remote.delete(["a.json"])
    assert not remote.swap("a.json", b"four", tag)
    assert remote.read("a.json") is None


def test_no_update_is_lost_among_threads(remote):
    remote.create("n.json", b"0")

    def count(number):
        while True:
            text, tag = remote.read_tagged("n.json")
            if remote.swap("n.json", b"%d by %d" % (int(text.split()[0]) + 1, number), tag):
                return

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(12)))
    assert remote.read("n.json").split()[0] == b"12"


# Folders


def test_a_folder_comes_back_as_it_was(remote, folder, tmp_path):
    steps = Folders(remote, "steps")
    assert steps.find("x-1") is None
    assert not steps.is_whole("x-1")
    inventory, same = steps.publish("x-1", folder)
    assert same
    assert steps.is_whole("x-1")
    steps.fetch("x-1", inventory, tmp_path / "copy")
    assert content(tmp_path / "copy") == content(folder)
    assert [(e.name, abs(e.changed - time.time()) < PATIENCE) for e in steps.entries()] == [("x-1", True)]
    again, same = steps.publish("x-1", folder)
    assert (again.attempt, again.files, same) == (inventory.attempt, inventory.files, True)
    steps.remove("x-1")
    assert remote.listing("steps/") == {}
    assert steps.entries() == []


def test_a_whole_folder_stays_unless_it_is_to_be_replaced(remote, folder):
    steps = Folders(remote, "steps")
    first, _ = steps.publish("x-1", folder)
    (folder / "rows.parquet").write_bytes(b"other")
    kept, same = steps.publish("x-1", folder)
    assert (kept.attempt, kept.files, same) == (first.attempt, first.files, False)
    second, same = steps.publish("x-1", folder, replace=True)
    assert same
    assert steps.find("x-1").files == second.files == inventory_of(folder).files
    assert steps.orphans(time.time() + 60) == {}


@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:]],
    ids=["truncated", "altered"],
)
def test_a_damaged_object_is_noticed_and_made_anew(remote, folder, tmp_path, change):
    steps = Folders(remote, "steps")
    inventory, _ = steps.publish("x-1", folder)
    tamper(remote, "x-1", change)
    with pytest.raises(LakeError, match=r"rows\.parquet is damaged"):
        steps.fetch("x-1", inventory, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert not steps.is_whole("x-1")
    inventory, _ = steps.publish("x-1", folder)
    steps.fetch("x-1", inventory, tmp_path / "copy")
    assert content(tmp_path / "copy") == content(folder)


def test_a_truncated_object_is_seen_without_fetching_it(remote, folder):
    steps = Folders(remote, "steps")
    steps.publish("x-1", folder)
    tamper(remote, "x-1", lambda data: data[:-1])
    assert not steps.is_whole("x-1")
    steps.publish("x-1", folder)
    assert steps.is_whole("x-1")


def test_of_two_that_publish_at_once_one_wins(remote, folder, monkeypatch):
    """Both have uploaded before either publishes; the loser's files go and it hears of the winner's."""
    steps, met = Folders(remote, "steps"), threading.Barrier(2)
    create = Remote.create

    def meet(self, *arguments):
        met.wait(PATIENCE)
        return create(self, *arguments)

    monkeypatch.setattr(Remote, "create", meet)
    with ThreadPoolExecutor(2) as pool:
        found = [f.result() for f in [pool.submit(steps.publish, "x-1", folder) for _ in range(2)]]
    assert found[0][0].attempt == found[1][0].attempt == steps.find("x-1").attempt
    assert [same for _, same in found] == [True, True]
    assert len(remote.listing("steps/x-1/")) == 1 + len(content(folder))


def test_what_a_dead_writer_left_is_found_after_a_while(remote, folder):
    steps = Folders(remote, "steps")
    steps.publish("x-1", folder)
    remote.send({"steps/x-1/dead/rows.parquet": folder / "rows.parquet"})
    remote.send({"steps/y-1/dead/rows.parquet": folder / "rows.parquet"})
    assert steps.find("y-1") is None
    assert [e.name for e in steps.entries()] == ["x-1"]
    assert steps.orphans(time.time() - 3600) == {}
    left = steps.orphans(time.time() + 60)
    assert left == {"steps/x-1/dead/rows.parquet": 100_000, "steps/y-1/dead/rows.parquet": 100_000}
    remote.delete(left)
    assert steps.is_whole("x-1")
    assert steps.orphans(time.time() + 60) == {}


@pytest.mark.server
def test_a_connection_lost_in_an_upload_leaves_nothing_to_be_seen(bucket, wire, folder):
    steps = Folders(Remote(bucket), "steps")
    wired = Folders(Remote(bucket, {"endpoint_url": wire.url, **IMPATIENT}), "steps")
    wire.cut_after(60_000)
    with pytest.raises(LakeUnreachableError, match="cannot write steps/x-1") as raised:
        wired.publish("x-1", folder)
    assert is_transient(raised.value)
    assert steps.find("x-1") is None
    assert not steps.is_whole("x-1")
    wire.cut_after(float("inf"))
    Folders(Remote(bucket, {"endpoint_url": wire.url}), "steps").publish("x-1", folder)
    assert steps.is_whole("x-1")


def test_an_inventory_cannot_lead_outside(remote, folder):
    steps = Folders(remote, "steps")
    inventory = {"attempt": "a", "files": {"../../evil": [1, "0" * 64]}}
    remote.write("steps/x-1/inventory.json", json.dumps(inventory).encode())
    assert steps.find("x-1") is None
    steps.publish("x-1", folder)
    assert steps.is_whole("x-1")


# Copies on this disk


def copies(root, **used):
    """A cache with copies of 10 bytes, last used so many seconds ago."""
    cache = Cache(root, 25)
    for name, seconds in used.items():
        (root / "steps").mkdir(parents=True, exist_ok=True)
        (root / "steps" / name).write_bytes(b"0123456789")
        cache.add(root / "steps" / name, 10)
        then = time.time() - seconds
        os.utime(root / "steps" / f".copy-{name}", (then, then))
    return cache


def there(cache):
    return {p.name for p in (cache.root / "steps").glob("[a-z]*")}


def test_what_was_unused_for_longest_goes_first(tmp_path):
    cache = copies(tmp_path, a=300, b=500, c=400)
    cache.make_room(0)
    assert there(cache) == {"a", "c"}
    cache.touch(tmp_path / "steps" / "c")
    cache.make_room(10)
    assert there(cache) == {"c"}
    assert [copy.path.name for copy in cache.copies()] == ["c"]


def test_what_is_used_now_or_not_in_the_lake_stays(tmp_path, caplog):
    cache = copies(tmp_path, a=300, b=500, c=1)
    (tmp_path / "steps" / "mine").write_bytes(b"0" * 100)
    with cache.holding() as held:
        held.add(tmp_path / "steps" / "b")
        os.utime(tmp_path / "steps" / ".copy-b", (0, 0))
        cache.make_room(25)
        assert there(cache) == {"b", "c", "mine"}
        assert "ATLAS_CACHE_GB" in caplog.text
    cache.make_room(10)
    assert there(cache) == {"c", "mine"}
    assert not list(tmp_path.glob(".held-*"))


def test_a_killed_process_holds_nothing(tmp_path):
    cache = copies(tmp_path, a=300, b=500, c=400)
    script = (
        "import os, signal, sys; from pathlib import Path; from atlas.store.lake.cache import Cache\n"
        "root = Path(sys.argv[1])\n"
        "with Cache(root, 25).holding() as held:\n"
        "    held.add(root / 'steps' / 'b'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert list(tmp_path.glob(".held-*"))
    os.utime(tmp_path / "steps" / ".copy-b", (0, 0))
    cache.make_room(0)
    assert there(cache) == {"a", "c"}
    assert not list(tmp_path.glob(".held-*"))


def test_an_input_is_copied_once_and_again_after_it_went(url, folder, tmp_path):
    settings = load_settings({"ATLAS_HOME": str(tmp_path / "home"), "ATLAS_LAKE_URL": url})
    lake, path = Lake(settings), settings.steps / "x-1"
    whole = Path.exists
    assert not lake.copy(path, whole)
    lake.steps.publish("x-1", folder)
    assert lake.copy(path, whole)
    assert content(path) == content(folder)
    os.utime(settings.steps / ".copy-x-1", (0, 0))
    Cache(settings.local, 0).make_room(0)
    assert not path.exists()
    assert lake.copy(path, whole)
    assert content(path) == content(folder)


# States of trainings


def test_a_state_goes_on_elsewhere(remote, tmp_path):
    states, here, elsewhere = States(remote), tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    assert not states.restore("train-1", elsewhere)
    for text in ("first", "second"):
        (here / "training.safetensors").write_text(text)
        (here / "live.jsonl").write_text("{}")
        states.save("train-1", here)
    assert states.restore("train-1", elsewhere)
    assert content(elsewhere) == {"training.safetensors": b"second"}
    assert len(remote.listing("scratch/")) == 2, "the first state is gone"
    assert not states.restore("train-1", here), "what is there is as new"
    states.clear("train-1")
    assert remote.listing("scratch/") == {}
    assert {p.name for p in here.iterdir()} == {"training.safetensors", "live.jsonl"}


def test_a_damaged_state_is_not_used(remote, tmp_path, caplog):
    states, here = States(remote), tmp_path / "here"
    here.mkdir()
    (here / "training.safetensors").write_text("state")
    states.save("train-1", here)
    (key,) = [k for k in remote.listing("scratch/") if k.endswith(".safetensors")]
    remote.write(key, b"stat!")
    assert not states.restore("train-1", tmp_path / "elsewhere")
    assert "is damaged" in caplog.text
    assert content(tmp_path / "elsewhere") == {}


def test_a_state_is_uploaded_while_a_step_works(remote, tmp_path):
    states, scratch, elsewhere = States(remote), tmp_path / "here", tmp_path / "elsewhere"
    scratch.mkdir()

    def dies():
        with states.following("train-1", scratch, 0.05):
            with atomic_file(scratch / "training.safetensors") as work:
                work.write_text("half way")
            wait_until("the state is uploaded", lambda: remote.read("scratch/train-1/state.json"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dies()
    with states.following("train-1", elsewhere, 0.05):
        assert (elsewhere / "training.safetensors").read_text() == "half way"
    assert remote.listing("scratch/") == {}, "a finished step leaves no state"


# Errors and settings


@pytest.mark.server
def test_a_store_that_is_away_is_named_without_secrets(bucket, wire):
    wire.cut_after(0)
    options = {
        "endpoint_url": wire.url.replace("//", "//me:pass-word@"),
        "key": KEYS["AWS_ACCESS_KEY_ID"],
        "secret": KEYS["AWS_SECRET_ACCESS_KEY"],
        **IMPATIENT,
    }
    with pytest.raises(LakeUnreachableError) as raised:
        Remote(bucket, options).read("steps/x/inventory.json")
    text = str(raised.value)
    assert text.startswith(f"lake {bucket}: cannot read steps/x/inventory.json: ")
    assert "\n" not in text
    for error in (raised.value, raised.value.__cause__):
        assert "pass-word" not in str(error)
        assert KEYS["AWS_SECRET_ACCESS_KEY"] not in str(error)
    assert is_transient(raised.value)


@pytest.mark.server
def test_a_bucket_that_is_not_there_is_no_passing_error(bucket):
    with pytest.raises(LakeError, match="s3://no-such-bucket/lake: cannot write a: not there") as raised:
        Remote("s3://no-such-bucket/lake").create("a", b"1")
    assert not is_transient(raised.value)


def test_settings_of_the_lake():
    settings = load_settings({"ATLAS_HOME": "/h"})
    assert (settings.steps, settings.releases) == (Path("/h/steps"), Path("/h/releases"))
    lake = {"ATLAS_LAKE_URL": "s3://b/p/", "ATLAS_LAKE_OPTIONS": '{"secret": "hush-hush"}'}
    settings = load_settings({"ATLAS_HOME": "/h", **lake})
    assert settings.lake_url == "s3://b/p"
    assert settings.steps.parent == settings.releases.parent == settings.local
    assert settings.local != load_settings({"ATLAS_HOME": "/h", "ATLAS_LAKE_URL": "s3://b/q"}).local
    assert "hush-hush" not in repr(settings)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ATLAS_LAKE_URL": "bucket:hush-hush"}, "ATLAS_LAKE_URL is no URL"),
        ({"ATLAS_LAKE_OPTIONS": '["hush-hush"]'}, "ATLAS_LAKE_OPTIONS is no JSON object"),
        ({"ATLAS_LAKE_OPTIONS": '{"hush-hush'}, "ATLAS_LAKE_OPTIONS is no JSON object"),
        ({"ATLAS_CACHE_GB": "-1"}, "ATLAS_CACHE_GB='-1' is too small"),
        ({"ATLAS_RESIDUAL_GB": "-1"}, "ATLAS_RESIDUAL_GB='-1' is too small"),
        ({"ATLAS_LAKE_SECONDS": "soon"}, "ATLAS_LAKE_SECONDS='soon' is not a number"),
    ],
)
def test_settings_that_are_refused(given, said):
    with pytest.raises(ConfigError, match=said) as raised:
        load_settings({"ATLAS_HOME": "/h", **given})
    assert "hush-hush" not in str(raised.value)


def test_a_protocol_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match=r"nix://\*\*\*@host/x cannot be used: Protocol not known: nix"):
        Remote("nix://me:hush-hush@host/x")


def test_without_a_lake_nothing_of_it_is_imported():
    script = (
        "import sys; import atlas.store.published, atlas.pipeline.execute\n"
        "print([name for name in sys.modules if name in ('s3fs', 'aiobotocore', 'atlas.store.lake.remote')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
