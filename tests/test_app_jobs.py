"""The jobs view: steps as a picture and a table, the log, and builds that are started and stopped there."""

import base64
import logging
import os
import re
import signal
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import dag
from app.job_tables import costs_table, group_line, rate_of, step_line, steps_table
from atlas.access import Actor, use_source
from atlas.configs import BuildConfig
from atlas.db.engine import close_engines
from atlas.db.leases import claim_step, fail_step, heartbeat
from atlas.db.progress import DbProgress
from atlas.db.rows import StepRow
from atlas.db.runs import create_run, list_runs, load_run
from atlas.db.workers import WorkerRow, note_worker
from atlas.errors import AccessError, ConfigError
from atlas.launch import FOLDER, Launched, beginning, launch, planned, read_config
from atlas.settings import load_settings
from atlas.units import Unit
from tests.servers import app_served, wait_until
from tests.test_app_browser import browser, page  # noqa: F401 (fixtures)
from tests.test_app_views import markup, show, words

HOSTILE = "<img src=x onerror=alert(1)>"


def row(name, *needs, kind=None, status="pending", **fields):
    usual = dict.fromkeys(StepRow.__dataclass_fields__)
    usual |= {
        "run_id": "r",
        "position": 0,
        "digest": "",
        "queue": "cpu",
        "done": 0,
        "total": 0,
        "message": "",
    }
    usual |= {"attempts": 0, "name": name, "needs": needs, "kind": kind or name, "status": status}
    return StepRow(**(usual | fields))


def shards(n, status="pending"):
    return [row(f"shard-{i:04d}", "train", kind="shard", status=status) for i in range(n)]


def plan_of(n):
    """tokens -> train -> n shards -> publish, and heads beside them."""
    out = [row("tokens"), row("train", "tokens"), row("heads", "tokens"), *shards(n)]
    return [*out, row("publish", "heads", "train", *(s.name for s in out if s.kind == "shard"))]


def test_like_steps_share_a_box_and_short_cuts_are_left_out():
    boxes, needs = dag.grouped(plan_of(1000))
    assert [(b.title, b.layer) for b in boxes.values()] == [
        ("tokens", 0), ("train", 1), ("heads", 1), ("shard × 1000", 2), ("publish", 3)
    ]  # fmt: skip
    # publish needs train as well, but the way through the shards says so already.
    assert needs["publish@3"] == {"heads@1", "shard@2"}
    assert needs["train@1"] == {"tokens@0"}


def test_steps_of_one_kind_that_follow_each_other_have_boxes_of_their_own():
    steps = [row("a", kind="x"), row("b", "a", kind="x"), row("c", "a", "b", kind="x")]
    boxes, needs = dag.grouped(steps)
    assert [b.title for b in boxes.values()] == ["a", "b", "c"]
    assert needs == {"x@0": set(), "x@1": {"x@0"}, "x@2": {"x@1"}}


@st.composite
def plans(draw):
    out = []
    for number in range(draw(st.integers(1, 12))):
        earlier = [step.name for step in out]
        needs = draw(st.lists(st.sampled_from(earlier), unique=True, max_size=4)) if earlier else []
        out.append(row(f"s{number}", *needs, kind=draw(st.sampled_from("ab"))))
    return out


def reachable(edges):
    """All pairs of an acyclic relation's transitive closure, by Warshall."""
    pairs = {(a, b) for a, direct in edges.items() for b in direct}
    for middle in edges:
        pairs |= {(a, b) for a, m in pairs if m == middle for n, b in pairs if n == middle}
    return pairs


