"""The training view and the quality tables: finished, running, ended, empty, and addresses that are wrong."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from atlas.settings import load_settings
from tests.conftest import need
from tests.servers import app_served
from tests.synthetic import build_synthetic_release
from tests.synthetic_training import training_tables
from tests.test_app_browser import CHROMIUM, FLAGS, OWN, PATIENCE_MS, heading
from tests.test_app_views import show, words

Z0 = "synthetic/L00.z.topk-32"
SIZE = {"n_layers": 2, "n_heads": 2, "d_sae": 32, "n_blocks": 8, "context": 16}
SWEEP = [f"m/L00.H01.q.relu-{d}-l1_coefficient-{c}" for d in (64, 128) for c in (0.1, 1)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    build_synthetic_release(folder / "releases", engine=True, **SIZE)
    return folder


@pytest.fixture
def released(home, tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(home))
    monkeypatch.setenv("ATLAS_DATABASE_URL", f"sqlite:///{tmp_path / 'notes.sqlite'}")
    return home


def write_live(steps, upto, saes=SWEEP, step="train-00ff00ff"):
    """The log of a running training up to a step, written as training does."""
    path = Path(steps) / f".scratch-{step}" / "live.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf8") as file:
        for sae in saes:
            for table, rows in training_tables(sae, 64, l1_coefficient=0.5).items():
                for row in rows:
                    if row["step"] <= upto:
                        file.write(json.dumps({"table": table, **row}) + "\n")
    return path


def chosen(at):
    return at.multiselect[0].value


def charts(at):
    return len(at.get("vega_lite_chart")) + len(at.get("arrow_vega_lite_chart"))


def test_a_finished_training_of_the_release(released):
    at = show("training", sae=Z0)
    assert chosen(at) == [Z0]
    said = words(at)
    assert "100,000" in said
    assert "Firing rates over time" in said
    assert "synthetic@1" in said
    assert charts(at) == 6 + 2 + 1  # curves, firing rates, watched features


def test_a_sweep_of_twelve_is_drawn_by_its_settings(released):
    at = show("training")
    next(s for s in at.selectbox if s.label == "Sites").set_value("q").run()
    assert len(chosen(at)) == 12
    assert "L1 coefficient" in words(at)
    assert "Sweep" in words(at)
    assert charts(at) == 6 + 3 + 2 + 1
    at.multiselect[0].set_value(chosen(at)[:2]).run()
    assert not at.exception
    assert at.query_params["sae"] == chosen(at)[:2]
    at.multiselect[0].set_value([]).run()
    assert "No SAE is chosen" in words(at)


def test_an_unknown_sae_is_named(released):
    at = show("training", run="release", sae="no/such")
    assert "'no/such' is not known" in at.error[0].value.replace("\\", "")


def test_a_training_that_is_not_there_is_said_to_have_ended(released):
    at = show("training", run="train-gone")
    assert "is not running" in words(at)


def test_without_release_or_training_it_says_which_command_makes_one():
    at = show("training")
    assert "No training runs" in words(at)
    assert at.code[0].value.startswith("atlas build")
    assert "no release yet" in show("training", run="release").error[0].value


def test_a_running_training_is_shown_without_any_release():
    path = write_live(load_settings().steps, 60)
    at = show("training")
    assert "60,000" in words(at)
    assert "so far, in the training text" in words(at)
    assert chosen(at) == SWEEP
    assert not at.warning
    old = time.time() - 3600
    os.utime(path, (old, old))
    at = show("training", run="train-00ff00ff", sae=SWEEP[1])
    assert chosen(at) == [SWEEP[1]]
    assert "Nothing was written for 1 h 0 min" in at.warning[0].value


def test_a_stopped_training_is_not_called_running(released):
    settings = load_settings()
    for step, age in (("train-now", 0), ("train-old", 3600)):
        path = write_live(settings.steps, 20, step=step)
        os.utime(path, (time.time() - age, time.time() - age))
    try:
        at = show("training")
        names = list(at.button_group(key="training_run").options)
        assert names == ["running: train-now", "in the release", "stopped: train-old"]
    finally:
        for step in ("train-now", "train-old"):
            shutil.rmtree(settings.steps / f".scratch-{step}")


def test_a_training_that_has_logged_nothing_yet():
    write_live(load_settings().steps, -1)
    assert "has not logged a step yet" in words(show("training"))


def test_hostile_names_in_a_live_log_are_only_text():
    hostile = "m/<script>alert(1)</script>**x**"
    write_live(load_settings().steps, 20, [hostile, "other"])
    at = show("training")
    assert "<script" not in words(at)
    assert charts(at) == 6 + 2 + 1


def test_the_overview_has_the_tables_of_the_seeds(released):
    at = show("overview")
    assert [tab.label for tab in at.tabs] == ["By layer", "q and k", "Sweeps", "Stages", "Pruning"]
    said = words(at)
    assert "attn_out by layer" in said
    assert "Original: CE loss 3.0000" in said
    frames = [frame.value for frame in at.dataframe]
    layers = next(f for f in frames if list(f.columns)[:2] == ["place", "variance_explained"])
    assert layers["place"].tolist() == ["L0A", "L1A"]
    assert layers["variance_explained"].between(1, 100).all(), "shares are shown as percentages"


def test_the_overview_leaves_out_what_the_release_has_not(tmp_path, monkeypatch):
    build_synthetic_release(load_settings().releases, **SIZE)
    assert [tab.label for tab in show("overview").tabs] == ["By layer", "q and k", "Stages", "Pruning"]


@pytest.mark.browser
def test_the_live_view_follows_a_growing_log(tmp_path):
    """In a real browser: new rows appear by themselves, a resume is followed, and the end is said."""
    from playwright.sync_api import expect, sync_playwright

    need(Path(CHROMIUM).is_file(), f"Chromium ({CHROMIUM})")
    home = tmp_path / "live-home"
    path = write_live(home / "steps", 20)
    with app_served(home) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        elsewhere = []
        page.on("request", lambda r: elsewhere.append(r.url) if not OWN.match(r.url) else None)
        page.goto(f"{address}/training")
        heading(page, "Training")
        facts = page.locator(".ha-facts")
        for upto in (20, 70, 40):
            write_live(home / "steps", upto)
            expect(facts).to_contain_text(f"{upto},000", timeout=PATIENCE_MS)
        expect(page.locator("[data-testid=stVegaLiteChart]").nth(8)).to_be_visible()
        path.unlink()
        expect(page.get_by_text("is not running")).to_be_visible(timeout=PATIENCE_MS)
        browser.close()
        assert elsewhere == []
