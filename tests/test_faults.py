"""Every fault of docs/reliability.md, with real workers, Redis and PostgreSQL on a tiny build.

After each: the tables of an undisturbed build, digest by digest; every annotation whose saving was confirmed;
nothing left over after `atlas gc`; and nothing more to do.
"""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from atlas.db.engine import close_engines
from atlas.db.leases import request_cancel
from atlas.db.schema import upgrade
from atlas.settings import load_settings
from atlas.store.connection import open_release
from atlas.store.release import current
from tests.conftest import need
from tests.faults import Forge, Lab, Reference, tables_of, values_of
from tests.servers import Proxy, RedisServer, postgres_server, wait_until

pytestmark = [pytest.mark.server, pytest.mark.slow]
CUT_SECONDS = float(os.environ.get("ATLAS_TEST_CUT_SECONDS", "4"))
"""How long the network is cut; 30 for the fault as docs/reliability.md names it."""
SHOW_TIMES = bool(os.environ.get("ATLAS_TEST_TIMES"))
TOOK: dict[str, float] = {}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    forge = Forge()
    yield Reference(tmp_path_factory.mktemp("faults"), forge)
    forge.close()


@pytest.fixture(scope="module")
def template(postgres_server, tmp_path_factory):
    """A migrated database that each test gets a copy of."""
    url = postgres_server.database()
    upgrade(load_settings({"ATLAS_HOME": str(tmp_path_factory.mktemp("t")), "ATLAS_DATABASE_URL": url}))
    close_engines()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA jump")
    return url


@pytest.fixture(scope="module")
def keeping_redis():
    """A Redis that has its messages again after a restart."""
    need(shutil.which("redis-server"), "redis-server")
    server = RedisServer(keeps=True)
    server.start()
    yield server
    server.remove()


@pytest.fixture
def lab(reference, template, postgres_server, keeping_redis, tmp_path, request):
    """A lab whose home has what comes before the kind of step that the test is about."""
    keeping_redis.flush()
    before = getattr(request, "param", "shard")
    home = tmp_path / "lab"
    reference.begin(home, before)
    url = postgres_server.database(template)
    postgres_server.execute(
        f"ALTER DATABASE {url.rpartition('/')[2]} SET search_path = jump, pg_catalog, public"
    )
    one = Lab(reference, home, url, keeping_redis.url)
    yield one
    one.close()
    close_engines()


@pytest.fixture(autouse=True)
def _timed(request):
    """How long recovery took, for the table in docs/reliability.md."""
    yield
    for what in sorted(TOOK) if SHOW_TIMES else ():
        print(f"\n{what}: {TOOK.pop(what):.1f} s")


@pytest.fixture
def recovered(request, lab):
    """Waits for the build and notes how long that took since the fault."""

    def wait(build, began):
        assert build.ended() == 0, build.said
        TOOK[request.node.name] = time.monotonic() - began

    return wait


def held(kind, at=1):
    return {"do": "hold", "kind": kind, "at": at}


KILLS = {"training": ("train", 3), "shard": ("shard", 1), "merge": ("summarise", 2)}
KILLS |= {"publish": ("publish", 1), "published": ("publish", 2)}


@pytest.mark.parametrize(
    ("lab", "kind", "at"), [(kind, kind, at) for kind, at in KILLS.values()], ids=KILLS, indirect=["lab"]
)
def test_worker_killed(lab, recovered, kind, at):
    first = lab.worker(held(kind, at))
    build = lab.build()
    lab.reached(kind)
    began = time.monotonic()
    first.kill()
    lab.worker()
    recovered(build, began)
    run = lab.check()
    assert {step.attempts for step in run.steps if step.kind == kind} >= {2}
    assert all(step.attempts <= 1 for step in run.steps if step.kind != kind)


