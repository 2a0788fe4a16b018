"""What is imported on one machine is found on all that share a lake."""

# ruff: noqa: F401 (fixtures are imported and then asked for by name)
from dataclasses import replace
from uuid import uuid4

import pytest
from click.testing import CliRunner

from atlas.cli import imports
from atlas.errors import SAEError
from atlas.interop.exporting import find_sae
from atlas.interop.importing import keep
from atlas.sae.files import save_sae
from atlas.sae.library import find_imported, folder_of, imported_names
from atlas.sae.library_lake import bring_imported, share_imported
from atlas.settings import load_settings
from atlas.store.lake.lake import Lake
from tests.s3_server import bucket, s3_server
from tests.test_interop_write import an_sae

NAME, OTHER = "tiny/L01.mlp_out.relu-10", "tiny/L01.mlp_out.topk-10"


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.server)])
def at(request, tmp_path):
    url = request.getfixturevalue("bucket") if request.param == "s3" else f"memory://{uuid4().hex}"
    return lambda name: load_settings({"ATLAS_HOME": str(tmp_path / name), "ATLAS_LAKE_URL": url})


def test_an_sae_of_another_machine_is_found(at):
    one, two = at("one"), at("two")
    entry, _ = keep(one.home, an_sae("relu"), None, "hf:somebody/something")
    keep(one.home, an_sae("topk"), None)
    for name in (NAME, OTHER):
        share_imported(one, name)
    bring_imported(two, ["tiny/*relu*"])
    assert imported_names(two.home) == [NAME]
    found = find_imported(two.home, NAME)
    assert (found.digest, found.source) == (entry.digest, "hf:somebody/something")
    assert find_sae(two, OTHER).info.architecture == "topk"


def test_a_copy_that_differs_is_replaced_and_a_lone_one_given(at):
    one, two, three = at("one"), at("two"), at("three")
    keep(one.home, an_sae("relu"), None)
    share_imported(one, NAME)
    keep(two.home, an_sae("relu", seed=1), None)
    with pytest.raises(SAEError, match="the lake already has another SAE called"):
        share_imported(two, NAME)
    keep(two.home, an_sae("topk"), None)
    bring_imported(two)
    assert find_imported(two.home, NAME).digest == find_imported(one.home, NAME).digest
    bring_imported(three)
    assert imported_names(three.home) == [NAME, OTHER]


def test_the_command_shares_lists_and_removes(at, tmp_path, monkeypatch):
    one, two = at("one"), at("two")
    keep(one.home, an_sae("relu"), None)

    def run(settings, *words):
        monkeypatch.setenv("ATLAS_HOME", str(settings.home))
        monkeypatch.setenv("ATLAS_LAKE_URL", settings.lake_url)
        return CliRunner().invoke(imports.import_, words, catch_exceptions=False)

    assert NAME not in run(two, "--list").output
    path = folder_of(one.home, NAME)
    assert run(one, str(path), "--model", "tiny").exit_code == 0
    assert NAME in run(two, "--list").output
    assert run(two, "--remove", NAME).output == f"removed {NAME}\n"
    assert NAME not in run(at("three"), "--list").output
    assert not folder_of(two.home, NAME).exists()


def test_a_trained_sae_of_another_machine_is_found(at, tmp_path):
    """Only the output that holds it is copied."""
    one, two = at("one"), at("two")
    for step, architecture in (("train-0000000000000001", "relu"), ("train-0000000000000002", "topk")):
        save_sae(an_sae(architecture), one.steps / step / "00000")
        Lake(one).steps.publish(step, one.steps / step)
    assert find_sae(two, OTHER).info.architecture == "topk"
    assert [path.name for path in two.steps.glob("train-*")] == ["train-0000000000000002"]
    with pytest.raises(SAEError, match="no SAE is called 'tiny/none'"):
        find_sae(two, "tiny/none")
    with pytest.raises(SAEError, match="no SAE is called 'tiny/L01"):
        find_sae(load_settings({"ATLAS_HOME": str(tmp_path / "three")}), OTHER)


def test_without_a_lake_nothing_happens(tmp_path):
    settings = load_settings({"ATLAS_HOME": str(tmp_path)})
    keep(settings.home, an_sae("relu"), None)
    bring_imported(settings)
    share_imported(settings, NAME)
    assert not settings.lake_url
    assert not (tmp_path / "lake").exists()
    assert replace(settings, lake_url="memory://x").saes == settings.saes
