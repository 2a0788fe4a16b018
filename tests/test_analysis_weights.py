"""Shares of heads, norms and moments against loops in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.analysis.shard import ShardPass, load_moments
from atlas.analysis.variance import Moments, fve
from atlas.analysis.weights import attribution_directions, decoder_share, weight_statistics
from atlas.corpus.tokens import TokenStore
from atlas.errors import StoreError
from atlas.lm.hooks import capture
from atlas.progress import NullProgress
from atlas.sites import Site

from .tiny import (
    D_HEAD,
    D_MODEL,
    N_HEADS,
    random_sae,
    random_tokens,
    save_store,
    tiny_model,
)


def test_decoder_share():
    sae = random_sae()
    share = decoder_share(sae.W_dec, N_HEADS).tolist()
    for f in range(sae.d_sae):
        row = sae.W_dec[f].tolist()
        norms = [math.sqrt(sum(x * x for x in row[h * D_HEAD : (h + 1) * D_HEAD])) for h in range(N_HEADS)]
        assert share[f] == pytest.approx([n / sum(norms) for n in norms], rel=1e-9)
    assert not decoder_share(torch.zeros(1, 6), 3).isnan().any()


@pytest.mark.parametrize("architecture", ["relu", "gated"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_weight_statistics(architecture, rescaled):
    """Of the directions as used: exp(r_mag), and the decoder's norm moved into the encoder."""
    sae = random_sae(seed=4, architecture=architecture, rescale_acts_by_decoder_norm=rescaled)
    found = weight_statistics(sae)
    for f in range(sae.d_sae):
        e, d = sae.W_enc[:, f].tolist(), sae.W_dec[f].tolist()
        moved = math.sqrt(sum(x * x for x in d)) if rescaled else 1.0
        gain = moved * (math.exp(sae.r_mag[f].item()) if architecture == "gated" else 1.0)
        e, d = [x * gain for x in e], [x / moved for x in d]
        norm_e, norm_d = math.sqrt(sum(x * x for x in e)), math.sqrt(sum(x * x for x in d))
        assert found["encoder_norm"][f] == pytest.approx(norm_e, rel=1e-6)
        assert found["decoder_norm"][f] == pytest.approx(norm_d, rel=1e-6)
        cosine = sum(a * b for a, b in zip(e, d, strict=True)) / norm_e / norm_d
        assert found["encoder_decoder_cosine"][f] == pytest.approx(cosine, abs=1e-6)
        assert found["bias"][f] == pytest.approx(sae.b_enc[f].item() * moved, rel=1e-6)


# ---------------------------------------------------------------- fve


def correlated(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D_MODEL)) @ rng.normal(size=(D_MODEL, D_MODEL)) + 3 * rng.normal(size=D_MODEL)
    return x.astype(np.float32)


def test_fve_is_the_share_of_covariance_over_tokens():
    x, W = correlated(70, 0), random_sae().W_enc.numpy()
    moments = Moments.empty(D_MODEL)
    moments.update(torch.from_numpy(x))
    found = fve(W, moments.covariance(), N_HEADS)
    assert found.shape == (W.shape[1], N_HEADS)
    for f in range(W.shape[1]):
        parts = [
            [sum(float(t[i]) * float(W[i, f]) for i in range(h * D_HEAD, (h + 1) * D_HEAD)) for t in x]
            for h in range(N_HEADS)
        ]
        p = [sum(d) for d in zip(*parts, strict=True)]
        mean_p = sum(p) / len(p)
        variance = sum((v - mean_p) ** 2 for v in p) / len(p)
        for h, d in enumerate(parts):
            mean_d = sum(d) / len(d)
            covariance = sum((a - mean_d) * (b - mean_p) for a, b in zip(d, p, strict=True)) / len(p)
            assert found[f, h] == pytest.approx(covariance / variance, abs=1e-9)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    assert ((found < 0) | (found > 1)).any(), "it may leave [0, 1], and here it does"


@pytest.mark.parametrize("architecture", ["topk", "gated"])
@pytest.mark.parametrize("normalisation", ["none", "constant_norm_rescale", "layer_norm"])
def test_fve_of_normalised_saes_over_shards(tmp_path, architecture, normalisation):
    """Covariances over tokens of the heads' parts with the token's own size, from saved shards."""
    tokens = random_tokens(6, 9, seed=3)
    store = TokenStore(save_store(tmp_path / "store", tokens))
    known = {"architecture": architecture, "k": 4, "seed": 8, "normalize_activations": normalisation}
    sae, plain = random_sae(**known), random_sae(seed=9)
    for name, blocks in (("a", range(4)), ("b", range(4, 6))):
        work = ShardPass(tiny_model(), [sae, plain], store)
        work.run(blocks, NullProgress())
        (tmp_path / name).mkdir()
        work.save(tmp_path / name)
    moments = load_moments([tmp_path / "a", tmp_path / "b"], sae.info.site, normalisation)
    found = fve(attribution_directions(sae).numpy(), moments.covariance(), N_HEADS)
    x = capture(tiny_model(), torch.from_numpy(tokens), [sae.info.site])[0][sae.info.site]
    x = x[:, 1:].reshape(-1, D_MODEL).double().numpy()
    assert moments.n == len(x)
    W = sae.W_enc.double().numpy() * (np.exp(sae.r_mag.double().numpy()) if architecture == "gated" else 1)
    size = np.ones(len(x))
    if normalisation == "constant_norm_rescale":
        size = np.sqrt((x**2).mean(1))
    if normalisation == "layer_norm":
        size, W = x.std(1, ddof=1) + 1e-5, W - W.mean(0)
    parts = np.stack([x[:, h] @ W[h] / size[:, None] for h in np.split(np.arange(D_MODEL), N_HEADS)], axis=2)
    for f in range(sae.d_sae):
        p = parts[:, f].sum(1)
        pre = sae.preactivations(torch.from_numpy(x).float())[:, f].numpy()
        np.testing.assert_allclose(p + sae.bias_term[f].item(), pre, atol=1e-4)
        for h in range(N_HEADS):
            expected = np.cov(parts[:, f, h], p, bias=True)[0, 1] / p.var()
            assert found[f, h] == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-9)


def test_moments_of_a_normalisation_no_sae_has_are_missed_by_name(tmp_path):
    with pytest.raises(StoreError, match=r"moments-L01\.z-layer_norm\.npz"):
        load_moments([tmp_path], Site("z", 1), "layer_norm")


def test_fve_without_variance_is_nan():
    assert np.isnan(fve(np.ones((4, 2)), np.zeros((4, 4)), 2)).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=5), st.randoms())
def test_moments_merge_in_any_grouping(sizes, random):
    x = correlated(sum(sizes) + 1, 1)
    cuts = np.cumsum([1, *sizes])[:-1]
    parts = []
    for piece in np.split(x, cuts):
        parts.append(Moments.empty(D_MODEL))
        parts[-1].update(torch.from_numpy(piece))
    random.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged.n == len(x)
    expected = np.cov(x.astype(np.float64).T, bias=True) if len(x) > 1 else np.zeros((D_MODEL, D_MODEL))
    np.testing.assert_allclose(merged.covariance(), expected, atol=1e-10 * (x.astype(float) ** 2).max())
    np.testing.assert_allclose(merged.total, x.astype(np.float64).sum(0), rtol=1e-12, atol=1e-9)


def test_moments_of_nothing():
    assert Moments.empty(3).covariance().tolist() == np.zeros((3, 3)).tolist()
