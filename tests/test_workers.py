"""Real worker processes, fed through a real Redis, with the database deciding who does what."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner

from atlas.cli.status import cancel, status
from atlas.cli.worker import submit, wait, worker
from atlas.cli.workers import workers as workers_command
from atlas.db.engine import UnreachableError, close_engines
from atlas.db.leases import claim_step, request_cancel
from atlas.db.owner import new_owner
from atlas.db.runs import create_run, load_run, unsent_steps
from atlas.db.workers import list_workers
from atlas.errors import AtlasError, Cancelled, ConfigError, ConflictError
from atlas.pipeline.retries import MAX_ATTEMPTS, is_transient
from atlas.queue import BrokerError, make_app, send_ready, send_steps
from atlas.settings import load_settings
from tests.servers import broker, database, empty_database, postgres_server, redis_server, wait_until
from tests.workers_plan import attempts, diamond, fake_plan, install, outputs, step, write_plan
from workers.steps import housekeep, run_one

pytestmark = pytest.mark.server
WORKER = Path(__file__).with_name("workers_plan.py")
ENDLESS = "slow:3600"
"""A step that reports progress for longer than any test may take: it ends only by what the test does."""


@pytest.fixture
def settings(tmp_path, broker):
    yield load_settings({"ATLAS_HOME": str(tmp_path / "home"), "ATLAS_BROKER_URL": broker})
    close_engines()


@pytest.fixture
def fake_pipeline(monkeypatch):
    for name in ("atlas.pipeline.plan", "atlas.pipeline.execute"):
        monkeypatch.setitem(sys.modules, name, None)  # monkeypatch puts the real ones back
    install()


def start_worker(settings, *options):
    environment = {
        **os.environ,
        "ATLAS_HOME": str(settings.home),
        "ATLAS_BROKER_URL": settings.broker_url,
        "ATLAS_DATABASE_URL": settings.database_url,
    }
    log = (settings.home / "worker.log").open("ab")
    return subprocess.Popen(
        [sys.executable, str(WORKER), *options],
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


@pytest.fixture
def workers(settings):
    """Starts workers and ends what is left of them, children too."""
    started = []

    def start(*options, with_settings=settings):
        settings.home.mkdir(parents=True, exist_ok=True)
        started.append(start_worker(with_settings, *options))
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def states(settings, run_id):
    return {s.name: s.status for s in load_run(settings, run_id).steps}


def ended(settings, run_id):
    return lambda: load_run(settings, run_id).ended


def queued(broker):
    with redis.Redis.from_url(broker) as client:
        return {name: client.llen(name) for name in ("cpu", "gpu", "io")}


def test_a_real_worker_carries_out_a_plan(settings, workers, capsys):
    plan = fake_plan()
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    assert queued(settings.broker_url) == {"cpu": 1, "gpu": 0, "io": 0}
    process = workers("--concurrency", "2")
    wait_until(
        "a worker takes the first step", lambda: states(settings, run_id)["a"] != "ready", process=process
    )
    run = wait(run_id, settings)
    assert run.status == "done"
    assert {s.status for s in run.steps} == {"done"}
    assert [s.attempts for s in run.steps] == [1, 1, 1, 1]
    assert all(s.peak_rss_mb and s.total == s.done == 3 for s in run.steps)
    assert attempts(settings)[0] == "a"
    assert attempts(settings)[-1] == "d"
    assert outputs(settings) == ["a", "b", "c", "d"]
    assert "d: done" in capsys.readouterr().err
    # The parent forks children, so it must never have loaded torch.
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()


def test_a_worker_answers_its_health_check(settings, workers):
    process = workers("--name", "worker")
    environment = {**os.environ, "ATLAS_BROKER_URL": settings.broker_url, "ATLAS_HOME": str(settings.home)}
    options = ["inspect", "ping", "--timeout", "2", "--destination", f"worker@{socket.gethostname()}"]
    command = [sys.executable, "-m", "celery", "--app", "workers.app", *options]

    def healthy():
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode == 0 and "pong" in done.stdout

    wait_until("the worker answers", healthy, process=process)
    process.terminate()
    assert process.wait() == 0
    assert not healthy()


def test_queues_are_served_by_those_who_said_so(settings, workers):
    plan = fake_plan([step("a"), step("g", queue="gpu")])
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    first = workers("--queues", "cpu")
    wait_until("a is done", lambda: states(settings, run_id)["a"] == "done", process=first)
    time.sleep(0.5)
    assert states(settings, run_id)["g"] == "ready"
    assert queued(settings.broker_url)["gpu"] == 1
    second = workers("--queues", "gpu,io")
    wait_until("the run ends", ended(settings, run_id), process=second)
    assert states(settings, run_id) == {"a": "done", "g": "done"}


def test_a_killed_child_is_replaced_and_its_step_done_again(settings, workers):
    plan = fake_plan(diamond(b="die:1"))
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    process = workers()
    wait_until("the run ends", ended(settings, run_id), process=process)
    assert load_run(settings, run_id).status == "done"
    assert attempts(settings).count("b") == 2
    assert attempts(settings).count("a") == 1


def test_a_killed_worker_is_replaced_by_another(settings, workers):
    plan = fake_plan(diamond(a=ENDLESS))
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    first = workers()
    wait_until("a runs", lambda: load_run(settings, run_id).steps[0].done > 0, process=first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    write_plan(settings, fake_plan())  # the second time it is quick
    second = workers()
    wait_until("the run ends", ended(settings, run_id), process=second)
    assert load_run(settings, run_id).status == "done"
    assert attempts(settings).count("a") == 2


def test_cancel_stops_a_running_step_soon(settings, workers):
    plan = fake_plan(diamond(a=ENDLESS))
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    process = workers()
    wait_until("a runs", lambda: load_run(settings, run_id).steps[0].done > 0, process=process)
    environment = {"ATLAS_HOME": str(settings.home)}
    said = CliRunner().invoke(status, [run_id], env={**environment, "COLUMNS": "200"})
    assert "running" in said.output
    assert "/s" in said.output
    said = CliRunner().invoke(cancel, [run_id], env=environment)
    assert "is stopping: a" in said.output
    with pytest.raises(Cancelled):
        wait(run_id, settings)
    assert set(states(settings, run_id).values()) == {"cancelled"}
    assert outputs(settings) == []


def test_done_in_process_step_by_step(settings, fake_pipeline):
    plan = fake_plan()
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    assert run_one(settings, run_id, "b") == "not mine"
    assert run_one(settings, run_id, "a") == "done"
    assert queued(settings.broker_url) == {"cpu": 1, "gpu": 1, "io": 1}
    assert run_one(settings, run_id, "a") == "not mine"
    assert attempts(settings) == ["a"]


def test_bad_input_is_final_and_stops_only_what_needs_it(settings, fake_pipeline):
    plan = fake_plan(diamond(b="bad_input"))
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    assert run_one(settings, run_id, "a") == "done"
    assert run_one(settings, run_id, "b") == "failed"
    assert states(settings, run_id) == {"a": "done", "b": "failed", "c": "ready", "d": "cancelled"}
    assert run_one(settings, run_id, "c") == "done"
    run = load_run(settings, run_id)
    assert run.status == "failed"
    assert run.error == "b: corpus 'x' is empty; allowed: at least one block"
    with pytest.raises(AtlasError, match="corpus 'x' is empty"):
        wait(run_id, settings)
    assert attempts(settings).count("b") == 1


def test_a_bug_is_final_and_recorded(settings, fake_pipeline):
    plan = fake_plan([step("a", do="bug")])
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    assert run_one(settings, run_id, "a") == "failed"
    assert load_run(settings, run_id).steps[0].error == "TypeError: a bug of two lines"


def test_a_passing_failure_is_tried_again(settings, fake_pipeline):
    plan = fake_plan([step("a", do="flaky:2")])
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    assert [run_one(settings, run_id, "a") for _ in range(4)] == ["failed", "failed", "done", "not mine"]
    assert load_run(settings, run_id).status == "done"
    assert queued(settings.broker_url)["cpu"] == 3


def test_a_failure_that_never_passes_ends(settings, fake_pipeline):
    plan = fake_plan([step("a", do="flaky:99")])
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    for _ in range(MAX_ATTEMPTS):
        assert load_run(settings, run_id).status != "failed"
        assert run_one(settings, run_id, "a") == "failed"
    assert load_run(settings, run_id).status == "failed"


def test_waiting_for_another_is_no_failure(settings, fake_pipeline):
    plan = fake_plan([step("a", do="busy:9")])
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    assert [run_one(settings, run_id, "a") for _ in range(10)] == ["failed"] * 9 + ["done"]
    assert load_run(settings, run_id).steps[0].attempts == 1


def test_a_step_that_kills_its_holders_is_given_up(settings, fake_pipeline):
    plan = fake_plan([step("a")])
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    for _ in range(MAX_ATTEMPTS):
        assert claim_step(settings, run_id, "a", new_owner(), now=long_ago)
        long_ago += timedelta(minutes=5)
    assert run_one(settings, run_id, "a") == "failed"
    assert "given up after 5 attempts" in load_run(settings, run_id).error
    assert attempts(settings) == []


def test_another_version_of_the_plan_is_refused(settings, fake_pipeline):
    plan = fake_plan([step("a")])
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    write_plan(settings, fake_plan([replace(plan.steps[0], digest="other")]))
    assert run_one(settings, run_id, "a") == "failed"
    assert "run the same version" in load_run(settings, run_id).error


def test_housekeeping_sends_what_was_lost(settings, fake_pipeline):
    plan = fake_plan([step("a"), step("b")])
    write_plan(settings, plan)
    run = create_run(settings, plan, executor="queue")
    assert claim_step(settings, run.id, "b", "elsewhere/1/1/x", now=datetime.now(UTC) - timedelta(hours=1))
    housekeep(settings)
    assert states(settings, run.id) == {"a": "ready", "b": "ready"}
    assert queued(settings.broker_url)["cpu"] == 2
    housekeep(settings)
    assert queued(settings.broker_url)["cpu"] == 2


def test_housekeeping_leaves_runs_of_this_process_alone(settings, fake_pipeline):
    run = create_run(settings, fake_plan(), executor="local")
    housekeep(settings)
    assert queued(settings.broker_url) == {"cpu": 0, "gpu": 0, "io": 0}
    assert load_run(settings, run.id).steps[0].enqueued_at is None


def test_a_broker_that_is_gone_is_one_line_and_loses_nothing(settings):
    gone = replace(settings, broker_url="redis://:secret@127.0.0.1:1/0")
    plan = fake_plan()
    with pytest.raises(BrokerError, match="cannot be reached") as caught:
        submit(plan, gone)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [s.name for s in unsent_steps(settings, resend_after=600)] == ["a"]
    run_id = submit(plan, settings)  # joins the run that is there
    assert queued(settings.broker_url)["cpu"] == 1
    assert len(unsent_steps(settings, resend_after=600)) == 0
    assert load_run(settings, run_id).status == "pending"


def test_messages_carry_names_only(settings):
    submit(fake_plan(), settings)
    with redis.Redis.from_url(settings.broker_url) as client:
        (message,) = client.lrange("cpu", 0, -1)
    assert b"application/json" in message
    conf = make_app(settings).conf
    assert conf.accept_content == ["json"]
    assert conf.task_acks_late
    assert conf.task_reject_on_worker_lost
    assert conf.worker_prefetch_multiplier == 1
    assert conf.worker_proc_alive_timeout == 60
    assert conf.broker_transport_options["visibility_timeout"] == 24 * 3600


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (UnreachableError("x"), True),
        (ConflictError("locked by 12"), True),
        (TimeoutError(), True),
        (ConfigError("x"), False),
        (OSError(28, "No space left on device"), False),
        (MemoryError(), False),
    ],
)
def test_what_may_pass(error, transient):
    assert is_transient(error) is transient
    wrapped = AtlasError("x")
    wrapped.__cause__ = error
    assert is_transient(wrapped) is transient


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ([], {}, "ATLAS_BROKER_URL is not set"),
        (
            ["--queues", "cpu,tpu"],
            {"ATLAS_BROKER_URL": "redis://h"},
            "queue 'tpu' is not known; allowed: cpu",
        ),
    ],
)
def test_wrong_worker_options(options, environment, message):
    result = CliRunner().invoke(worker, options, env=environment)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_a_worker_that_ends_hands_its_step_back_at_once(settings, workers):
    plan = fake_plan(diamond(a=ENDLESS))
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    first = workers()
    wait_until("a runs", lambda: load_run(settings, run_id).steps[0].done > 0, process=first)
    first.terminate()
    assert first.wait() == 0
    step_a = load_run(settings, run_id).steps[0]
    assert (step_a.status, step_a.attempts) == ("ready", 0)
    assert "handed back: its worker ends" in step_a.error
    assert list_workers(settings) == []
    write_plan(settings, fake_plan())  # the second time it is quick
    second = workers()
    wait_until("the run ends", ended(settings, run_id), process=second)
    assert load_run(settings, run_id).status == "done"
    assert attempts(settings).count("a") == 2


def test_a_silent_step_stops_within_seconds(settings, workers):
    plan = fake_plan([step("a", do="silent:3600")])
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    process = workers()
    wait_until("a runs", lambda: attempts(settings) == ["a"], process=process)
    request_cancel(settings, run_id)
    wait_until("the run ends", ended(settings, run_id), process=process)
    assert states(settings, run_id) == {"a": "cancelled"}


def test_workers_say_what_they_are(settings, workers):
    plan = fake_plan([step("a", do=ENDLESS)])
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    process = workers("--name", "one", "--queues", "cpu,interactive")
    wait_until("a runs", lambda: load_run(settings, run_id).steps[0].done > 0, process=process)
    (row,) = list_workers(settings)
    assert row.name == f"one@{socket.gethostname()}"
    assert (row.pid, row.alive, row.concurrency) == (process.pid, True, 1)
    assert set(row.queues) == {"cpu", "interactive"}
    assert row.device.startswith(("cpu, ", "cuda"))
    assert row.steps == (f"{run_id} a",)
    said = CliRunner().invoke(workers_command, env={"ATLAS_HOME": str(settings.home), "COLUMNS": "300"})
    assert all(word in said.output for word in ("one@", "cpu,interactive", f"{run_id} a", "alive"))
    later = datetime.now(UTC) + timedelta(seconds=3600)
    assert [(w.alive, w.steps) for w in list_workers(settings, now=later)] == [(False, ())]
