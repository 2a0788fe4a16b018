"""Two workers that share no disk, over S3, Redis and PostgreSQL, make the release of one process alone."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import argparse
import inspect
import json
import os
from pathlib import Path

import pytest

from atlas.configs import BuildConfig
from atlas.db.engine import close_engines
from atlas.db.schema import upgrade
from atlas.pipeline.local import run_local
from atlas.pipeline.plan import make_plan
from atlas.settings import load_settings
from atlas.store import published
from atlas.store.lake.lake import Lake
from tests.builds import Quiet
from tests.s3_server import bucket, s3_server
from tests.servers import broker, postgres_server, redis_server, wait_until
from tests.test_workers_build import ATLAS, atlas, holding, kill, steps_of_newest

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
chunk_batches = 4
checkpoint_seconds = 0
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

        def start(self, *arguments, program=ATLAS):
            with (tmp_path / "log").open("ab") as log:
                options = {"stdout": log, "stderr": log, "start_new_session": True}
                started.append(atlas(self.environment, *arguments, program=program, **options))
            return started[-1]

        def start_worker(self):
            """It waits in training: two chunks after where it began, with the state after the first saved."""
            self.worker = self.start("worker", program=holding("train", 3))

        def waits(self):
            return (self.settings.home / "reached-train").exists()

    yield Machine
    for process in started:
        kill(process)


def test_two_machines_without_a_shared_disk(tmp_path, config, machine):
    one, two, client = machine("one"), machine("two"), machine("client")
    upgrade(client.settings)
    one.start_worker()
    two.start_worker()
    build = client.start("build", config)
    states = Lake(client.settings).states

    def uploaded():
        return any(states.remote.read(f"scratch/{name}/state.json") for name in states.names())

    wait_until("one of them trains", lambda: one.waits() or two.waits(), process=build)
    wait_until("a state of the training is in the lake", uploaded, process=build)
    dead, left = (one, two) if one.waits() else (two, one)
    kill(dead.worker)

    def taken_over():
        train = steps_of_newest(client.settings)["train"]
        return (train.attempts, train.done) == (2, 3 * 4)  # begun anew, it would wait after two chunks of 4

    wait_until("the training goes on", taken_over, process=left.worker)
    (left.settings.home / "go").touch()
    assert build.wait() == 0, (tmp_path / "log").read_text()
    steps = steps_of_newest(client.settings)
    assert {s.status for s in steps.values()} == {"done"}
    assert {name for name, s in steps.items() if s.attempts != 1} == {"train"}

    alone = load_settings({"ATLAS_HOME": str(tmp_path / "alone"), "ATLAS_THREADS": "1"})
    run_local(make_plan(BuildConfig.from_toml(Path(config)), alone), alone, Quiet)
    assert published.current(alone).digest == published.current(client.settings).digest
    assert not (tmp_path / "alone" / "lake").exists()
    assert not (tmp_path / "client" / "steps").exists()
    assert states.names() == []
