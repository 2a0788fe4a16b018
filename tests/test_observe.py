# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
"""Health and metrics against a real Redis and a real worker: the numbers are those of what happened."""

import json
import os
import re
import signal
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from atlas.cli.health import health
from atlas.cli.metrics import metrics
from atlas.cli.worker import submit
from atlas.db.leases import claim_step, heartbeat
from atlas.db.owner import new_owner
from atlas.db.runs import create_run, load_run
from atlas.db.tallies import tally
from atlas.db.workers import WorkerRow, note_worker
from atlas.observe.health import check_health, process_check
from atlas.settings import load_settings
from tests.servers import (
    PATIENCE,
    broker,
    database,
    empty_database,
    free_port,
    postgres_server,
    redis_server,
    wait_until,
)
from tests.test_workers import ended, settings, start_worker, workers
from tests.workers_plan import diamond, fake_plan, step, write_plan

pytestmark = pytest.mark.server


def get(address):
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def answers(address):
    try:
        return get(address)[0] == 200
    except OSError:
        return False


def numbers(text):
    """Samples by name and labels, such as ``atlas_runs[done]``."""
    return {
        f"{s.name}[{','.join(v for _, v in sorted(s.labels.items()))}]": s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def service(settings, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(settings.home))
    monkeypatch.setenv("ATLAS_DATABASE_URL", settings.database_url)
    if settings.broker_url:
        monkeypatch.setenv("ATLAS_BROKER_URL", settings.broker_url)
    done = CliRunner().invoke(metrics, ["--once"])
    assert done.exit_code == 0, done.output
    return numbers(done.output)


def test_a_worker_counts_what_it_did_and_its_server_ends_with_it(settings, workers, monkeypatch):
    port = free_port()
    plan = fake_plan([*diamond(b="flaky:1"), step("x", do="bug"), step("y", "x")])
    write_plan(settings, plan)
    run_id = submit(plan, settings)
    waiting = service(settings, monkeypatch)
    assert waiting["atlas_queue_messages[cpu]"] == 2
    assert waiting["atlas_queue_messages[io]"] == 0
    assert waiting["atlas_workers[alive]"] == 0
    monkeypatch.setenv("ATLAS_LOG_FORMAT", "json")
    process = workers("--metrics-port", str(port))
    address = f"http://127.0.0.1:{port}"
    wait_until("the run ends", ended(settings, run_id), process=process)
    wait_until("the server answers", lambda: answers(f"{address}/healthz"), process=process)
    run = load_run(settings, run_id)
    assert {s.name: s.status for s in run.steps} == {
        "a": "done", "b": "done", "c": "done", "d": "done", "x": "failed", "y": "cancelled"
    }  # fmt: skip
    mine = numbers(get(f"{address}/metrics")[1])
    assert mine["atlas_worker_steps_total[fake,done]"] == 4
    assert mine["atlas_worker_steps_total[fake,failed]"] == 2  # the first attempt of b, and x
    assert mine["atlas_worker_units_total[fake,]"] == 3 * 6  # every attempt reports three units
    assert mine["atlas_worker_step_seconds_count[fake]"] == 6
    assert mine["atlas_worker_step_peak_bytes_count[fake]"] == 6
    log = (settings.home / "worker.log").read_text().splitlines()
    events = [json.loads(line) for line in log if line.startswith("{")]
    of_steps = {(e["run"], e["step"], e["level"]) for e in events if e["logger"].startswith("atlas.")}
    assert of_steps >= {(run_id, name, "INFO") for name in "abcdx"} | {(run_id, "x", "ERROR")}
    assert not any("Traceback" in line for line in log if not line.startswith("{"))
    all_of_it = service(settings, monkeypatch)
    assert all_of_it["atlas_runs[failed]"] == 1
    assert all_of_it["atlas_step_failures_total[fake]"] == 1
    assert all_of_it["atlas_step_attempts_total[]"] == sum(s.attempts for s in run.steps) == 6
    assert all_of_it["atlas_steps[cpu,done]"] + all_of_it["atlas_steps[gpu,done]"] == 3
    assert all_of_it["atlas_steps[io,done]"] == 1
    assert all_of_it["atlas_queue_messages[cpu]"] == 0
    assert all_of_it["atlas_workers[alive]"] == 1
    assert all_of_it["atlas_workers_serving[cpu]"] == 1
    assert all_of_it["atlas_up[broker]"] == all_of_it["atlas_up[database]"] == 1
    code, said = get(f"{address}/healthz")
    assert code == 200
    assert {c["name"] for c in json.loads(said)["checks"]} == {"process", "database", "broker", "home"}
    assert get(f"{address}/else")[0] == 404
    assert CliRunner().invoke(health, ["--worker"], standalone_mode=False).return_value == 0
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until("the server is gone", lambda: not answers(f"{address}/healthz"))


def test_tokens_leases_and_waits_come_from_the_database(database):
    train, shard = (replace_kind(step(name), name) for name in ("train", "shard"))
    run = create_run(database, fake_plan([train, shard]), executor="queue")
    owner = new_owner()
    for name, rate in (("train", 2.0), ("shard", 3.0)):
        claim_step(database, run.id, name, owner)
        heartbeat(database, run.id, name, owner, done=1, total=9, rate=rate)
    found = tally(database)
    assert found.runs == {"running": 1}
    assert found.steps == {("cpu", "running"): 2}
    assert found.attempts == 2
    assert all(0 <= age < PATIENCE for age in found.lease_ages)
    from atlas.observe.collector import ServiceCollector

    collected = {
        (m.name, *s.labels.values()): s.value for m in ServiceCollector(database).collect() for s in m.samples
    }
    assert collected["atlas_tokens_per_second", "train"] == 2.0 * 4096
    assert collected["atlas_tokens_per_second", "shard"] == 3.0 * 128
    assert collected["atlas_up", "database"] == 1


def replace_kind(one, kind):
    return replace(one, kind=kind)


def test_parts_that_are_away_are_down_and_the_rest_is_still_told(tmp_path, monkeypatch):
    settings = load_settings({"ATLAS_HOME": str(tmp_path), "ATLAS_BROKER_URL": "redis://127.0.0.1:9/0"})
    create_run(settings, fake_plan())
    found = service(settings, monkeypatch)
    assert found["atlas_up[broker]"] == 0
    assert found["atlas_up[database]"] == 1
    assert found["atlas_runs[pending]"] == 1
    assert not any(name.startswith("atlas_queue_") for name in found)
    away = replace(settings, database_url="postgresql://atlas:hunter22@127.0.0.1:9/x")
    found = service(away, monkeypatch)
    assert found["atlas_up[database]"] == 0
    assert not any(name.startswith("atlas_runs") for name in found)


def ask_health(*options):
    done = CliRunner().invoke(health, [*options, "--json"], standalone_mode=False)
    said = json.loads(done.output)
    assert said["ok"] == (done.return_value == 0)
    return {check["name"]: (check["ok"], check["said"]) for check in said["checks"]}


def test_health_names_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path))
    well = ask_health()
    assert well["database"] == (True, "SQLite, made when first used")
    assert well["home"][0]
    settings = load_settings()
    port = free_port()
    ill = ask_health("--worker", "--app", "--app-port", str(port))
    assert ill["worker"] == (False, ill["worker"][1])
    assert "no worker" in ill["worker"][1]
    assert str(port) in ill["app"][1]
    import socket

    me = WorkerRow("w@here", socket.gethostname(), os.getpid(), ("cpu",), "cpu", 1, "0")
    note_worker(settings, me)
    assert ask_health("--worker")["worker"] == (True, "w@here")
    assert not ask_health("--worker", "--worker-name", "v")["worker"][0]
    monkeypatch.setenv("ATLAS_LAKE_URL", str(tmp_path / "lake"))
    assert ask_health()["lake"][0]
    monkeypatch.setenv("ATLAS_LAKE_URL", "nothing://user:hunter22@host/x")
    assert not ask_health()["lake"][0]
    monkeypatch.setenv("ATLAS_BROKER_URL", "redis://:hunter22@127.0.0.1:9/0")
    broker_said = ask_health()["broker"]
    assert not broker_said[0]
    assert "hunter22" not in broker_said[1]