@given(plans())
def test_any_plan_is_drawn_whole_and_nothing_overlaps(steps):
    picture = dag.layout(steps)
    assert sorted(s.name for b in picture.boxes for s in b.steps) == sorted(s.name for s in steps)
    home = {s.name: b.key for b in picture.boxes for s in b.steps}
    asked = {b.key: set() for b in picture.boxes}
    for step in steps:
        asked[home[step.name]] |= {home[need] for need in step.needs}
    drawn = {b.key: set() for b in picture.boxes}
    for line in picture.lines:
        drawn[line[-1].key].add(line[0].key)
        assert [box.layer for box in line] == list(range(line[0].layer, line[-1].layer + 1))
    # The lines say the same as the plan, and none of them could be left out.
    assert reachable(drawn) == reachable(asked)
    for key, direct in drawn.items():
        for one in direct:
            assert (key, one) not in reachable({**drawn, key: direct - {one}})
    lanes = {box.key: box for line in picture.lines for box in line}
    everything = list({b.key: b for b in (*picture.boxes, *lanes.values())}.values())
    for i, a in enumerate(everything):
        assert 0 <= a.x <= picture.width - dag.BOX_W + 1
        assert a.y >= 0
        assert a.y + a.height <= picture.height
        for b in everything[:i]:
            assert a.layer != b.layer or a.y + a.height <= b.y or b.y + b.height <= a.y


def test_the_picture_says_states_in_words_and_marks_and_escapes_names():
    steps = [row(HOSTILE, kind=HOSTILE, status="failed"), *shards(3, "done"), *shards(1, "running")]
    html = dag.dag_html([replace(s, needs=()) for s in steps])
    assert "<img src=x" not in html
    assert "shard × 4: 3 done, 1 running" in html
    assert "●3 ◐1" in html
    for state in ("done", "running", "failed"):
        assert f"{dag.MARKS[state]} {state}" in html
    svg = base64.b64decode(re.search(r"base64,([^\"]+)", html)[1]).decode()
    assert svg.startswith("<svg")
    assert len(set(dag.COLOURS.values())) == len(dag.COLOURS) == len(set(dag.MARKS.values()))


def test_a_long_run_shows_groups_but_every_running_and_failed_step():
    steps = [*plan_of(40)]
    steps[3] = replace(steps[3], status="running", done=5, total=10, rate=2.0)
    steps[4] = replace(steps[4], status="failed", error="no <b>memory</b>", attempts=3, peak_rss_mb=2048.0)
    run = SimpleNamespace(config_json=BuildConfig().to_json(), steps=tuple(steps))
    table = steps_table(run)
    assert table.count("<tr>") == 1 + 3 + 1 + 2 + 1
    assert "shard × 38 others" in table
    assert "no &lt;b&gt;memory&lt;/b&gt;" in table
    assert "256 tokens/s" in table
    assert "2,048 MB" in table
    assert "width:50.0%" in table
    assert steps_table(run, every=True).count("<tr>") == 1 + len(steps)


def test_rates_are_in_tokens_where_units_are_text():
    running = row("x", status="running", rate=2.5)
    assert rate_of(running, Unit("steps", 4096)) == "10.2 k tokens/s"
    assert rate_of(running, Unit("features")) == "2.5 features/s"
    assert rate_of(running, None) == "2.5/s"
    assert rate_of(replace(running, status="done"), None) == ""


def test_a_step_whose_worker_is_silent_says_so():
    past, future = (datetime.now(UTC) + timedelta(seconds=s) for s in (-5, 60))
    running = row("x", status="running", message="block 3", lease_until=past)
    assert "nothing was heard of its worker" in step_line(running)
    assert "block 3" in step_line(replace(running, lease_until=future))


def test_a_group_says_how_many_are_in_which_state():
    steps = [*shards(2, "done"), *shards(2, "pending")]
    line = group_line(dag.Box("shard@2", 2, steps), steps)
    assert "2 done, 2 pending" in line
    assert "width:50.0%" in line
    assert "shard × 4</td>" in line


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path / "home"))
    yield load_settings()
    use_source(lambda: Actor("root", "admin"))
    close_engines()


