"""Effects on the logits against the Hugging Face weights and plain sums in float64."""

import math

import numpy as np
import pytest
import torch

from atlas.analysis import logits
from atlas.analysis.logits import histogram, logit_effects, logit_share
from atlas.errors import SAEError

from .tiny import D_HEAD, D_MODEL, D_VOCAB, N_HEADS, model_folder, random_sae, tiny_model

PLACES = ("L00.z", "L01.z", "L01.H02.z", "L00.H01.v", "L01.resid_pre", "L01.attn_out", "L00.mlp_out")


@pytest.fixture(scope="module")
def hf():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float64).eval()


def sae_at(name: str, **known):
    return random_sae(name, d_in=D_HEAD if "H" in name else D_MODEL, d_sae=7, **known)


def to_logits(hf) -> np.ndarray:
    """[d_model, d_vocab] from the Hugging Face weights alone, centred by explicit projections."""
    gamma = np.diag(hf.transformer.ln_f.weight.detach().numpy())
    unembed = gamma @ hf.lm_head.weight.detach().numpy().T
    return (np.eye(D_MODEL) - 1 / D_MODEL) @ unembed @ (np.eye(D_VOCAB) - 1 / D_VOCAB)


def decoder_rows(sae) -> np.ndarray:
    D = sae.W_dec.double().numpy()
    return D / np.linalg.norm(D, axis=1, keepdims=True) if sae.info.rescale_acts_by_decoder_norm else D


def by_head_in_float64(hf, sae) -> np.ndarray:
    """[d_sae, n_heads, d_vocab]: what goes through each head of the layer."""
    W_O = hf.transformer.h[sae.info.site.layer].attn.c_proj.weight.detach().numpy()
    D, slices = decoder_rows(sae), [slice(h * D_HEAD, (h + 1) * D_HEAD) for h in range(N_HEADS)]
    return np.stack([D[:, part] @ W_O[part] @ to_logits(hf) for part in slices], axis=1)


def effects_in_float64(hf, sae) -> np.ndarray:
    """[d_sae, d_vocab]."""
    site = sae.info.site
    if site.kind not in ("z", "v"):
        return decoder_rows(sae) @ to_logits(hf)
    if site.head is None:
        return by_head_in_float64(hf, sae).sum(1)
    W_O = hf.transformer.h[site.layer].attn.c_proj.weight.detach().numpy()
    return decoder_rows(sae) @ W_O[site.head * D_HEAD : (site.head + 1) * D_HEAD] @ to_logits(hf)


@pytest.mark.parametrize("processing", ["raw", "folded"])
@pytest.mark.parametrize("name", PLACES)
def test_ends_and_moments(hf, processing, name):
    sae = sae_at(name)
    found = logit_effects(tiny_model(processing), sae)
    rows, moments, effects = found.tables["logit_effects"], found.moments, effects_in_float64(hf, sae)
    assert rows["feature"].tolist() == [f for f in range(7) for _ in range(40)]
    assert rows["sign"].tolist() == ([-1] * 20 + [1] * 20) * 7
    assert rows["rank"].tolist() == list(range(20)) * 14
    for f in range(7):
        low, high = rows["token"][f * 40 : f * 40 + 20], rows["token"][f * 40 + 20 : f * 40 + 40]
        assert low.tolist() == np.argsort(effects[f])[:20].tolist()
        assert high.tolist() == np.argsort(-effects[f])[:20].tolist()
        values = rows["value"][f * 40 : f * 40 + 40]
        np.testing.assert_allclose(values, effects[f][np.concatenate([low, high])], atol=2e-5)
        mean = sum(effects[f]) / D_VOCAB
        central = [sum((v - mean) ** p for v in effects[f]) / D_VOCAB for p in (2, 3, 4)]
        assert moments["logit_mean"][f] == pytest.approx(0, abs=1e-6)
        assert moments["logit_std"][f] == pytest.approx(math.sqrt(central[0]), rel=3e-6)
        assert moments["logit_skew"][f] == pytest.approx(central[1] / central[0] ** 1.5, abs=1e-5)
        assert moments["logit_kurtosis"][f] == pytest.approx(central[2] / central[0] ** 2, rel=1e-5)


@pytest.mark.parametrize("name", ["L01.z", "L00.H01.v", "L01.resid_pre"])
def test_histogram_of_the_vocabulary(hf, name):
    sae = sae_at(name, seed=2)
    rows, effects = logit_effects(tiny_model(), sae).tables["logit_histogram"], effects_in_float64(hf, sae)
    assert rows["feature"].tolist() == list(range(7))
    for f, counts in enumerate(rows["n"].to_pylist()):
        low, high = min(effects[f]), max(effects[f])
        assert (rows["low"][f], rows["high"][f]) == pytest.approx((low, high), rel=1e-5)
        assert (len(counts), sum(counts)) == (40, D_VOCAB)
        assert counts[0] >= 1
        assert counts[-1] >= 1
        for i in range(1, 40):
            edge, below = low + (high - low) * i / 40, sum(counts[:i])
            # An effect so close to an edge that float32 cannot tell may lie on either side of it.
            assert sum(effects[f] < edge - 1e-5) <= below <= sum(effects[f] < edge + 1e-5)


def test_histogram_bins_hold_their_lower_edge_alone_but_for_the_last():
    rows = torch.tensor([[0.0, 1.0, 2.0, 2.999, 3.0, 4.0], [-4.0, 0.0, 0.0, 0.0, 0.0, 4.0]])
    assert histogram(rows, 4).tolist() == [[1, 1, 2, 2], [1, 0, 4, 1]]


