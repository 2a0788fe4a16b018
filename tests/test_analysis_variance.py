"""FVE over all tokens and where a feature fires, against covariances written out in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.analysis.variance import ActiveShares, Moments, fve
from atlas.errors import StoreError

D_IN, D_SAE, N_HEADS = 6, 5, 3


def inputs(seed: int, n: int):
    """Activations with a mean, directions, and where features fire: one never, one rarely, one always."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D_IN, generator=g) + torch.randn(D_IN, generator=g)
    W = torch.randn(D_IN, D_SAE, generator=g)
    fires = torch.rand(n, D_SAE, generator=g) < 0.5
    fires[:, 0], fires[:, 4] = False, True
    fires[9:, 1] = False
    return x, W, fires


def shares_of(x, W, fires, batches: int) -> ActiveShares:
    shares = ActiveShares(W, N_HEADS)
    for part, on in zip(x.chunk(batches), fires.chunk(batches), strict=True):
        row, feature = on.nonzero(as_tuple=True)
        shares.update(part, row, feature, (part @ W)[row, feature])
    return shares


def by_hand(x, W, fires) -> np.ndarray:
    x, W, fires = x.double().numpy(), W.double().numpy(), fires.numpy()
    out = np.full((D_SAE, N_HEADS), np.nan)
    for f in range(D_SAE):
        rows = x[fires[:, f]]
        if len(rows) < 10:
            continue
        parts = (rows * W[:, f]).reshape(len(rows), N_HEADS, -1).sum(2)
        p = parts.sum(1)
        for h in range(N_HEADS):
            out[f, h] = np.cov(parts[:, h], p, bias=True)[0, 1] / p.var()
    return out


@pytest.mark.parametrize("way", ["_by_loop", "_by_product"])
@pytest.mark.parametrize("batches", [1, 3])
def test_active_shares_against_covariances(batches, way, monkeypatch):
    """Either way, that of a CPU and that of a GPU."""
    monkeypatch.setattr(ActiveShares, "_by_loop", getattr(ActiveShares, way))
    x, W, fires = inputs(0, 90)
    found = shares_of(x, W, fires, batches).finish()
    np.testing.assert_allclose(found, by_hand(x, W, fires), atol=2e-5)
    assert np.isnan(found[0]).all()
    assert np.isnan(found[1]).all(), "fires on fewer than ten tokens"
    np.testing.assert_allclose(found[2:].sum(1), 1, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_sums_of_slices_of_any_width(n_heads, d_head, seed):
    """Heads of any number and size; features with no token, fewer than four, and any rest of four."""
    rng = np.random.default_rng(seed)
    n, d_sae, d_in = 40, 9, n_heads * d_head
    x, W = (rng.standard_normal(shape).astype(np.float32) for shape in ((n, d_in), (d_in, d_sae)))
    row = np.concatenate([rng.choice(n, f, replace=False) for f in range(d_sae)]).astype(np.int64)
    feature, p = np.repeat(np.arange(d_sae), np.arange(d_sae)), rng.standard_normal(len(row))
    shares = ActiveShares(torch.from_numpy(W), n_heads)
    for _ in range(2):
        shares.update(*(torch.from_numpy(part) for part in (x, row, feature, p.astype(np.float32))))
    for f in range(d_sae):
        mine = feature == f
        parts = (x[row[mine]].astype(np.float64) * W[:, f]).reshape(-1, n_heads, d_head).sum(2)
        for name, expected in (("d", parts.sum(0)), ("dp", (p[mine, None] * parts).sum(0))):
            np.testing.assert_allclose(shares.sums[name][f], 2 * expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(20, 60), st.integers(1, 19))
def test_active_shares_merge(seed, n, cut):
    x, W, fires = inputs(seed, n)
    one, other = shares_of(x[:cut], W, fires[:cut], 1), shares_of(x[cut:], W, fires[cut:], 1)
    np.testing.assert_allclose(one.merge(other).finish(), shares_of(x, W, fires, 1).finish(), atol=1e-4)
    np.testing.assert_allclose(one.merge(other).finish(), other.merge(one).finish(), atol=1e-12)


def test_where_it_always_fires_it_is_the_fve_over_all_tokens():
    x, W, fires = inputs(3, 500)
    moments = Moments.empty(D_IN)
    moments.update(x)
    everywhere = fve(W.numpy(), moments.covariance(), N_HEADS)
    np.testing.assert_allclose(shares_of(x, W, fires, 4).finish()[4], everywhere[4], atol=1e-5)


def test_moments_of_wide_sites_are_added_up_in_strips():
    """Sites wider than one strip, and no multiple of it: against numpy, in parts."""
    x = torch.randn(90, 150, generator=torch.Generator().manual_seed(5)) @ torch.ones(150, 150).tril() + 2
    one, other = Moments.empty(150), Moments.empty(150)
    for part, rows in ((one, x[:31]), (one, x[31:40]), (other, x[40:])):
        part.update(rows)
    expected = np.cov(x.double().numpy().T, bias=True)
    np.testing.assert_allclose(one.merge(other).covariance(), expected, atol=1e-10 * expected.max())


def test_a_pre_activation_that_does_not_vary_has_none():
    x, W = torch.ones(20, D_IN), torch.ones(D_IN, D_SAE)
    assert np.isnan(shares_of(x, W, torch.ones(20, D_SAE, dtype=torch.bool), 1).finish()).all()


def test_saving_loading_and_damage(tmp_path):
    x, W, fires = inputs(1, 40)
    shares, moments = shares_of(x, W, fires, 1), Moments.empty(D_IN)
    moments.update(x)
    shares.save(tmp_path / "s.npz")
    moments.save(tmp_path / "m.npz")
    np.testing.assert_array_equal(shares.load(tmp_path / "s.npz").finish(), shares.finish())
    np.testing.assert_array_equal(Moments.load(tmp_path / "m.npz").covariance(), moments.covariance())
    for name in ("s.npz", "m.npz"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-30])
    with pytest.raises(StoreError, match=r"s\.npz"):
        shares.load(tmp_path / "s.npz")
    with pytest.raises(StoreError, match=r"m\.npz"):
        Moments.load(tmp_path / "m.npz")