@pytest.mark.parametrize("lab", ["train"], indirect=True)
def test_worker_asked_to_end(lab, recovered):
    first = lab.worker(held("train", 3))
    build = lab.build()
    lab.reached("train")
    began = time.monotonic()
    first.terminate()
    lab.worker()
    assert first.ended() == 0
    recovered(build, began)
    run = lab.check()
    assert {step.attempts for step in run.steps} <= {0, 1}


CANCELLED = {"training": ("train", 3), "publish": ("publish", 1)}


@pytest.mark.parametrize(
    ("lab", "kind", "at"),
    [(kind, kind, at) for kind, at in CANCELLED.values()],
    ids=CANCELLED,
    indirect=["lab"],
)
def test_cancel_of_a_silent_step(lab, recovered, kind, at):
    """The step reports nothing any more; it is stopped all the same, and the same command goes on there."""
    worker = lab.worker(held(kind, at))
    build = lab.build()
    lab.reached(kind)
    began = time.monotonic()
    request_cancel(lab.settings, lab.run().id)
    assert build.ended() == 130
    TOOK[f"cancel in {kind}"] = time.monotonic() - began
    assert lab.run().status == "cancelled"
    lab.go()
    began = time.monotonic()
    recovered(lab.build(), began)
    assert worker.alive()
    lab.check()


def test_redis_restarts(lab, recovered, keeping_redis):
    lab.worker(held("shard"))
    build = lab.build()
    lab.reached("shard")
    began = time.monotonic()
    keeping_redis.stop()
    lab.go()
    keeping_redis.start()
    recovered(build, began)
    lab.check()


def test_redis_is_empty_after_its_restart(lab, recovered, keeping_redis):
    lab.worker(held("shard"))
    build = lab.build()
    lab.reached("shard")
    began = time.monotonic()
    keeping_redis.stop()
    keeping_redis.lose()
    keeping_redis.start()
    lab.go()
    recovered(build, began)
    lab.check()


def test_postgres_restarts(lab, recovered, postgres_server):
    lab.worker(held("shard"))
    build = lab.build()
    lab.reached("shard")
    began = time.monotonic()
    postgres_server.stop()
    lab.go()
    time.sleep(1)
    postgres_server.start()
    recovered(build, began)
    lab.check()


def test_network_to_the_broker_is_cut(lab, recovered, keeping_redis):
    proxy = Proxy(keeping_redis.port)
    url = f"redis://127.0.0.1:{proxy.port}/0"
    try:
        lab.worker(held("shard"), ATLAS_BROKER_URL=url)
        build = lab.build()
        lab.reached("shard")
        proxy.cut()
        lab.go()
        time.sleep(CUT_SECONDS)
        began = time.monotonic()
        proxy.mend()
        recovered(build, began)
        lab.check()
    finally:
        proxy.close()


@pytest.mark.parametrize("lab", ["shard"], indirect=True)
def test_disk_full(lab, recovered):
    first = lab.worker({"do": "disk", "kind": "publish", "bytes": 200_000})
    build = lab.build()
    assert build.ended() == 2
    assert "cannot" in build.said
    assert "File too large" in build.said or "No space" in build.said
    first.kill()
    began = time.monotonic()
    lab.worker()
    recovered(lab.build(), began)
    lab.check()


@pytest.mark.parametrize("hours", [1, -1])
def test_clock_jumps(lab, recovered, hours):
    """A second worker takes the first for dead and its step for left; both live, and one of them yields."""
    lab.worker(held("shard"))
    build = lab.build()
    lab.reached("shard")
    began = time.monotonic()
    lab.clock(hours)
    lab.worker(ATLAS_TEST_HOST="elsewhere")
    time.sleep(2)
    lab.go()
    recovered(build, began)
    lab.check()


HOURS = [1, -1, pytest.param(0, marks=pytest.mark.skipif(CUT_SECONDS < 30, reason="takes a minute"))]


