"""The library of imported SAEs, and the commands around it."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from atlas.cli import imports
from atlas.errors import SAEError
from atlas.interop import importing
from atlas.interop.foreign import Given
from atlas.interop.importing import import_path, keep, known_shape
from atlas.sae import library
from atlas.sae.files import load_sae
from atlas.sae.library import find_imported, folder_digest, folder_of, imported_names, list_imported
from atlas.settings import load_settings
from tests import foreign
from tests.test_docs import ROOT, blocks
from tests.test_interop_write import an_sae

NAME = "tiny/L01.mlp_out.relu-10"


@pytest.fixture
def home():
    return load_settings().home


@pytest.fixture
def cli():
    def run(command, *words):
        return CliRunner().invoke(command, words, catch_exceptions=False)

    return run


def test_finding_an_sae_needs_no_torch():
    code = "import sys; from atlas.sae.library import find_imported; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_entry_says_what_a_plan_needs(home):
    sae = an_sae("gated", processing="folded", site="L01.H02.q")
    entry, new = keep(home, sae, None)
    assert new
    found = find_imported(home, "tiny/L01.H02.q.gated-10")
    assert found == entry
    assert found.path == load_settings().saes / "tiny+L01.H02.q.gated-10"
    assert (found.site, found.d_in, found.d_sae) == (sae.info.site, 6, 10)
    assert (found.model, found.processing, found.architecture) == ("tiny", "folded", "gated")
    assert load_sae(found.path).digest() == sae.digest()
    assert list_imported(home) == [entry]


def test_digest_is_of_both_files_and_follows_them(home, monkeypatch):
    entry, _ = keep(home, an_sae("relu"), None)
    files = [entry.path / "cfg.json", entry.path / "sae_weights.safetensors"]
    expected = hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)).hexdigest()
    assert entry.digest == expected
    monkeypatch.setattr(library, "_digest", lambda _: pytest.fail("noted digests are not worked out again"))
    assert folder_digest(entry.path) == expected
    monkeypatch.undo()
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(file, ns=(1, 1))
        changed = folder_digest(entry.path)
        assert changed != expected
        file.write_bytes(data)
        os.utime(file, ns=(2, 2))
        assert folder_digest(entry.path) == expected


@pytest.mark.parametrize(
    "note",
    [b"", b"[]", b'{"stamp": [], "digest": "x", "source": ""}', b'{"digest": 5, "source": ""}', b"\xff"],
)
def test_a_damaged_note_is_not_believed(home, note):
    entry, _ = keep(home, an_sae("relu"), None)
    (entry.path / "digest.json").write_bytes(note)
    assert find_imported(home, entry.name).digest == entry.digest


def test_names_that_are_none_or_missing(home):
    for name in ("", "x", "../x", "a/b/c", "a/.b", "a b/c", "a/" + "x" * 200, "a/b\n"):
        with pytest.raises(SAEError, match="is not allowed; write MODEL/NAME"):
            folder_of(home, name)
    with pytest.raises(SAEError, match=r"no imported SAE is called 'a/b' in .* yet; see `atlas import`"):
        find_imported(home, "a/b")
    keep(home, an_sae("relu"), None)
    keep(home, an_sae("topk"), None)
    with pytest.raises(SAEError, match=rf"'a/b' in .*; there are: {NAME}, tiny/L01.mlp_out.topk-10$"):
        find_imported(home, "a/b")
    assert imported_names(home / "nowhere") == []


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors"])
def test_a_damaged_entry_is_named_and_can_be_removed(home, cli, file):
    entry, _ = keep(home, an_sae("relu"), None)
    keep(home, an_sae("topk"), None)
    (entry.path / file).unlink()
    with pytest.raises(SAEError, match="cannot be read"):
        find_imported(home, NAME)
    listed = cli(imports.import_, "--list").stdout.splitlines()
    assert len(listed) == 2
    assert "cannot be read" in listed[0]
    assert cli(imports.import_, "--remove", NAME).stdout == f"removed {NAME}\n"
    assert imported_names(home) == ["tiny/L01.mlp_out.topk-10"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"metadata": {"head_atlas": {"site": 5}}}'])
def test_configs_that_make_no_sense(home, content):
    entry, _ = keep(home, an_sae("relu"), None)
    (entry.path / "cfg.json").write_text(content)
    with pytest.raises(SAEError, match="is damaged"):
        find_imported(home, NAME)


def test_half_written_saes_are_never_seen(home, monkeypatch):
    def full_disk(sae, folder):
        (folder / "cfg.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importing, "save_sae", full_disk)
    with pytest.raises(Exception, match="No space left"):
        keep(home, an_sae("relu"), None)
    assert imported_names(home) == []
    assert list((home / "saes").iterdir()) == []


def test_importing_again_changes_nothing_and_others_get_the_folders_name(home, tmp_path):
    for number in range(3):
        foreign.saelens(tmp_path / "run" / f"trainer_{number}", seed=number)
    first = list(import_path(home, tmp_path / "run", Given()))
    base = "gpt2/L01.resid_pre.relu-10-saelens"
    assert [o.entry.name for o in first] == [base, f"{base}-trainer_1", f"{base}-trainer_2"]
    assert all(o.new for o in first)
    stamps = {p: p.stat().st_mtime_ns for p in home.rglob("*.safetensors")}
    again = list(import_path(home, tmp_path / "run", Given()))
    assert [o.entry for o in again] == [o.entry for o in first]
    assert not any(o.new for o in again)
    assert {p: p.stat().st_mtime_ns for p in home.rglob("*.safetensors")} == stamps
    (copy,) = import_path(home, (tmp_path / "run" / "trainer_0").rename(tmp_path / "elsewhere"), Given())
    assert (copy.entry, copy.new) == (first[0].entry, False)


def test_a_given_name_belongs_to_one_sae(home, tmp_path):
    one, _ = foreign.saelens(tmp_path / "two" / "one")
    other, _ = foreign.saelens(tmp_path / "two" / "other", seed=1)
    (done,) = import_path(home, one, Given(name="mine"))
    assert done.entry.name == "gpt2/mine"
    (refused,) = import_path(home, other, Given(name="mine"))
    assert "already has another SAE called 'gpt2/mine'" in str(refused.error)
    with pytest.raises(SAEError, match="--name is for one SAE, and there are 2"):
        list(import_path(home, tmp_path / "two", Given(name="x")))
    (odd,) = import_path(home, one, Given(name="no good"))
    assert "is not allowed; write MODEL/NAME" in str(odd.error)


def test_shapes_of_models_at_hand(tmp_path, monkeypatch):
    from huggingface_hub import constants

    assert known_shape("docs-2l").n_layers == 2
    assert known_shape("nobody/knows") is None
    assert known_shape("not a name!") is None
    root = tmp_path / "hf" / "models--some--model"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    (root / "snapshots" / "abc").mkdir(parents=True)
    config = {"n_embd": 8, "n_head": 2, "n_layer": 3, "n_positions": 16, "vocab_size": 5}
    (root / "snapshots" / "abc" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    assert known_shape("some/model")[:4] == (3, 2, 8, 4)


def test_the_command_goes_on_after_a_bad_one(home, cli, tmp_path):
    foreign.saelens(tmp_path / "a", "gated")
    foreign.saelens(tmp_path / "b", normalize_activations="expected_average_only_in", normalize="none")
    foreign.saelens(tmp_path / "c", "topk")
    config = json.loads((tmp_path / "b" / "cfg.json").read_text())
    assert config["normalize_activations"] == "expected_average_only_in"
    result = CliRunner().invoke(imports.import_, [str(tmp_path)])
    assert str(result.exception) == "1 of 3 SAEs were not imported"
    assert [line.split("  ")[0] for line in result.stdout.splitlines()] == [
        "gpt2/L01.resid_pre.gated-10-saelens",
        "gpt2/L01.resid_pre.topk-10-saelens",
    ]
    assert result.stderr.startswith("error: SAELens SAE in ")
    with pytest.raises(SAEError, match="the file does not state"):
        cli(imports.import_, str(tmp_path / "b"))


@pytest.mark.parametrize("words", [(), ("x", "--list"), ("--list", "--remove", "a/b")])
def test_one_thing_at_a_time(cli, words):
    result = cli(imports.import_, *words)
    assert result.exit_code == 2
    assert "name one of" in result.output


def test_an_empty_library_says_so(cli, home):
    assert cli(imports.import_, "--list").stdout.startswith(f"no SAE in {home / 'saes'} yet")
    with pytest.raises(SAEError, match="no imported SAE is called"):
        cli(imports.import_, "--remove", "a/b")


def test_every_command_of_the_page(tmp_path, monkeypatch, home):
    """In their order, on files as the page imagines them; the hub is a local server."""
    from huggingface_hub import constants

    from atlas.interop.hub_import import KISSANE_GPT2
    from tests.hub_server import Hub

    foreign.saelens(tmp_path / "their-saes" / "gated", "gated", hook="blocks.3.attn.hook_z")
    foreign.dictionary_learning(tmp_path / "their-saes" / "trainer_0")
    foreign.sparsify(tmp_path / "run", "layers.5.mlp", run=False)
    foreign.openmoss(tmp_path / "hub" / "FOLDER", model_name="gpt2")
    for layer in range(12):
        foreign.kissane(tmp_path / "published", f"gpt2-small_L{layer}_Hcat_z_v9", layer=layer)
    hub = Hub()
    hub.repos = {"OWNER/REPO": tmp_path / "hub", KISSANE_GPT2.repo: tmp_path / "published"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    said = []
    for block in blocks(ROOT / "docs" / "formats.md", "sh"):
        for line in block.replace("49152", str(foreign.D_SAE)).splitlines():
            _, name, *words = shlex.split(line, comments=True)
            if name not in ("import", "export"):
                continue  # of releases, not of SAEs
            command = {"import": imports.import_, "export": imports.export}[name]
            said.append(CliRunner().invoke(command, words, catch_exceptions=False).stdout)
    hub.close()
    assert [len(text.splitlines()) for text in said] == [2, 1, 1, 1, 12, 17, 1, 1, 1]
    assert said[1].startswith("gpt2/mine  L03.z  6 -> 10  gated  raw")
    assert said[2].startswith("gpt2/L05.mlp_out.topk-10-sparsify  L05.mlp_out")
    assert "gpt2/mine" not in imported_names(home)
    state = torch.load(tmp_path / "exported-ae" / "ae.pt", weights_only=True)
    source = torch.load(next(Path("published").glob("*_L5_*.pt")), weights_only=True)
    assert torch.equal(state["encoder.weight"], source["W_enc"].T)


def test_downloads_say_how_far_they_are_without_a_terminal():
    said = []
    lines = imports._Lines(said.append, "kissane-gpt2", 40_000_000)
    lines.update(10_000_000)
    assert said == []
    lines.seconds = 0.0
    lines.update(10_000_000)
    (line,) = said
    assert re.fullmatch(r"  kissane-gpt2: 20\.0/40\.0 MB, [\d.e+]+ MB/s, \d+ s left", line)
