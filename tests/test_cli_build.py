"""Wrong inputs of `atlas build`: one line with the value and what is allowed, exit code 2."""

import resource
import shutil
import subprocess
import sys

import click
import pytest

from atlas.cli import COMMANDS, cli, main
from atlas.lm.files import BUNDLED
from tests.builds import SMALL_TOML

TINY = ["--model", "docs-2l", "--blocks", "12", "--context", "64", "--d-sae", "32", "--k", "4"]
TINY += ["--tokens", "512", "--batch", "64", "--eval-blocks", "2", "--analysis-blocks", "4"]


@pytest.fixture
def atlas(monkeypatch, capsys):
    """Run the command in this process; give exit code and the lines of stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["atlas", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, capsys.readouterr().err.strip().splitlines()

    return run


def damaged(tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED / "docs-2l", folder)
    change(folder)
    return folder


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


def garble(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def no_weights(folder):
    (folder / "model.safetensors").unlink()


WRONG = {
    "missing folder": (["--model", "/no/such/folder"], ["/no/such/folder", "docs-12l"]),
    "unknown layer": (["--layers", "7"], ["layer 7", "0 to 1"]),
    "unreadable layer": (["--layers", "two"], ["'two'", "all"]),
    "layers backwards": (["--layers", "1-0"], ["'1-0'", "all"]),
    "no model": (["--model", ""], ["''", "docs-12l"]),
    "no features": (["--architecture", "relu", "--d-sae", "0"], ["d_sae 0", "above 0"]),
    "learning rate": (["--lr", "nan"], ["lr nan", "above 0"]),
    "unknown site": (["--sites", "w"], ["'w'", "resid_pre"]),
    "unknown head": (["--sites", "q", "--heads", "8"], ["head 8", "0 to 7"]),
    "unknown architecture": (["--architecture", "magic"], ["'magic'", "topk", "gated"]),
    "unknown revival": (["--dead-features", "pray"], ["'pray'", "resample"]),
    "unknown normalisation": (["--normalize", "l2"], ["'l2'", "layer_norm"]),
    "objective of z": (["--objective", "scores"], ["'scores'", "L00.z"]),
    "no parts": (["--parts", "0"], ["parts 0", "above 0"]),
    "unknown precision": (["--precision", "int8"], ["'int8'", "bfloat16"]),
    "sweep without values": (["--sweep", "lr="], ["'lr='", "l1_coefficient=0.1,1,10"]),
    "sweep of an unknown key": (["--sweep", "l1=1,2"], ["'l1'", "l1_coefficient"]),
    "sweep of a wrong value": (["--sweep", "k=8,many"], ["'many'", "whole number"]),
    "sweep of one value twice": (["--sweep", "lr=1e-3,0.001"], ["lr-0.001", "label"]),
    "unknown import": (["--imports", "docs-2l/mine"], ["docs-2l/mine", "atlas import"]),
    "nothing imported": (["--imports", "docs-2l/*"], ["docs-2l/*", "atlas import"]),
    "unknown processing": (["--processing", "boiled"], ["'boiled'", "folded"]),
    "unknown corpus": (["--corpus", "novel.docx"], ["novel.docx", "stdlib"]),
    "missing text": (["--corpus", "/no/such/text.txt"], ["/no/such/text.txt"]),
    "context too long": (["--context", "512"], ["512", "256"]),
    "k above the width": (["--d-sae", "3", "--k", "4"], ["4", "3"]),
    "no training tokens": (["--tokens", "0"], ["0"]),
    "too few blocks": (["--eval-blocks", "12"], ["12"]),
    "release name of another alphabet": (["--release", "é"], ["é"]),
    "long release name": (["--release", "a" * 65], ["64"]),
    "unknown user": (["--model", "~nosuchuser/x"], ["~nosuchuser/x"]),
    "name too long": (["--model", "/" + "m" * 400], ["mmm"]),
    "corpus name too long": (["--corpus", "c" * 400 + ".txt"], ["ccc"]),
    "no decimal": (["--layers", "²"], ["'²'"]),
    "infinite rate": (["--lr", "inf"], ["lr inf"]),
    "too many tokens": (["--tokens", str(10**22)], [str(10**22)]),
    "release name": (["--release", "../up"], ["../up"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_value(atlas, case, tmp_path):
    arguments, said = WRONG[case]
    code, lines = atlas("build", *TINY, *arguments)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert all(part in lines[0] for part in said), lines[0]
    assert not (tmp_path / "home" / "releases").exists()


@pytest.mark.parametrize("change", [cut, garble, no_weights])
def test_damaged_model(atlas, tmp_path, change):
    folder = damaged(tmp_path, change)
    code, lines = atlas("build", *TINY, "--model", folder)
    assert code == 2
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(folder) in errors[0]
    assert not (tmp_path / "home" / "releases").exists()


@pytest.mark.parametrize(("text", "said"), [("", "no text"), ("a few words", "one block needs 63")])
def test_too_little_text(atlas, tmp_path, text, said):
    path = tmp_path / "short.txt"
    path.write_text(text)
    code, lines = atlas("build", *TINY, "--corpus", path)
    assert code == 2
    assert said in lines[-1] or "empty" in lines[-1] or "holds no" in lines[-1]
    assert "short.txt" in lines[-1]


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[train]\ntokns = 5\n", ["tokns", "tokens"]),
        ('[train]\ntokens = "many"\n', ["many", "whole number"]),
        ("train = 3\n", ["3"]),
        ("[prune]\ntokns = 5\n", ["tokns", "firing_rate"]),
        ("[finetune]\nlr = 0\n", ["finetune lr", "above 0"]),
        ("finetune = 3\n", ["finetune 3"]),
        ("[train\n", ["not TOML"]),
        ("sae = []\n", ["[[sae]]"]),
    ],
)
def test_wrong_config(atlas, tmp_path, toml, said):
    path = tmp_path / "config.toml"
    path.write_text(toml)
    code, lines = atlas("build", path)
    assert code == 2
    assert len(lines) == 1
    assert all(part in lines[0] for part in [*said, "config.toml"]), lines[0]


def test_flags_of_an_sae_that_is_not_trained(atlas):
    code, lines = atlas("build", "--no-train", "--imports", "docs-2l/x", "--k", "3")
    assert code == 2
    assert "--k has no SAE to apply to" in lines[0]


def test_nothing_to_do_is_refused(atlas):
    code, lines = atlas("build", "--no-train")
    assert code == 2
    assert "import" in lines[0]


def test_missing_config(atlas, tmp_path):
    code, lines = atlas("build", tmp_path / "none.toml")
    assert code == 2
    assert "none.toml" in lines[0]


def test_dry_run_does_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["atlas", "build", *TINY, "--dry-run"])
    with pytest.raises(SystemExit) as stopped:
        main()
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "to do" in out
    assert "publish" in out
    assert not (tmp_path / "home" / "steps").exists()


@pytest.mark.parametrize("kilobytes", [20, 200, 2000])
def test_full_disk(tmp_path, kilobytes):
    """A file-size quota stops whichever file is the first to be too large; nothing is half-published."""
    home = tmp_path / "home"
    toml = tmp_path / "small.toml"
    toml.write_text(SMALL_TOML)

    def quota():
        size = kilobytes * 1024
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    done = subprocess.run(
        [sys.executable, "-m", "atlas", "build", str(toml)],
        env={
            "PATH": "/usr/bin:/bin",
            "ATLAS_HOME": str(home),
            "ATLAS_THREADS": "1",
            "HOME": str(tmp_path),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        preexec_fn=quota,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(home.glob("releases/*/*.duckdb"))
    assert not list(home.glob("releases/*/current.json"))
    assert not list(home.glob("**/.work-*"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    command = cli.get_command(None, name)
    assert command is not None
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.name}"