def failed_run(settings):
    steps = tuple(
        SimpleNamespace(name=n, kind=n, digest="d", queue="cpu", needs=needs)
        for n, needs in (("tokens", ()), ("train", ("tokens",)))
    )
    config = BuildConfig(release="mine")
    run = create_run(settings, SimpleNamespace(config=config, steps=steps))
    claim_step(settings, run.id, "tokens", "me")
    with DbProgress(settings, run.id, "tokens", "me") as progress:
        progress.update(1, 2)
        logging.getLogger("atlas.corpus").warning("odd text %s", HOSTILE)
    fail_step(settings, run.id, "tokens", "me", f"no text; caused by OSError: {HOSTILE}")
    return load_run(settings, run.id), config


def buttons(at):
    return {b.label for b in at.button}


def test_a_failed_run_shows_error_cause_and_log_and_is_retried(home, monkeypatch):
    run, config = failed_run(home)
    started = []
    monkeypatch.setattr(
        "app.job_start.launch",
        lambda settings, config: started.append(config) or Launched(1, home.home / "x"),
    )
    at = show("jobs")
    said = words(at)
    assert "caused by OSError" in said.replace("\\", "")
    assert "odd text &lt;img" in said
    assert not any("<img src=x" in body for body in markup(at))
    assert "1 failed" in said or "✕" in said
    assert "Cancel" not in buttons(at)
    at.button(key=f"retry_{run.id}").click().run()
    assert started == [config]


def test_a_run_under_way_is_cancelled_with_a_button(home):
    run, _ = failed_run(home)
    other = create_run(home, SimpleNamespace(config=BuildConfig(release="b"), steps=(
        SimpleNamespace(name="train", kind="train", digest="e", queue="gpu", needs=()),)))  # fmt: skip
    claim_step(home, other.id, "train", "elsewhere/1/0/x")
    heartbeat(home, other.id, "train", "elsewhere/1/0/x", done=25, total=100, rate=10.0, peak_rss_mb=512.0)
    note_worker(home, WorkerRow("w@gpu", "gpu", 1, ("gpu",), f"cuda {HOSTILE}", 1, "1"))
    at = show("jobs")
    said = words(at)
    assert "41 k tokens/s" in said
    assert "512 MB" in said
    assert "25 / 100 steps" in said
    assert "1 alive, 0 gone" in said
    at.button(key=f"cancel_{other.id}").click().run()
    assert load_run(home, other.id).cancel_requested
    assert run.id


def test_others_than_admins_see_everything_and_change_nothing(home, monkeypatch):
    _, config = failed_run(home)
    monkeypatch.setattr("app.access.current", lambda: Actor("ann", "annotator", known=True))
    at = show("jobs")
    assert "for admins" in words(at)
    assert "odd text" in words(at)
    assert not buttons(at) & {"Retry", "Cancel", "Start", "Check and estimate"}
    use_source(lambda: Actor("ann", "annotator", known=True))
    for forbidden in (lambda: launch(home, config), lambda: planned(home, config)):
        with pytest.raises(AccessError, match="ann is annotator"):
            forbidden()
    assert not (home.home / FOLDER).exists()


def test_a_wrong_config_is_refused_before_anything_starts(home):
    at = show("jobs")
    at.text_area(key="job_config").set_value("[train]\ntokns = 5\n").run()
    at.button(key="job_start").click().run()
    assert "tokns" in at.error[0].value
    at.text_area(key="job_config").set_value("[train\n").run()
    at.button(key="job_start").click().run()
    assert "not TOML" in at.error[0].value
    assert not (home.home / FOLDER).exists()


def test_what_cannot_be_planned_says_why_in_one_line(home):
    with pytest.raises(ConfigError, match=r"^layer 99 does not exist; this model has layers 0 to 1$"):
        planned(home, read_config("[model]\nname = 'docs-2l'\n[sites]\nlayers = [99]"))


