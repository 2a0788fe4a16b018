"""Import from the hub, against a server that speaks its protocol: what is missing comes, and goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from atlas.cli import imports
from atlas.errors import ConflictError, SAEError
from atlas.interop.exporting import export
from atlas.interop.foreign import Given
from atlas.interop.hub import HubFolder, hub_folder
from atlas.interop.hub_import import KISSANE_GPT2, HubImport
from atlas.sae.library import find_imported, imported_names, list_imported
from atlas.store.atomic import lock
from tests import foreign
from tests.hub_server import Hub
from tests.test_interop_write import an_sae

WIDE = 48
NOTHING = Given()
CHUNK = 512
CUT = 1500
"""Bytes after which the server breaks off; whole chunks of them arrive."""
ARRIVED = CUT // CHUNK * CHUNK


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    for module in (file_download, _http):
        monkeypatch.setattr(module.time, "sleep", lambda _: None)
    yield hub
    hub.close()


@pytest.fixture
def published(hub, tmp_path):
    """Twelve pairs under the published repository's name, and a file that is no SAE."""
    folder = tmp_path / "published"
    for layer in range(12):
        name = f"gpt2-small_L{layer}_Hcat_z_lr1.20e-03_l11.00e+00_ds10_v9"
        foreign.kissane(folder, name, d_in=WIDE, seed=layer, layer=layer)
    (folder / "README.md").write_text("hello")
    hub.repos[KISSANE_GPT2.repo] = folder
    return folder


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def run(home, place=KISSANE_GPT2, given=NOTHING, only=None):
    arrived = []
    return list(HubImport(home, place, only).run(given, arrived.append)), sum(arrived)


def test_the_published_twelve_are_one_command(hub, published, home, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(home))
    result = CliRunner().invoke(imports.import_, ["kissane-gpt2"], catch_exceptions=False)
    lines = result.stdout.splitlines()
    assert lines[5] == "gpt2/L05.z.relu-10-kissane  L05.z  48 -> 10  relu  folded"
    assert len(lines) == 12
    assert [e.name for e in list_imported(home)] == [f"gpt2/L{i:02d}.z.relu-10-kissane" for i in range(12)]
    assert not list((home / "downloads").glob("[!.]*")), "nothing is kept twice"
    asked = len(hub.requests)
    again = CliRunner().invoke(imports.import_, ["kissane-gpt2"], catch_exceptions=False)
    assert again.stdout.count("(already there)") == 12
    assert [path for path, _ in hub.requests[asked:]] == [f"/api/models/{KISSANE_GPT2.repo}/tree/main"]


def test_only_what_is_missing_comes(hub, published, home):
    outcomes, arrived = run(home)
    assert all(o.new for o in outcomes)
    assert arrived == sum(p.stat().st_size for p in published.iterdir() if p.name != "README.md")
    from atlas.sae.library import remove_imported

    remove_imported(home, "gpt2/L03.z.relu-10-kissane")
    work = HubImport(home, KISSANE_GPT2)
    assert work.total_bytes == sum(p.stat().st_size for p in published.glob("gpt2-small_L3_*"))
    hub.requests.clear()
    assert [o.new for o in work.run(Given(), lambda _: None)].count(True) == 1
    assert all("_L3_" in path for path, _ in hub.requests)


def test_an_interrupted_download_goes_on_where_it_was(hub, published, home):
    weights = next(published.glob("gpt2-small_L0_*.pt"))
    hub.stop_after = CUT
    with pytest.raises(SAEError, match="cannot be had from"):
        run(home)
    (part,) = (home / "downloads").rglob("*.part")
    assert part.stat().st_size == ARRIVED
    hub.stop_after, hub.refuse = None, False
    hub.requests.clear()
    work = HubImport(home, KISSANE_GPT2)
    arrived = []
    done = list(work.run(Given(), arrived.append))
    assert len(done) == 12
    assert all(o.error is None for o in done)
    assert f"bytes={ARRIVED}-" in [asked for path, asked in hub.requests if path.endswith(weights.name)]
    assert sum(arrived) == work.total_bytes
    tensors = torch.load(weights, weights_only=True)
    from atlas.sae.files import load_sae

    entry = find_imported(home, "gpt2/L00.z.relu-10-kissane")
    assert torch.equal(load_sae(entry.path).W_enc, tensors["W_enc"])


def test_a_server_that_knows_no_ranges_starts_the_file_again(hub, published, home):
    hub.stop_after = CUT
    with pytest.raises(SAEError):
        run(home)
    hub.stop_after, hub.refuse, hub.ignore_ranges = None, False, True
    assert all(o.error is None for o in run(home)[0])


def test_what_was_imported_before_the_hub_went_away_stays(hub, published, home, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(home))
    work = HubImport(home, KISSANE_GPT2).run(Given(), lambda _: None)
    for _ in range(3):
        next(work)
    work.close()
    hub.close()
    result = CliRunner().invoke(imports.import_, ["kissane-gpt2"])
    assert isinstance(result.exception, SAEError)
    message = str(result.exception)
    assert KISSANE_GPT2.repo in message
    assert hub.url in message
    assert "the library keeps its 3 SAEs (0 new)" in message
    assert "\n" not in message
    assert len(imported_names(home)) == 3


