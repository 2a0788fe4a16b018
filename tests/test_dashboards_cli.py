"""``atlas export-release``: every format by command, and one clear line for what cannot be."""

import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from atlas.cli import cli
from atlas.db.annotations import save_feature
from atlas.db.notes import FeatureAnnotation
from atlas.db.schema import upgrade
from atlas.errors import AtlasError
from atlas.interop.dashboards.plain import read_plain
from atlas.interop.dashboards.reading import read_neuronpedia, read_saedashboard
from atlas.settings import load_settings
from tests.synthetic import build_synthetic_release

Z1 = "synthetic/L01.z.topk-16"


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "releases"
    build_synthetic_release(folder, d_sae=16, n_blocks=12, context=12, n_heads=2)
    return folder


@pytest.fixture
def home(releases):
    settings = load_settings()
    shutil.copytree(releases, settings.releases)
    return settings


def run(*words):
    result = CliRunner().invoke(cli, ["export-release", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_saedashboard(home, tmp_path):
    result = run("synthetic", "--to", tmp_path / "out", "--format", "saedashboard", "--sae", Z1,
                 "--features", "0-9", "--batch", "4")  # fmt: skip
    assert result.exit_code == 0
    assert "synthetic@1: saedashboard in" in result.stdout
    assert f"the weights of {Z1} are not on this machine" in result.stderr
    folder = tmp_path / "out" / "synthetic" / "1-z-topk-16"
    assert read_saedashboard(folder)["features"]["feature"].to_pylist() == list(range(10))
    assert len(list(folder.glob("batch-*.json"))) == 3
    about = json.loads((folder / "run_settings.json").read_text())
    assert (about["sae"], about["release"], about["n_features"]) == (Z1, "synthetic@1", 10)


def test_neuronpedia_takes_peoples_labels(home, tmp_path):
    upgrade(home)
    save_feature(home, FeatureAnnotation(Z1, 2, "ann", "brackets"), 0)
    result = run("--to", tmp_path / "out", "--format", "neuronpedia", "--layer", 1, "--site", "z",
                 "--creator", "someone")  # fmt: skip
    assert result.exit_code == 0
    folder = tmp_path / "out" / "synthetic" / "1-z-topk-16"
    assert json.loads((folder / "source.jsonl").read_text())["creatorId"] == "someone"
    (label,) = read_neuronpedia(folder)["feature_annotations"].to_pylist()
    assert (label["sae"], label["feature"], label["label"]) == (Z1, 2, "brackets")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_plain(home, tmp_path, kind):
    result = run("synthetic@1", "--to", tmp_path / "out", "--format", kind, "--table", "features", "--alive")
    assert result.exit_code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"features.{kind}", "release.json"}
    assert set(read_plain(tmp_path / "out", "features")["alive"].to_pylist()) == {True}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nope", "--format", "jsonl"], "there is no release 'nope'"),
        (["--format", "jsonl", "--sae", "x"], "SAE 'x' is not in this release"),
        (["--format", "saedashboard", "--features", "7-"], "features '7-' cannot be read"),
        (["--format", "saedashboard", "--features", "99"], "feature 99 is not in"),
        (["--format", "parquet", "--table", "x"], "table 'x' is not known"),
        (["--format", "neuronpedia", "--table", "saes"], "--table is not for --format neuronpedia"),
        (["--format", "jsonl", "--batch", "3"], "--batch is not for --format jsonl; allowed: saedashboard"),
        (["--format", "saedashboard", "--model", "m"], "--model is not for --format saedashboard"),
        (["--format", "headvis", "--alive"], "--features and --alive are not for --format headvis"),
        (["--format", "headvis", "--model", "./nowhere"], "model folder './nowhere' does not exist"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(home, tmp_path, words, says):
    folder = tmp_path / "here" / "out"
    with pytest.raises(AtlasError, match=says.replace("(", r"\(")):
        run(*words, "--to", folder)
    assert not folder.exists()
    assert not folder.parent.exists() or list(folder.parent.iterdir()) == []


def test_a_folder_that_is_there_is_not_touched(home, tmp_path):
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(AtlasError, match="already exists"):
        run("--to", tmp_path, "--format", "jsonl")
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["keep"]


def test_unknown_format_ends_with_code_2(home, tmp_path):
    result = run("--to", tmp_path / "out", "--format", "html")
    assert result.exit_code == 2
    assert "'html' is not one of 'saedashboard'" in result.stderr


def test_the_command_as_a_process(home, tmp_path):
    """The name with a dash is found, and an error is one line with exit code 2."""
    command = [
        sys.executable,
        "-m",
        "atlas",
        "export-release",
        "--format",
        "jsonl",
        "--to",
        str(tmp_path / "o"),
    ]
    done = subprocess.run([*command, "--layer", "9"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: layer 9 is not in this release; allowed: 0, 1"]
