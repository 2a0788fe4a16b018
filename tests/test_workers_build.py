"""A real build of the bundled docs-2l through Redis gives the tables of one in process, also when killed."""

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

from atlas.db.engine import close_engines
from atlas.db.runs import list_runs, load_run
from atlas.settings import load_settings
from tests.servers import broker, redis_server, wait_until

pytestmark = [pytest.mark.server, pytest.mark.slow]

CONFIG = """
[model]
name = "docs-2l"
[corpus]
source = "{text}"
blocks = 96
context = 64
[[sae]]
d_sae = 64
k = 8
[train]
tokens = {tokens}
batch = 512
checkpoint_seconds = 0
[evaluation]
blocks = 8
[analysis]
blocks = 48
shard_blocks = 24
"""
ROOT = Path(__file__).parent.parent
ATLAS = [sys.executable, "-m", "atlas"]
_HOLDING = """import sys
from tests.fault_processes import install
install({"do": "hold", "kind": sys.argv.pop(1), "at": int(sys.argv.pop(1))})
from atlas.cli import main
main()
"""


def holding(kind, at):
    """``atlas``, but a step of this kind waits at its n-th report for ``go`` in the home folder (see Held).

    Its third report in training comes after the first state was saved and before the second.
    """
    return [sys.executable, "-c", _HOLDING, kind, str(at)]


def atlas(environment, *arguments, program=ATLAS, **options):
    return subprocess.Popen([*program, *arguments], env=environment, cwd=ROOT, **options)


@pytest.fixture
def config(tmp_path):
    def write(tokens):
        text = tmp_path / "text.txt"
        text.write_text("\n\n".join(inspect.getsource(m) for m in (argparse, inspect, json.encoder)))
        path = tmp_path / "build.toml"
        path.write_text(CONFIG.format(text=text, tokens=tokens))
        return str(path)

    yield write
    close_engines()


def environment_of(home, broker_url=None):
    bare = {k: v for k, v in os.environ.items() if not k.startswith("ATLAS_")}
    given = {"ATLAS_HOME": str(home), "OMP_NUM_THREADS": "1", "ATLAS_THREADS": "1"}
    return bare | given | ({"ATLAS_BROKER_URL": broker_url} if broker_url else {})


def build(environment, config):
    done = subprocess.run(
        [*ATLAS, "build", config],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def release_digest(home):
    return json.loads((home / "releases" / "docs-2l" / "current.json").read_text())["digest"]


@pytest.fixture
def worker(tmp_path):
    started = []

    def start(environment, program=ATLAS):
        with (tmp_path / "worker.log").open("ab") as log:
            options = {"stdout": log, "stderr": log, "start_new_session": True}
            started.append(atlas(environment, "worker", program=program, **options))
        return started[-1]

    yield start
    for process in started:
        kill(process)


def kill(process):
    """Kill a worker with its children, as a machine that loses power does."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def steps_of_newest(settings):
    runs = list_runs(settings)
    return {s.name: s for s in load_run(settings, runs[0].id).steps} if runs else {}


def test_through_redis_as_in_process_though_a_worker_is_killed_in_training(tmp_path, config, broker, worker):
    path = config(60_000)
    build(environment_of(tmp_path / "here"), path)
    queued = environment_of(tmp_path / "there", broker)
    settings = load_settings(queued)
    first = worker(queued, program=holding("train", 3))
    client = atlas(queued, "build", path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until("training has begun", (tmp_path / "there" / "reached-train").exists, process=first)
    kill(first)
    worker(queued)
    assert client.wait() == 0
    steps = steps_of_newest(settings)
    assert {s.status for s in steps.values()} == {"done"}
    assert {name for name, s in steps.items() if s.attempts != 1} == {"train"}
    assert release_digest(tmp_path / "there") == release_digest(tmp_path / "here")
    assert "everything is current" in build(queued, path).stderr
    assert len(list_runs(settings)) == 1