@pytest.mark.parametrize("rescaled", [False, True])
def test_effects_of_the_two_heads_of_largest_share(hf, rescaled):
    sae = sae_at("L01.z", seed=3, rescale_acts_by_decoder_norm=rescaled)
    rows = logit_effects(tiny_model(), sae).tables["head_logit_effects"]
    effects = by_head_in_float64(hf, sae)
    expected = []
    for f in range(7):
        norms = np.linalg.norm(sae.W_dec[f].double().numpy().reshape(N_HEADS, D_HEAD), axis=1)
        for head in sorted(np.argsort(-norms)[:2].tolist()):
            for sign in (-1, 1):
                order = np.argsort(-sign * effects[f, head])[:5].tolist()
                expected += [(f, head, sign, r, t, effects[f, head, t]) for r, t in enumerate(order)]
    keys = ("feature", "head", "sign", "rank", "token")
    assert list(zip(*(rows[key].tolist() for key in keys), strict=True)) == [row[:5] for row in expected]
    np.testing.assert_allclose(rows["value"], [row[5] for row in expected], atol=2e-5)


@pytest.mark.parametrize("processing", ["raw", "folded"])
def test_share_is_the_covariance_over_the_vocabulary(hf, processing):
    sae = sae_at("L01.z", seed=4)
    found, effects = logit_share(tiny_model(processing), sae), by_head_in_float64(hf, sae)
    assert found.shape == (7, N_HEADS)
    for f in range(7):
        whole = effects[f].sum(0)
        mean = sum(whole) / D_VOCAB
        variance = sum((v - mean) ** 2 for v in whole) / D_VOCAB
        for h in range(N_HEADS):
            mean_h = sum(effects[f, h]) / D_VOCAB
            products = [(a - mean_h) * (b - mean) for a, b in zip(effects[f, h], whole, strict=True)]
            assert found[f, h] == pytest.approx(sum(products) / D_VOCAB / variance, abs=1e-5)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    assert ((found < 0) | (found > 1)).any(), "it may leave [0, 1], and here it does"


def test_a_feature_that_writes_nothing():
    """All of its effects tie: tokens in their order, one bin, and neither shape nor shares."""
    sae = sae_at("L01.z")
    W_dec = sae.W_dec.clone()
    W_dec[2] = 0
    sae = sae.with_tensors({"W_dec": W_dec})
    found = logit_effects(tiny_model(), sae)
    rows = found.tables["logit_effects"]
    assert rows["token"][80:120].tolist() == [*range(20), *range(20)]
    assert not rows["value"][80:120].any()
    assert found.tables["logit_histogram"]["n"][2].as_py() == [D_VOCAB, *[0] * 39]
    by_head = found.tables["head_logit_effects"]
    assert by_head["head"][40:60].tolist() == [0] * 10 + [1] * 10
    assert by_head["token"][40:60].tolist() == [0, 1, 2, 3, 4] * 4
    assert (found.moments["logit_mean"][2], found.moments["logit_std"][2]) == (0, 0)
    for name in ("logit_skew", "logit_kurtosis"):
        assert np.flatnonzero(np.isnan(found.moments[name])).tolist() == [2]
    assert np.flatnonzero(np.isnan(logit_share(tiny_model(), sae)).all(1)).tolist() == [2]


def test_the_shape_of_a_weak_feature_is_that_of_a_strong_one():
    sae = sae_at("L01.z")
    weak = sae.with_tensors({"W_dec": sae.W_dec * 2.0**-60})
    moments, of_weak = (logit_effects(tiny_model(), s).moments for s in (sae, weak))
    np.testing.assert_allclose(of_weak["logit_std"], moments["logit_std"] * 2.0**-60, rtol=1e-6)
    for name in ("logit_skew", "logit_kurtosis"):
        np.testing.assert_allclose(of_weak[name], moments[name], rtol=1e-5)


def test_a_few_features_at_a_time_are_the_same(monkeypatch):
    sae = random_sae("L01.z")
    whole, share = logit_effects(tiny_model(), sae), logit_share(tiny_model(), sae)
    monkeypatch.setattr(logits, "_ENTRIES", 3 * D_VOCAB)
    monkeypatch.setattr(logits, "_SHARE_CHUNK", 3)
    logits.logit_covariance.cache_clear()
    monkeypatch.setattr(logits, "_VOCAB_CHUNK", 10)
    parts = logit_effects(tiny_model(), sae)
    for name in ("logit_effects", "head_logit_effects"):
        assert np.array_equal(whole.tables[name]["token"], parts.tables[name]["token"])
        np.testing.assert_allclose(whole.tables[name]["value"], parts.tables[name]["value"], atol=1e-6)
    assert sum(map(sum, parts.tables["logit_histogram"]["n"].to_pylist())) == 20 * D_VOCAB
    np.testing.assert_allclose(parts.moments["logit_skew"], whole.moments["logit_skew"], atol=1e-5)
    np.testing.assert_allclose(logit_share(tiny_model(), sae), share, atol=1e-12)


@pytest.mark.parametrize("name", ["L01.H02.z", "L00.H01.v", "L01.attn_out", "L01.H00.k"])
def test_only_z_of_a_whole_layer_has_heads(name):
    sae = sae_at(name)
    assert "head_logit_effects" not in logit_effects(tiny_model(), sae).tables
    with pytest.raises(SAEError, match="must be on z of a whole layer"):
        logit_share(tiny_model(), sae)


@pytest.mark.parametrize("name", ["L00.H01.q", "L01.H00.k"])
def test_queries_and_keys_write_nothing_to_the_logits(name):
    found = logit_effects(tiny_model(), sae_at(name))
    assert found.tables == {}
    assert sorted(found.moments) == ["logit_kurtosis", "logit_mean", "logit_skew", "logit_std"]
    assert all(np.isnan(column).all() and len(column) == 7 for column in found.moments.values())
