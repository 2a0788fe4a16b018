"""`atlas gc`: what is removed, what is kept, and that running work is left alone."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from click.testing import CliRunner

from atlas.cli.gc import gc
from atlas.db.engine import close_engines
from atlas.db.leases import claim_step, finish_step, request_cancel
from atlas.db.owner import new_owner
from atlas.db.runs import create_run, list_runs
from atlas.errors import ConflictError
from atlas.pipeline import garbage, local
from atlas.pipeline.garbage import collect
from atlas.settings import load_settings
from atlas.store import atomic
from tests.workers_plan import FakePlan, fake_plan, step

HOUR = 3600.0


@pytest.fixture
def settings(tmp_path):
    yield load_settings({"ATLAS_HOME": str(tmp_path / "home")})
    close_engines()


def plan_of(*words, release="fake"):
    """A plan with a step of kind shard for each word."""
    steps = [
        replace(step(word), kind="shard", digest=hashlib.sha256(word.encode()).hexdigest()) for word in words
    ]
    return fake_plan(steps, release)


def folder_of(one):
    return f"{one.kind}-{one.digest[:16]}"


def make_output(settings, name, *, age=48 * HOUR, size=1000):
    folder = settings.steps / name
    folder.mkdir(parents=True)
    (folder / "part.bin").write_bytes(bytes(size))
    (folder / "files.json").write_text(json.dumps({"part.bin": size}))
    (settings.steps / f".lock-{name}").touch()
    return aged(folder, age)


def aged(path, age):
    moment = time.time() - age
    for one in (*path.rglob("*"), path):
        os.utime(one, (moment, moment))
    return path


def make_all(settings, plan: FakePlan, **how):
    return [make_output(settings, folder_of(one), **how) for one in plan.steps]


def run_to_end(settings, plan):
    run = create_run(settings, plan)
    for one in plan.steps:
        owner = new_owner()
        assert claim_step(settings, run.id, one.name, owner)
        finish_step(settings, run.id, one.name, owner)
    return run


def there(settings):
    return sorted(path.name for path in settings.steps.iterdir())


def test_the_newest_run_of_each_release_is_kept_and_older_ones_go(settings):
    old, new, other = plan_of("a", "b"), plan_of("b", "c"), plan_of("d", release="other")
    make_all(settings, plan_of("a", "b", "c", "d"))
    for plan in (old, new, other):
        run_to_end(settings, plan)
    gone = folder_of(old.steps[0])
    kept = sorted(folder_of(one) for one in plan_of("b", "c", "d").steps)
    before = there(settings)
    said = collect(settings, grace=HOUR, dry_run=True)
    assert [(one.name, one.size) for one in said if one.what == "output"] == [
        (gone, 1000 + len('{"part.bin": 1000}'))
    ]
    assert there(settings) == before
    assert collect(settings, grace=HOUR) == said
    assert there(settings) == kept
    assert collect(settings, grace=HOUR) == []


def test_a_stopped_run_and_the_last_whole_one_of_its_release_are_both_kept(settings):
    done, stopped = plan_of("a"), plan_of("b")
    make_all(settings, plan_of("a", "b"))
    run_to_end(settings, done)
    request_cancel(settings, create_run(settings, stopped).id)
    collect(settings, grace=HOUR)
    assert there(settings) == sorted(folder_of(one) for one in plan_of("a", "b").steps)


def test_a_run_under_way_keeps_what_it_needs(settings):
    older, newer = plan_of("a"), plan_of("b")
    make_all(settings, plan_of("a", "b"))
    create_run(settings, older)
    run_to_end(settings, newer)
    collect(settings, grace=HOUR)
    assert len(there(settings)) == 2


def test_young_outputs_and_checkpoints_stay(settings):
    make_output(settings, "shard-" + "0" * 16, age=0.5 * HOUR)
    scratch = settings.steps / (".scratch-train-" + "1" * 16)
    scratch.mkdir()
    (scratch / "training.safetensors").write_bytes(b"x")
    collect(settings, grace=HOUR)
    assert there(settings) == [scratch.name, "shard-" + "0" * 16]
    aged(scratch, 2 * HOUR)
    assert [one.what for one in collect(settings, grace=HOUR)] == ["checkpoint"]


def test_residual_streams_that_no_build_came_back_for_go(settings):
    """As a killed build leaves them: one that is old, one that a step holds, one that is young."""
    caches = {name: settings.residuals / (name * 32) for name in "abc"}
    for name, folder in caches.items():
        folder.mkdir(parents=True)
        (folder / "about.json").write_text("{}")
        (folder / "one.acts").write_bytes(bytes(500))
        aged(folder, HOUR / 2 if name == "c" else 2 * HOUR)
    with atomic.lock(settings.residuals / f"{'b' * 32}.lock"):
        for dry_run in (True, False):
            freed = collect(settings, grace=HOUR, dry_run=dry_run)
            assert [(one.name, one.what, one.size) for one in freed] == [("a" * 32, "residual stream", 500)]
            assert [name for name, folder in caches.items() if folder.exists()] == [*"abc"][not dry_run :]


def test_what_killed_processes_left_goes_at_once(settings):
    name = "shard-" + "0" * 16
    make_output(settings, name, age=0)
    work = settings.steps / f".work-{name}-123-abcd"
    scratch = settings.steps / f".scratch-{name}"
    for left in (work, scratch):
        left.mkdir()
        (left / "x").write_bytes(b"12345")
    release = settings.releases / "fake"
    (release / ".work-fake-v0001.duckdb-1-ab").mkdir(parents=True)
    (release / "notes.md").touch()
    kinds = {one.what for one in collect(settings, grace=HOUR)}
    assert kinds == {"half-written output", "checkpoint", "half-written release", "lock"}
    assert there(settings) == [name]

    assert sorted(path.name for path in release.iterdir()) == [".lock", "notes.md"]


def test_what_somebody_works_on_is_passed_over(settings):
    name = "shard-" + "0" * 16
    output = make_output(settings, name)
    work = settings.steps / f".work-{name}-123-abcd"
    work.mkdir()
    with atomic.lock(settings.steps / f".lock-{name}"):
        assert collect(settings, grace=HOUR) == []
    assert output.exists()
    assert work.exists()


def test_other_files_are_not_ours(settings):
    settings.steps.mkdir(parents=True)
    for name in ("notes.txt", "shard-xyz", ".work-other"):
        (settings.steps / name).write_text("mine")
    assert collect(settings, grace=0) == []
    assert len(there(settings)) == 3


def test_a_run_that_begins_in_between_gets_its_output_back(settings, monkeypatch):
    (output,) = make_all(settings, plan_of("a"))
    asked = []

    def wanted(settings):
        asked.append(output.exists())
        return set() if len(asked) == 1 else {output.name}

    monkeypatch.setattr(garbage, "_wanted", wanted)
    assert [one.what for one in collect(settings, grace=HOUR)] == ["lock"]
    assert asked == [True, False]  # asked again once it was set aside
    assert there(settings) == [output.name]


def test_a_lock_that_was_removed_is_not_held_twice(tmp_path):
    """The holder removes its file while another has opened it already; a third must not get a second lock."""
    path = tmp_path / "lock"
    program = (
        "import sys, time; from pathlib import Path; from atlas.store import atomic\n"
        "with atomic.lock(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    take = atomic._take
    opened, removed = threading.Event(), threading.Event()

    def slow(descriptor, where):
        if threading.current_thread() is not threading.main_thread() and not removed.is_set():
            opened.set()
            assert removed.wait(300)
        take(descriptor, where)

    found = []

    def second():
        with atomic.lock(path):
            process = subprocess.Popen(
                [sys.executable, "-c", program, str(path)], stdin=-1, stdout=-1, stderr=-1, text=True
            )
            found.append(process.communicate()[1])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(atomic, "_take", slow)
        with atomic.lock(path):
            thread = threading.Thread(target=second)
            thread.start()
            assert opened.wait(300)
            atomic.unlock(path)
        removed.set()
        thread.join()
    assert ConflictError.__name__ in found[0]


def test_the_command_says_what_it_did(settings):
    make_output(settings, "shard-" + "0" * 16, size=2_500_000)
    environment = {"ATLAS_HOME": str(settings.home)}
    said = CliRunner().invoke(gc, ["--dry-run"], env=environment)
    assert said.output.splitlines()[-1] == "would free 2.5 MB: 1 lock, 1 output"
    said = CliRunner().invoke(gc, ["--keep-hours", "1"], env=environment)
    assert "2.5 MB  output  shard-0000000000000000" in said.output
    assert CliRunner().invoke(gc, [], env=environment).output == "nothing to remove\n"


def test_a_build_that_counted_on_a_removed_output_makes_it_again(settings, monkeypatch):
    """Between the look at the outputs and the record of the run, `atlas gc` removed one of them."""
    plan = plan_of("a", "b")
    a, b = plan.steps
    looks = [[b], [a, b], [a, b], [a, b]]
    monkeypatch.setattr(local, "waiting_for", lambda plan, settings: looks.pop(0))
    run = local.begin(plan, settings, "local")
    assert {one.name: one.status for one in run.steps} == {"a": "ready", "b": "ready"}
    assert sorted(one.status for one in list_runs(settings)) == ["cancelled", "pending"]


def test_a_step_that_ends_while_another_joins_is_not_taken_for_removed(settings, monkeypatch):
    plan = plan_of("a", "b")
    a, b = plan.steps
    first, owner = create_run(settings, plan), new_owner()
    claim_step(settings, first.id, "a", owner)
    # The second looks, and only then the first ends its step.
    monkeypatch.setattr(local, "waiting_for", lambda plan, settings: [b] if ended else [a, b])
    ended = []
    local.waiting_for(plan, settings)
    finish_step(settings, first.id, "a", owner)
    ended.append("a")
    assert local.begin(plan, settings, "local").id == first.id
