"""Two workers that share no disk, over S3, Redis and PostgreSQL, make the release of one process alone."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import argparse
import inspect
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from atlas.configs import BuildConfig
from atlas.db.engine import close_engines
from atlas.db.runs import list_runs, load_run
from atlas.db.schema import upgrade
from atlas.pipeline.local import run_local
from atlas.pipeline.plan import make_plan
from atlas.settings import load_settings
from atlas.store import published
from atlas.store.lake.lake import Lake
from tests.builds import Quiet
from tests.s3_server import bucket, s3_server
from tests.servers import broker, postgres_server, redis_server, wait_until

pytestmark = [pytest.mark.server, pytest.mark.slow]

CONFIG = """
[model]
name = "docs-2l"
[corpus]
source = "{text}"
blocks = 64
context = 64
[[sae]]
d_sae = 64
k = 8
[train]
tokens = 40000
batch = 512
checkpoint_seconds = 0.2
[evaluation]
blocks = 4
[analysis]
blocks = 16
shard_blocks = 8
loss_blocks = 4
coactivation_blocks = 8
"""


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(inspect.getsource(m) for m in (argparse, inspect, json.encoder)))
    path = tmp_path / "build.toml"
    path.write_text(CONFIG.format(text=text))
    yield str(path)
    close_engines()


@pytest.fixture
def machine(tmp_path, broker, bucket, s3_server, postgres_server):
    """Starts processes of a machine of its own: another home, the same servers."""
    database, started = postgres_server.database(), []

    class Machine:
        def __init__(self, name):
            self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("ATLAS_", "AWS_"))}
            self.environment |= s3_server.environment() | {
                "ATLAS_HOME": str(tmp_path / name),
                "ATLAS_BROKER_URL": broker,
                "ATLAS_DATABASE_URL": database,
                "ATLAS_LAKE_URL": bucket,
                "ATLAS_LAKE_SECONDS": "0.2",
                "OMP_NUM_THREADS": "1",
                "ATLAS_THREADS": "1",
            }
            self.settings = load_settings(self.environment)

        def start(self, *arguments):
            with (tmp_path / "log").open("ab") as log:
                command = [sys.executable, "-m", "atlas", *arguments]
                process = subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=log, start_new_session=True
                )
            started.append(process)
            return process

        def start_worker(self):
            self.worker = self.start("worker")

    yield Machine
    for process in started:
        kill(process)


def kill(process):
    """As a machine that loses power."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def steps_of_newest(settings):
    runs = list_runs(settings)
    return {s.name: s for s in load_run(settings, runs[0].id).steps} if runs else {}


def test_two_machines_without_a_shared_disk(tmp_path, config, machine):
    one, two, client = machine("one"), machine("two"), machine("client")
    upgrade(client.settings)
    one.start_worker()
    two.start_worker()
    build = client.start("build", config)
    states, trained = Lake(client.settings).states, []

    def uploaded():
        train = steps_of_newest(client.settings).get("train")
        assert train is None or train.status != "done", "training ended before it was killed"
        trained[:] = [train]
        return any(states.remote.read(f"scratch/{name}/state.json") for name in states.names())

    wait_until("a state of the training is in the lake", uploaded, 240)
    pid = int(trained[0].lease_owner.split("/")[1])
    dead, left = (one, two) if os.getpgid(pid) == one.worker.pid else (two, one)
    kill(dead.worker)

    def taken_over():
        train = steps_of_newest(client.settings)["train"]
        return train.attempts == 2 and train.total > 0 and train.done

    wait_until("the training goes on", taken_over, 180)
    assert (left.settings.steps / f".scratch-{states.names()[0]}" / "training.safetensors").exists()
    assert build.wait(300) == 0, (tmp_path / "log").read_text()
    steps = steps_of_newest(client.settings)
    assert {s.status for s in steps.values()} == {"done"}
    assert {name for name, s in steps.items() if s.attempts != 1} == {"train"}

    alone = load_settings({"ATLAS_HOME": str(tmp_path / "alone"), "ATLAS_THREADS": "1"})
    run_local(make_plan(BuildConfig.from_toml(Path(config)), alone), alone, Quiet)
    assert published.current(alone).digest == published.current(client.settings).digest
    assert not (tmp_path / "alone" / "lake").exists()
    assert not (tmp_path / "client" / "steps").exists()
    assert states.names() == []
