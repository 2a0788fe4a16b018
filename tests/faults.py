"""The harness of the fault tests: a tiny build, its undisturbed result, and a lab that can be disturbed."""

import argparse
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psycopg

from atlas.db.annotations import load_head, save_head
from atlas.db.engine import UnreachableError
from atlas.db.notes import HeadAnnotation
from atlas.db.runs import list_runs, load_run
from atlas.settings import load_settings
from atlas.store.connection import open_release
from atlas.store.release import current
from tests.servers import PATIENCE, wait_until

PROCESSES = Path(__file__).with_name("fault_processes.py")
KINDS = ("tokens", "train", "evaluate", "heads", "shard", "effects", "summarise", "dfa", "attribute")
"""Kinds of steps in the order of a build; reference and publish are made in every test."""
CONFIG = """
[model]
name = "docs-2l"
[sites]
layers = [0]
[corpus]
source = "{text}"
blocks = 40
context = 32
[[sae]]
d_sae = 32
k = 4
[train]
tokens = 1024
batch = 128
chunk_batches = 2
log_every = 4
checkpoint_seconds = 0
[evaluation]
blocks = 4
[analysis]
blocks = 64
shard_blocks = 32
loss_blocks = 4
"""


class Forge:
    """Starts processes that have torch already."""

    def __init__(self):
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self.process = subprocess.Popen(
            [sys.executable, str(PROCESSES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(self, args, env, log, fault=None):
        request = {"args": args, "env": env, "log": str(log), "fault": fault}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Process(int(self.process.stdout.readline()), Path(log))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Process:
    """A process of the forge with those that it forks, in a process group of their own."""

    def __init__(self, pid, log):
        self.pid, self.log = pid, log

    @property
    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def alive(self):
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self):
        """As a machine that loses power: no process of it does anything any more."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        wait_until("the killed process is gone", lambda: not self.alive())

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)

    def ended(self, seconds=PATIENCE):
        wait_until(f"the end of {self.log.name}", lambda: not self.alive(), seconds)
        return int(Path(f"{self.log}.code").read_text())


class Annotator:
    """Somebody who writes notes all the while, and again when the database does not answer."""

    def __init__(self, settings):
        self.settings, self.saved, self.errors = settings, {}, []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._write)
        self.thread.start()

    def _write(self):
        number = 0
        while not self.over.wait(0.1):
            note = HeadAnnotation("docs-2l", number // 8, number % 8, "ann", label=f"note {number}")
            try:
                self.saved[note.layer, note.head] = save_head(self.settings, note, 0).label
                number += 1
            except UnreachableError:
                continue
            except Exception as error:  # noqa: BLE001 (shown by check)
                self.errors.append(error)
                number += 1

    def stop(self):
        self.over.set()
        self.thread.join()

    def check(self):
        """Every note whose saving was confirmed is there."""
        assert self.errors == []
        assert self.saved
        for (layer, head), label in self.saved.items():
            assert load_head(self.settings, "docs-2l", layer, head, "ann").label == label


class Reference:
    """An undisturbed build: what every disturbed one has to end as, and the outputs to begin with."""

    def __init__(self, folder, forge):
        self.folder, self.forge = folder, forge
        text = folder / "text.txt"
        text.write_text("\n\n".join(inspect.getsource(m) for m in (argparse, inspect)))
        self.config = folder / "build.toml"
        self.config.write_text(CONFIG.format(text=text))
        self.other = folder / "other.toml"
        self.other.write_text(self.config.read_text().replace("loss_blocks", "seed = 1\nloss_blocks"))
        self.home = folder / "undisturbed"
        environment = {"ATLAS_HOME": str(self.home), "ATLAS_THREADS": "1"}
        done = forge.start(["build", str(self.config)], environment, folder / "undisturbed.log")
        assert done.ended() == 0, done.said
        self.tables = tables_of(self.home)

    def begin(self, home, before):
        """Give a home the outputs of all steps before a kind."""
        (home / "steps").mkdir(parents=True)
        first = KINDS[: KINDS.index(before)] if before in KINDS else KINDS
        for kind in {*first, "heads"}:  # heads need no SAE, and take longest
            for output in (self.home / "steps").glob(f"{kind}-*"):
                shutil.copytree(output, home / "steps" / output.name)


def tables_of(home):
    """Rows and digest of every table, and the digest of the whole release."""
    info = current(home / "releases", "docs-2l")
    with open_release(info.path) as connection:
        return info.digest, connection.execute("SELECT * FROM manifest ORDER BY ALL").fetchall()


def values_of(home):
    """What the text says of each feature, and each kept example, by its key."""
    features = "n_active, density, max_activation, mean_activation, loss_effect, bos, local, distance"
    with open_release(current(home / "releases", "docs-2l").path) as connection:
        rows = connection.execute(
            f"SELECT sae, feature, {features} FROM features LEFT JOIN dfa_summary USING (sae, feature)"
        ).fetchall()
        rows += connection.execute(
            "SELECT sae, feature, example_group, rank, block, position, activation FROM examples"
        ).fetchall()
    return {
        tuple(value for value in row if isinstance(value, int | str)): [
            value for value in row if isinstance(value, float)
        ]
        for row in rows
    }


class Lab:
    """One home, database and broker with its processes."""

    def __init__(self, reference, home, database_url, broker_url):
        self.reference, self.home = reference, home
        self.environment = {
            "ATLAS_HOME": str(home),
            "ATLAS_DATABASE_URL": database_url,
            "ATLAS_BROKER_URL": broker_url,
            "ATLAS_THREADS": "1",
        }
        self.settings = load_settings(self.environment)
        self.started = []
        self.home.mkdir(exist_ok=True)
        self.annotator = Annotator(self.settings)

    def _start(self, name, args, fault=None, **environment):
        log = self.home / f"{name}-{len(self.started)}.log"
        process = self.reference.forge.start(args, {**self.environment, **environment}, log, fault)
        self.started.append(process)
        return process

    def worker(self, fault=None, **environment):
        return self._start("worker", ["worker", "--name", f"w{len(self.started)}"], fault, **environment)

    def build(self, fault=None, config=None, **environment):
        return self._start("build", ["build", str(config or self.reference.config)], fault, **environment)

    def clock(self, hours):
        """Set the database's clock, the one that counts: our function of that name comes before its own."""
        with psycopg.connect(self.settings.database_url, autocommit=True) as connection:
            connection.execute(
                "CREATE OR REPLACE FUNCTION jump.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS "
                f"$$SELECT pg_catalog.clock_timestamp() + interval '{hours} hour'$$"
            )

    def run(self):
        """The newest run with its steps; None before there is one."""
        runs = list_runs(self.settings)
        return load_run(self.settings, runs[0].id) if runs else None

    def reached(self, kind, seconds=PATIENCE):
        wait_until(f"a step reaches its fault in {kind}", (self.home / f"reached-{kind}").exists, seconds)

    def go(self):
        (self.home / "go").touch()

    def check(self, tables=None):
        """The same tables as undisturbed (or those given), every note, nothing left over, nothing to do."""
        self.annotator.stop()
        tables = tables or self.reference.tables
        assert tables_of(self.home) == tables
        run = self.run()
        assert {step.status for step in run.steps} <= {"done", "skipped"}, run
        self.annotator.check()
        for process in self.started:
            process.kill()
        cleaned = self._start("gc", ["gc", "--keep-hours", "0"])
        assert cleaned.ended() == 0, cleaned.said
        hidden = [p.name for root in ("steps", "releases") for p in (self.home / root).rglob(".*")]
        assert set(hidden) <= {".lock"}, hidden
        outputs = {path.name for path in (self.home / "steps").iterdir()}
        assert outputs == {f"{step.kind}-{step.digest[:16]}" for step in run.steps}
        assert tables_of(self.home) == tables
        return run

    def close(self):
        self.annotator.stop()
        for process in self.started:
            process.kill()


def seconds_since(began):
    return time.monotonic() - began
