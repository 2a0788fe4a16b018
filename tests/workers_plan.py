"""A small plan whose steps the test controls, standing in for the pipeline in tests of queue and leases.

``install()`` puts modules in the place of ``atlas.pipeline.plan`` and ``atlas.pipeline.execute``. What a step
does is in ``plan.json`` in the home folder, so that a worker process reads the same plan as the test:
rows of ``name needs queue do``; ``do`` is one of ok, slow:SECONDS, silent:SECONDS, bug, bad_input,
flaky:TIMES, die:TIMES, busy:TIMES.
Every attempt appends a line to ``attempts.log``; every success writes ``out/NAME``.
"""

import json
import os
import signal
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

from atlas.configs import BuildConfig
from atlas.errors import ConflictError, CorpusError


@dataclass(frozen=True)
class FakeStep:
    name: str
    kind: str
    digest: str
    queue: str
    needs: tuple[str, ...]
    do: str = "ok"


@dataclass(frozen=True)
class FakePlan:
    config: BuildConfig
    steps: tuple[FakeStep, ...]


def step(name, *needs, queue="cpu", do="ok"):
    return FakeStep(name, "fake", f"digest-{name}", queue, needs, do)


def diamond(**do):
    """a, then b and c, then d."""
    steps = (step("a"), step("b", "a", queue="io"), step("c", "a", queue="gpu"), step("d", "b", "c"))
    return tuple(step(s.name, *s.needs, queue=s.queue, do=do.get(s.name, "ok")) for s in steps)


def fake_plan(steps=None, release="fake"):
    return FakePlan(BuildConfig(release=release), tuple(diamond() if steps is None else steps))


def write_plan(settings, plan):
    settings.home.mkdir(parents=True, exist_ok=True)
    rows = [s.__dict__ for s in plan.steps]
    (settings.home / "plan.json").write_text(json.dumps(rows))


def make_plan(config, settings):
    rows = json.loads((settings.home / "plan.json").read_text())
    return FakePlan(config, tuple(FakeStep(**{**row, "needs": tuple(row["needs"])}) for row in rows))


def attempts(settings):
    log = settings.home / "attempts.log"
    return log.read_text().split() if log.exists() else []


def outputs(settings):
    return sorted(path.name for path in (settings.home / "out").glob("*"))


def _report(step, progress):
    verb, _, argument = step.do.partition(":")
    steps = int(float(argument) / 0.1) if verb == "slow" else 3
    for done in range(steps + 1):
        progress.update(done, steps, f"{verb} {done}")
        if verb == "slow":
            time.sleep(0.1)


def run_step(plan, name, settings, progress):
    step = next(s for s in plan.steps if s.name == name)
    with (settings.home / "attempts.log").open("a") as log:
        log.write(f"{name}\n")
    tries = attempts(settings).count(name)
    _report(step, progress)
    verb, _, argument = step.do.partition(":")
    if verb == "silent":
        time.sleep(float(argument))
    if verb == "bug":
        raise TypeError("a bug\nof two lines")
    if verb == "bad_input":
        raise CorpusError("corpus 'x' is empty; allowed: at least one block")
    if verb == "flaky" and tries <= int(argument):
        raise CorpusError("corpus 'x' cannot be downloaded") from ConnectionResetError("reset by peer")
    if verb == "busy" and tries <= int(argument):
        raise ConflictError("step is being done by process 12")
    if verb == "die" and tries <= int(argument):
        os.kill(os.getpid(), signal.SIGKILL)
    (settings.home / "out").mkdir(exist_ok=True)
    (settings.home / "out" / name).write_text(step.digest)


def install():
    """Put this plan in the pipeline's place, in this process and the children it forks."""
    for name, members in {"plan": {"make_plan": make_plan}, "execute": {"run_step": run_step}}.items():
        module = types.ModuleType(f"atlas.pipeline.{name}")
        module.__dict__.update(members)
        sys.modules[module.__name__] = module


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    install()
    from atlas.cli.worker import worker

    worker()