def test_a_file_that_arrives_damaged_is_thrown_away(hub, published, home):
    hub.corrupt = True
    with pytest.raises(SAEError, match="arrived damaged"):
        run(home)
    assert not list((home / "downloads").rglob("*.part"))
    assert imported_names(home) == []
    hub.corrupt = False
    assert len(run(home)[0]) == 12


def test_a_changed_file_is_not_mixed_with_the_old_part(hub, published, home):
    hub.stop_after = CUT
    with pytest.raises(SAEError):
        run(home)
    hub.stop_after, hub.refuse = None, False
    name = next(published.glob("gpt2-small_L0_*.pt")).stem
    foreign.kissane(published, name, d_in=WIDE, seed=99, layer=0)
    assert all(o.error is None for o in run(home)[0])


def test_the_hugging_face_cache_is_used(hub, published, home, tmp_path):
    from huggingface_hub import constants

    weights = next(published.glob("gpt2-small_L0_*.pt"))
    root = Path(constants.HF_HUB_CACHE) / ("models--" + KISSANE_GPT2.repo.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    (root / "snapshots" / "abc").mkdir(parents=True)
    (root / "snapshots" / "abc" / weights.name).write_bytes(weights.read_bytes())
    whole = HubImport(home, KISSANE_GPT2)
    everything = sum(p.stat().st_size for p in published.iterdir() if p.name != "README.md")
    assert whole.total_bytes == everything - weights.stat().st_size
    hub.requests.clear()
    assert all(o.error is None for o in whole.run(Given(), lambda _: None))
    assert not [path for path, _ in hub.requests if path.endswith(weights.name)]
    assert (root / "snapshots" / "abc" / weights.name).exists(), "the cache is left as it is"


def test_folders_of_a_repository_and_other_formats(hub, home, tmp_path):
    hub.repos["some/saes"] = tmp_path / "repo"
    foreign.saelens(tmp_path / "repo" / "a" / "one", "topk")
    foreign.sparsify(tmp_path / "repo" / "b" / "run")
    (tmp_path / "repo" / "empty").mkdir()
    (tmp_path / "repo" / "empty" / "x.txt").write_text("x")
    outcomes, _ = run(home, HubFolder("some/saes", "a"))
    assert [o.entry.name for o in outcomes] == ["gpt2/L01.resid_pre.topk-10-saelens"]
    outcomes, _ = run(home, HubFolder("some/saes", ""))
    assert [(o.entry.name, o.new) for o in outcomes] == [
        ("gpt2/L01.resid_pre.topk-10-saelens", False),
        ("pythia-70m/L00.mlp_out.topk-10-sparsify", True),
    ]
    with pytest.raises(SAEError, match="holds no SAE of a known format among its 1 files"):
        run(home, HubFolder("some/saes", "empty"))
    with pytest.raises(SAEError, match="cannot be had"):
        run(home, HubFolder("nobody/nothing", ""))
    with pytest.raises(SAEError, match="--name is for one SAE, and there are 2"):
        run(home, HubFolder("some/saes", ""), Given(name="x"))


def test_saes_that_head_atlas_wrote_come_once_too(hub, home, tmp_path):
    hub.repos["mine/saes"] = tmp_path / "repo"
    export(an_sae("gated"), tmp_path / "repo" / "one", "saelens")
    (first,), arrived = run(home, HubFolder("mine/saes", ""))
    assert (first.new, first.entry.name) == (True, "tiny/L01.mlp_out.gated-10")
    assert arrived > 0
    assert first.entry.source.startswith("hf:mine/saes/one@")
    (again,), arrived = run(home, HubFolder("mine/saes", ""))
    assert (again.entry, again.new, arrived) == (first.entry, False, 0)


def test_two_processes_do_not_write_one_file(hub, published, home):
    work = HubImport(home, KISSANE_GPT2)
    with (
        lock(work.downloads.with_name(f".{work.downloads.name}.lock")),
        pytest.raises(ConflictError, match="is held by process"),
    ):
        list(work.run(Given(), lambda _: None))


@pytest.mark.parametrize("text", ["hf:", "hf:one", "hf:a/b/../c", "hf:a b/c", "a/b", "hf:/a/b"])
def test_hub_ids_that_are_none(text):
    with pytest.raises(SAEError, match="cannot be read; write it like hf:OWNER/REPO"):
        hub_folder(text)


def command(home, *words, **environ):
    """The command in a process of its own, so that its environment and exit code are the real ones."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ATLAS_", "HF_"))}
    env |= {
        "ATLAS_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    } | environ
    return subprocess.run([sys.executable, "-m", "atlas", *words], env=env, capture_output=True, text=True)


def test_the_command_reaches_a_mirror_and_says_what_it_cannot_reach(hub, published, home):
    done = command(home, "import", "kissane-gpt2", HF_ENDPOINT=hub.url)
    assert (done.returncode, done.stdout.count("kissane"), done.stderr) == (0, 12, "")
    offline = command(home, "import", "kissane-gpt2", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert len(offline.stderr.splitlines()) == 1
    assert "the library keeps its 12 SAEs (0 new)" in offline.stderr
    listed = command(home, "import", "--list")
    assert len(listed.stdout.splitlines()) == 12
