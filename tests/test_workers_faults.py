"""Servers that go away in the middle: the work goes on when they are back, and nothing is done wrongly."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from atlas.cli.worker import submit
from atlas.db.engine import close_engines
from atlas.db.runs import create_run, load_run
from atlas.db.schema import upgrade
from tests.servers import RedisServer, broker, postgres_server, redis_server, wait_until
from tests.test_workers import fake_pipeline, settings, workers
from tests.workers_plan import attempts, diamond, fake_plan, outputs, write_plan
from workers.steps import run_one

pytestmark = pytest.mark.server


def test_redis_comes_back_empty_while_a_step_runs(settings, workers):
    own = RedisServer()
    own.start()
    mine = replace(settings, broker_url=own.url)
    plan = fake_plan(diamond(a="slow:6"))
    write_plan(mine, plan)
    try:
        run_id = submit(plan, mine)
        process = workers(with_settings=mine)
        wait_until("a runs", lambda: load_run(mine, run_id).steps[0].done > 0, process=process)
        own.stop()
        time.sleep(1)
        own.start()
        wait_until("the run ends", lambda: load_run(mine, run_id).ended, process=process)
    finally:
        own.stop()
    run = load_run(mine, run_id)
    assert run.status == "done"
    assert outputs(mine) == ["a", "b", "c", "d"]
    assert [s.attempts for s in run.steps] == [1, 1, 1, 1]


def test_postgres_restarts_while_a_step_runs(settings, fake_pipeline, postgres_server):
    mine = replace(settings, database_url=postgres_server.database())
    upgrade(mine)
    plan = fake_plan(diamond(a="slow:4"))
    write_plan(mine, plan)
    run_id = create_run(mine, plan).id
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(run_one, mine, run_id, "a")
        wait_until("a runs", lambda: load_run(mine, run_id).steps[0].done > 0)
        postgres_server.stop()
        time.sleep(1)
        postgres_server.start()
        assert working.result() == "done"
    run = load_run(mine, run_id)
    assert [s.status for s in run.steps] == ["done", "ready", "ready", "pending"]
    assert attempts(mine) == ["a"]
