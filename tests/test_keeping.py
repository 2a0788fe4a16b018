"""Whether a build keeps the residual stream: only where it helps, and as far as there is room."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from atlas.configs import AnalysisConfig, BuildConfig, CorpusConfig, ModelConfig
from atlas.lm.load import load_model
from atlas.pipeline import keeping
from atlas.pipeline.keeping import can_keep, kept_residuals
from atlas.settings import load_settings
from atlas.sites import Site

from .tiny import CPU, N_CTX, random_sae, rotary_folder, tiny_model

Z = random_sae("L01.z")


def config_of(blocks=40):
    return BuildConfig(corpus=CorpusConfig("text", context=N_CTX), analysis=AnalysisConfig(blocks))


def kept(home, saes, **environment):
    home.mkdir(exist_ok=True)
    settings = load_settings({"ATLAS_HOME": str(home), **environment})
    return kept_residuals(config_of(), "digest", settings, tiny_model(), saes)


def free(monkeypatch, n):
    monkeypatch.setattr(keeping.shutil, "disk_usage", lambda _: SimpleNamespace(free=n))


def test_it_is_kept_before_the_layers_whose_heads_are_read(tmp_path):
    saes = [Z, random_sae("L00.resid_pre"), random_sae("L01.H02.z", d_in=4)]
    found = kept(tmp_path, saes)
    assert found.sites == (Site("resid_pre", 1),)
    assert [path.suffix for path in (tmp_path / "residuals").iterdir() if path.is_file()] == [".lock"]


@pytest.mark.parametrize(
    "saes", [[], [random_sae("L00.resid_pre")], [Z, random_sae("L01.attn_out")]], ids=len
)
def test_not_for_saes_that_it_would_not_help(saes):
    assert not can_keep(config_of(), tiny_model(), saes)


def test_not_where_few_blocks_are_looked_at_again():
    """20 features keep at most 75 examples each."""
    assert can_keep(config_of(1500), tiny_model(), [Z])
    assert not can_keep(config_of(1501), tiny_model(), [Z])


def test_not_on_a_gpu_and_not_for_other_attention():
    on_gpu = replace(tiny_model(), device=torch.device("cuda"))
    assert not can_keep(config_of(), on_gpu, [Z])
    rotary = load_model(ModelConfig(str(rotary_folder())), CPU)
    assert not can_keep(config_of(), rotary, [Z])


def test_0_gigabytes_keep_nothing_and_change_no_batches(tmp_path):
    assert kept(tmp_path, [Z], ATLAS_RESIDUAL_GB="0") is None
    assert can_keep(config_of(), tiny_model(), [Z])
    assert not (tmp_path / "residuals").exists()


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path, caplog):
    (tmp_path / "residuals").write_text("a file is in the way")
    assert kept(tmp_path, [Z]) is None
    assert "the residual stream is not kept" in caplog.text


def test_the_bound_is_the_settings_and_half_of_the_free_disk(tmp_path, monkeypatch):
    for n, expected in ((10**12, 2 * 10**9), (3 * 10**9, 15 * 10**8), (0, 0)):
        free(monkeypatch, n)
        assert kept(tmp_path, [Z], ATLAS_RESIDUAL_GB="2").on_disk.limit_bytes == expected
    # What is kept already is not counted as taken: the bound stays where it is.
    folder = tmp_path / "residuals" / ("a" * 32)
    folder.mkdir()
    (folder / "one.acts").write_bytes(bytes(1000))
    free(monkeypatch, 9000)
    assert kept(tmp_path, [Z], ATLAS_RESIDUAL_GB="2").on_disk.limit_bytes == 5000