@pytest.mark.parametrize("hours", HOURS)
def test_worker_dies_elsewhere(lab, recovered, hours):
    """Of another machine's worker nothing is known but its lease; a clock that jumps must not prolong it."""
    first = lab.worker(held("shard"), ATLAS_TEST_HOST="elsewhere")
    build = lab.build()
    lab.reached("shard")
    assert next(step for step in lab.run().steps if step.status == "running").lease_owner.startswith(
        "elsewhere/"
    )
    first.kill()
    if hours:
        lab.clock(hours)
    began = time.monotonic()
    lab.worker()
    recovered(build, began)
    run = lab.check()
    assert sorted(step.attempts for step in run.steps if step.kind == "shard") == [1, 2]


def test_two_builds_of_one_plan(lab, recovered):
    lab.worker()
    began = time.monotonic()
    builds = [lab.build(), lab.build()]
    for build in builds:
        recovered(build, began)
    run = lab.check()
    assert {step.attempts for step in run.steps} <= {0, 1}


def test_two_builds_of_one_plan_in_process(lab, recovered):
    began = time.monotonic()
    first = lab.build(held("shard"), ATLAS_BROKER_URL="")
    lab.reached("shard")
    second = lab.build(ATLAS_BROKER_URL="")
    wait_until("the second build waits", lambda: len(lab.run().steps) > 0)
    lab.go()
    for build in (first, second):
        recovered(build, began)
    run = lab.check()
    assert {step.attempts for step in run.steps} <= {0, 1}


@pytest.mark.parametrize("lab", ["effects"], indirect=True)
def test_shard_is_corrupted(lab, recovered):
    path = max((lab.home / "steps").glob("shard-*/acts-*/*"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x10
    path.write_bytes(content)
    lab.worker()
    build = lab.build()
    assert build.ended() == 2
    assert "was changed on the disk" in build.said
    began = time.monotonic()
    recovered(lab.build(), began)
    lab.check()


@pytest.mark.parametrize("lab", ["summarise"], indirect=True)
def test_reader_during_publish(lab, recovered):
    """Readers see the old release or the new one, each whole, at every moment."""
    assert lab.build(config=lab.reference.other, ATLAS_BROKER_URL="").ended() == 0
    seen, over = [], threading.Event()

    def read():
        while not over.is_set():
            info = current(lab.settings.releases, "docs-2l")
            with open_release(info.path) as connection:
                rows = connection.execute("SELECT table_name, rows FROM manifest").fetchall()
                counts = [
                    connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name, _ in rows
                ]
            assert counts == [n for _, n in rows]
            seen.append(info.version)

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        began = time.monotonic()
        build = lab.build(held("publish", 2), ATLAS_BROKER_URL="")
        lab.reached("publish")
        lab.go()
        recovered(build, began)
        wait_until("the new release is read", lambda: 2 in seen)
        over.set()
        for reader in readers:
            reader.result()
    assert set(seen) == {1, 2}
    lab.check()


def test_out_of_memory(lab, recovered):
    """Products of another shape may round their last bit otherwise, so tables are compared by value here."""
    began = time.monotonic()
    lab.worker({"do": "memory", "kind": "shard", "times": 2})
    build = lab.build()
    recovered(build, began)
    assert "batches of 1/4" in lab.started[0].said, lab.started[0].said
    run = lab.check(tables_of(lab.home))
    assert {step.attempts for step in run.steps} <= {0, 1}
    found, wanted = (values_of(home) for home in (lab.home, lab.reference.home))
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert found[key] == pytest.approx(values, rel=1e-4, abs=1e-6, nan_ok=True), key


def test_connection_breaks_in_process(lab, recovered):
    began = time.monotonic()
    build = lab.build({"do": "flaky", "kind": "effects", "times": 2}, ATLAS_BROKER_URL="")
    recovered(build, began)
    run = lab.check()
    assert [step.attempts for step in run.steps if step.kind == "effects"] == [3]
    assert "ConnectionResetError: injected" in build.said
