"""Vectors in exports come from the SAE that the release describes, or not at all."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from atlas.interop.dashboards.pages import Pages
from atlas.interop.dashboards.saedashboard import feature_object
from atlas.interop.dashboards.selection import Wanted, select
from atlas.interop.dashboards.weights import Decoder, find_decoder, tensors_digest
from atlas.sae.files import WEIGHTS, save_sae
from atlas.sae.library import folder_of
from atlas.settings import load_settings
from atlas.store.connection import cursor, open_release
from tests.synthetic import build_synthetic_release
from tests.tiny import EXTRA_TENSORS, random_sae

MODULES = (
    "selection",
    "weights",
    "rows",
    "pages",
    "saedashboard",
    "neuronpedia",
    "plain",
    "headvis",
    "reading",
)


@pytest.mark.parametrize("architecture", sorted(EXTRA_TENSORS))
def test_digest_is_that_of_the_release(tmp_path, architecture):
    sae = random_sae(architecture=architecture, k=3 if architecture == "topk" else None)
    save_sae(sae, tmp_path)
    assert tensors_digest(tmp_path / WEIGHTS) == sae.digest()


def test_found_by_digest_in_the_library_and_among_steps():
    settings = load_settings()
    first, second = random_sae(seed=1), random_sae(seed=2)
    save_sae(first, folder_of(settings.home, first.info.name))
    save_sae(second, settings.steps / "train-abc" / "00000")
    assert first.info.name == second.info.name
    every = np.arange(20)
    for sae in (first, second):
        decoder = find_decoder(settings, sae.info.name, sae.digest())
        np.testing.assert_array_equal(decoder.rows(every), sae.W_dec.numpy())
    assert find_decoder(settings, first.info.name, random_sae(seed=3).digest()) is None
    assert find_decoder(settings, "tiny/other", first.digest()) is None
    assert find_decoder(settings, "not a name", first.digest()) is None


def test_damaged_files_are_passed_over():
    settings = load_settings()
    sae = random_sae()
    folder = folder_of(settings.home, sae.info.name)
    save_sae(sae, folder)
    (folder / WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    step = settings.steps / "train-abc" / "00000"
    step.mkdir(parents=True)
    (step / "cfg.json").write_text("[]")
    assert find_decoder(settings, sae.info.name, sae.digest()) is None


def test_cosines(tmp_path):
    sae = random_sae()
    W_dec = sae.W_dec.clone()
    W_dec[7] = 0
    save_sae(sae.with_tensors({"W_dec": W_dec}), tmp_path)
    found = Decoder(tmp_path / WEIGHTS).cosines(3, np.array([3, 5, 7]))
    expected = torch.nn.functional.cosine_similarity(sae.W_dec[3].double(), sae.W_dec[5].double(), dim=0)
    np.testing.assert_allclose(found, [1, expected, 0], rtol=1e-6)


def test_vectors_and_alignment_of_a_page(tmp_path):
    """A page's vector is the decoder row; its alignment the three largest coordinates over the L1 norm."""
    con = cursor(open_release(build_synthetic_release(tmp_path / "r", n_layers=1, d_sae=16, n_blocks=12)))
    W_dec = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    W_dec[2, :5] = torch.tensor([9.0, 8.0, 9.0, -20.0, 7.0])
    sae = random_sae("L00.z", d_in=32, d_sae=16).with_tensors({"W_dec": W_dec})
    save_sae(sae, tmp_path / "sae")
    decoder = Decoder(tmp_path / "sae" / WEIGHTS)
    parts = select(con, Wanted(sites=("z",)))
    pages = [page for batch in Pages(con, lambda part: decoder).of(parts[0], 5) for page in batch]
    assert len(pages) == 16
    for page in pages:
        entry = json.loads(json.dumps(feature_object(page)))
        row = W_dec[page.feature].double().numpy()
        np.testing.assert_array_equal(np.array(entry["vector"], np.float32), W_dec[page.feature].numpy())
        order = sorted(range(32), key=lambda i: (-row[i], i))[:3]
        assert entry["neuron_alignment_indices"] == order
        np.testing.assert_allclose(entry["neuron_alignment_values"], row[order], rtol=1e-6)
        share = [abs(row[i]) / sum(abs(x) for x in row) for i in order]
        np.testing.assert_allclose(entry["neuron_alignment_l1"], share, rtol=1e-6)
        others = entry["correlated_features_indices"]
        for other, cosine in zip(others, entry["correlated_features_l1"], strict=True):
            theirs = W_dec[other].double().numpy()
            expected = row @ theirs / (np.linalg.norm(row) * np.linalg.norm(theirs))
            assert cosine == pytest.approx(expected, rel=1e-5)
    assert pages[2].fields["neuron_alignment_indices"] == [0, 2, 1]  # of equal ones the first


def test_no_module_imports_torch():
    names = [*(f"atlas.interop.dashboards.{name}" for name in MODULES), "atlas.cli.dashboards"]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