def test_costs_are_summed_by_kind_and_nothing_is_unknown_as_zero(home):
    step = {"step": "s", "kind": "shard", "queue": "gpu", "state": "to do", "digest": "", "needs": []}
    steps = [step | {"tokens": 10**6, "flops": 2e12, "bytes": None, "seconds": None}] * 3
    to_do = {"steps": 3, "tokens": 3 * 10**6, "flops": 6e12, "bytes": 0, "seconds": None}
    table = costs_table({"steps": steps, "to_do": to_do})
    assert "shard × 3" in table
    assert "<td>3 M</td><td>6 T</td><td>?</td>" in table
    assert "<td>to do in all</td>" in table


@pytest.mark.parametrize(
    ("log", "found"),
    [
        ("INFO x run 20260101-000000-abcdef of release a: 3 steps", {"run": "20260101-000000-abcdef"}),
        ("noise\nerror: postgresql://a:hunter22@h/x: away", {"error": "postgresql://a:***@h/x: away"}),
        ("Traceback (most recent call last):\n  x\nTypeError: bug", {"error": "TypeError: bug"}),
        ("everything is current", {"nothing": True}),
        ("", {}),
    ],
)  # fmt: skip
def test_the_beginning_of_a_build_is_read_from_what_it_says(tmp_path, log, found):
    path = tmp_path / "x.log"
    path.write_text(log)
    read = beginning(Launched(1, path))
    assert {k: v for k, v in vars(read).items() if v and k != "alive"} == found
    assert not beginning(Launched(1, tmp_path / "none")).alive


TINY = """
[model]
name = "docs-2l"
[corpus]
source = "{text}"
blocks = 60
context = 64
[[sae]]
d_sae = 64
k = 8
[train]
tokens = 900_000_000
batch = 256
[evaluation]
blocks = 6
[analysis]
blocks = 24
"""


@pytest.fixture
def served(tmp_path):
    home = tmp_path / "served"
    home.mkdir()
    (home / "text.txt").write_text("some words that make a text, one after the other.\n\n" * 2000)
    settings = load_settings({"ATLAS_HOME": str(home)})
    with app_served(home, ATLAS_THREADS="1") as address:
        yield address, settings
    for run in list_runs(settings):
        for step in load_run(settings, run.id).steps:
            if step.status == "running" and step.lease_owner:
                os.kill(int(step.lease_owner.split("/")[1]), signal.SIGKILL)
    close_engines()


@pytest.mark.browser
def test_a_build_is_planned_started_seen_and_cancelled_in_the_browser(served, page):  # noqa: F811
    from playwright.sync_api import expect

    address, settings = served
    page.goto(f"{address}/jobs")
    page.get_by_text("New build").click()
    field = page.get_by_label("Config (TOML)")
    field.fill(TINY.format(text=settings.home / "text.txt"))
    field.press("Control+Enter")
    page.get_by_role("button", name="Check and estimate").click()
    expect(page.get_by_text("to do in all")).to_be_visible()
    page.get_by_role("button", name="Start").click()
    expect(page.locator(".ha-dag-box", has_text="train")).to_be_visible()

    def training():
        runs = list_runs(settings)
        steps = load_run(settings, runs[0].id).steps if runs else ()
        return any(s.name == "train" and s.status == "running" and s.done for s in steps)

    wait_until("training goes on", training)
    expect(page.locator(".ha-steps tr", has_text="train").first).to_contain_text("tokens/s")
    lines = page.locator(".ha-dag img").evaluate("image => [image.naturalWidth, image.complete]")
    assert lines[0] > 300
    assert lines[1]
    expect(page.locator(".ha-log")).to_contain_text("begins")
    page.get_by_role("button", name="Cancel").click()
    run = list_runs(settings)[0]
    wait_until("the run is cancelled", lambda: load_run(settings, run.id).status == "cancelled")
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    assert next(s for s in load_run(settings, run.id).steps if s.name == "tokens").status == "done"