def test_health_needs_room_on_the_disk_and_a_database_of_this_schema(tmp_path, monkeypatch):
    from atlas.db import schema

    settings = load_settings({"ATLAS_HOME": str(tmp_path)})
    schema.upgrade(settings)
    schema.downgrade(settings, "0004")
    monkeypatch.setattr("atlas.observe.health.LEAST_FREE", 1e18)
    found = {check.name: check for check in check_health(settings)}
    assert not found["database"].ok
    assert "atlas db upgrade" in found["database"].said
    assert not found["home"].ok
    assert "GB are free" in found["home"].said
    assert not process_check(2**22 + 1).ok
    assert process_check(os.getpid()).ok


DOCUMENT = Path(__file__).parent.parent / "docs" / "operations.md"


def test_the_documented_metrics_are_those_that_are_served(tmp_path, broker):
    from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

    from atlas import meters
    from atlas.observe.collector import ServiceCollector

    registry = CollectorRegistry()
    settings = load_settings({"ATLAS_HOME": str(tmp_path), "ATLAS_BROKER_URL": broker})
    create_run(settings, fake_plan())
    registry.register(ServiceCollector(settings))
    meters.STEPS.labels("x", "done").inc(0)
    served = {}
    for text in (generate_latest(registry), generate_latest(REGISTRY)):
        for family in text_string_to_metric_families(text.decode()):
            if family.name.startswith("atlas_") and not family.name.endswith("_created"):
                served[family.name] = {name for s in family.samples for name in s.labels} - {"le"}
    text = DOCUMENT.read_text()
    table = re.findall(r"^\| `(atlas_\w+?)(?:_total)?(?:\{([\w,]*)\})?` \|", text, re.MULTILINE)
    assert {name for name, _ in table} == set(served)
    for name, labels in table:
        if served[name]:
            assert set(labels.split(",")) == served[name], name
    rules = text.split("```yaml")[1].split("```")[0]
    named = set(re.findall(r"\batlas_\w+", rules))
    assert named
    assert {name.removesuffix("_total") for name in named} <= set(served)
