"""Measuring heads again gives the same numbers, and says where a release has others; tasks from a file."""

from dataclasses import replace

import duckdb
import numpy as np
import pytest
from click.testing import CliRunner

from atlas.cli import cli
from atlas.cli.heads import measured_config
from atlas.configs import BuildConfig, CorpusConfig, EvalConfig, HeadsConfig, ModelConfig
from atlas.errors import ConfigError, StoreError
from atlas.pipeline.remeasure import agreement, remeasure
from atlas.progress import NullProgress
from atlas.settings import load_settings
from tests.synthetic import to_arrow

from .tiny import model_folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = np.random.default_rng(0).integers(0, 8, 400)
    path.write_text(" ".join(f"w{word}" for word in words))
    return path


@pytest.fixture(scope="module")
def config(text):
    return BuildConfig(
        model=ModelConfig(str(model_folder())),
        corpus=CorpusConfig(str(text), blocks=12, context=12),
        evaluation=EvalConfig(4),
        heads=HeadsConfig(ablation_blocks=2, prompts=2, repeats=3),
    )


@pytest.fixture(scope="module")
def measured(config, tmp_path_factory):
    settings = load_settings({"ATLAS_HOME": str(tmp_path_factory.mktemp("home")), "ATLAS_THREADS": "1"})
    return settings, remeasure(config, settings, NullProgress())


@pytest.fixture
def stored(measured):
    con = duckdb.connect()
    for name, rows in measured[1].items():
        con.register("arriving", to_arrow(name, rows))
        con.execute(f"CREATE TABLE {name} AS FROM arriving")
    yield con
    con.close()


def test_the_same_is_measured_again(config, measured, stored):
    settings, _ = measured
    found = agreement(stored, remeasure(config, settings, NullProgress()))
    assert {one.table for one in found} >= {"head_scores", "head_spectra", "head_prefixes", "head_corruption",
                                            "head_text_prefixes", "tasks", "head_task_effects"}  # fmt: skip
    for one in found:
        assert one.rows > 0
        assert one.unmatched == 0
        assert one.largest < 1e-5


def test_what_differs_is_named(measured, stored):
    stored.execute(
        "UPDATE head_scores SET value = value + 0.5 WHERE layer = 1 AND head = 2 AND score = 'entropy'"
    )
    stored.execute("DELETE FROM head_prefixes WHERE prefix = 3")
    stored.execute("UPDATE tasks SET template = 'another' WHERE task = 'url'")
    stored.execute(
        "UPDATE head_spectra SET singular_values = singular_values[2:] WHERE layer = 0 AND head = 0"
    )
    found = {one.table: one for one in agreement(stored, measured[1])}
    assert found["head_scores"].largest == pytest.approx(0.5)
    assert found["head_scores"].where == "value of 1 2 entropy"
    assert found["head_prefixes"].unmatched == 6
    assert found["tasks"].largest == float("inf")
    assert found["head_spectra"].largest == float("inf")
    assert found["head_corruption"].largest < 1e-5


def test_other_text_gives_other_numbers(config, measured, stored, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"w{n % 46}" for n in range(400)))
    changed = replace(config, corpus=replace(config.corpus, source=str(other)))
    found = {one.table: one for one in agreement(stored, remeasure(changed, measured[0], NullProgress()))}
    assert found["head_scores"].largest > 1e-3
    assert found["head_prefixes"].largest < 1e-5


def test_the_config_of_a_release(config):
    assert measured_config({"config": config.to_json()}) == config
    for wrong in ({}, {"config": "no"}, {"config": '{"seed": 1}'}):
        with pytest.raises(StoreError, match="does not say how it was built"):
            measured_config(wrong)


def test_tasks_from_a_file(text, tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path))
    file = tmp_path / "tasks.toml"
    file.write_text(
        '[[task]]\nname = "words"\ntemplate = "w1 {a}[[ w2]]"\n'
        'slot = [{ name = "a", words = ["w3", "w4"] }]\n'
    )
    flags = ["--model", str(model_folder()), "--corpus", str(text), "--prompts", "3", "--blocks", "2"]
    found = CliRunner().invoke(cli, ["tasks", str(file), *flags, "--layers", "1", "--top", "2"])
    assert found.exit_code == 0, found.exception
    assert "3 prompts such as 'w1 w" in found.output
    assert sum(line.startswith("L1H") for line in found.output.splitlines()) == 2
    assert "L0H" not in found.output
    refused = CliRunner().invoke(cli, ["tasks", str(file), *flags, "--layers", "2"])
    assert isinstance(refused.exception, ConfigError)
    assert "allowed: 0 to 1" in str(refused.exception)
