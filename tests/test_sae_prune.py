"""Pruning: what is measured, which criteria hold, how they overlap, and that pruned features never fire."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.configs import PruneConfig
from atlas.corpus.tokens import TokenStore
from atlas.progress import NullProgress
from atlas.sae.files import load_sae, save_sae
from atlas.sae.harvest import Harvest, Stream
from atlas.sae.model import SAE
from atlas.sae.prune import Firing, measure_firing, pruned, pruned_bits, pruning_row

from .tiny import D_MODEL, random_sae, random_tokens, save_store, tiny_model

CONTEXT, BLOCKS, HELD_OUT = 10, 12, 3
SAES = [random_sae("L00.z", k=4, d_sae=24), random_sae("L01.z", seed=1, d_sae=16)]


def of(architecture, seed=0, **info):
    """A random SAE of any architecture."""
    sae = random_sae(k=5 if architecture == "topk" else None, d_sae=30, seed=seed)
    g, extra = torch.Generator().manual_seed(seed + 100), {}
    if architecture in ("jumprelu", "batchtopk", "matryoshka"):
        extra["threshold"] = torch.rand(30, generator=g) * 0.3
    if architecture == "gated":
        extra = {"b_gate": torch.randn(30, generator=g) * 0.3, "r_mag": torch.randn(30, generator=g) * 0.3}
    return SAE(replace(sae.info, architecture=architecture, **info), **(sae.tensors() | extra))


ALL = [
    of("topk"),
    of("relu", 1),
    of("jumprelu", 2),
    of("batchtopk", 3),
    of("matryoshka", 4),
    of("gated", 5),
    of("topk", 6, rescale_acts_by_decoder_norm=True),
    of("relu", 7, normalize_activations="layer_norm"),
    of("gated", 8, apply_b_dec_to_input=False, normalize_activations="constant_norm_rescale"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    tokens = random_tokens(BLOCKS, CONTEXT, seed=2)
    return TokenStore(save_store(tmp_path_factory.mktemp("prune") / "store", tokens))


def measured(store, tokens, chunk_tokens=20, saes=SAES):
    stream = Stream(store, HELD_OUT, chunk_tokens, 5)
    source = Harvest(tiny_model(), stream, [sae.info.site for sae in saes])
    return measure_firing(source, stream, saes, tokens, NullProgress()), stream


@pytest.mark.parametrize("tokens", [9, 20, 50, 10**6])
def test_each_training_token_is_measured_once_and_no_held_out_one(store, tokens):
    """Against dense activations of the very blocks, one after another."""
    found, stream = measured(store, tokens)
    n = min(tokens, (BLOCKS - HELD_OUT) * (CONTEXT - 1))
    order = np.concatenate([stream.block_numbers(c) for c in range(BLOCKS)])[: BLOCKS - HELD_OUT]
    assert sorted(order) == list(range(HELD_OUT, BLOCKS))
    for sae, firing in zip(SAES, found, strict=True):
        x = Harvest(tiny_model(), stream, [sae.info.site]).blocks(order).rows(sae.info.site)[:n]
        f = sae.encode(x)
        assert firing.n_tokens == n
        torch.testing.assert_close(firing.max_activation, f.max(0).values)
        assert firing.n_active.tolist() == (f > 0).sum(0).tolist()
        assert firing.square == pytest.approx(x.double().square().sum().item())


def test_chunks_do_not_matter_and_sums_merge(store):
    whole, _ = measured(store, 81)
    for size in (9, 27, 200):
        for a, b in zip(measured(store, 81, size)[0], whole, strict=True):
            torch.testing.assert_close(a.max_activation, b.max_activation)
            assert torch.equal(a.n_active, b.n_active)
    sae, x = SAES[1], torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(0))
    parts = [Firing.empty(sae.d_sae) for _ in range(3)]
    for part, rows in zip(parts, (x[:15], x[15:], x), strict=True):
        part.update(rows, sae.active(rows))
    merged = parts[0].merge(parts[1])
    torch.testing.assert_close(merged.max_activation, parts[2].max_activation)
    assert torch.equal(merged.n_active, parts[2].n_active)
    assert (merged.n_tokens, merged.square) == (40, pytest.approx(parts[2].square))


def test_a_normalising_sae_is_measured_on_normalised_inputs(store):
    sae = replace(SAES[1], info=replace(SAES[1].info, normalize_activations="constant_norm_rescale"))
    (firing,), _ = measured(store, 81, saes=[sae])
    assert firing.input_scale(sae.d_in) == pytest.approx(1.0, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0, 4),
    st.floats(0, 2),
    st.floats(0, 1),
)
def test_criteria_by_hand_and_inclusion_exclusion(seed, activation, norm, rate):
    rng, n, d_in = np.random.default_rng(seed), 40, 6
    config = PruneConfig(activation, norm, rate)
    firing = Firing(
        torch.from_numpy(rng.exponential(size=n)).float(),
        torch.from_numpy(rng.integers(0, 50, n)),
        n_tokens=50,
        square=float(rng.exponential()) * 50 * d_in,
    )
    norms = torch.from_numpy(rng.exponential(size=n)).float()
    bits = pruned_bits(norms, firing, d_in, config).numpy()
    limit = activation * (firing.square / 50 / d_in) ** 0.5
    weak = {i for i in range(n) if firing.max_activation[i].item() < limit}
    short = {i for i in range(n) if norms[i].item() < norm}
    rare = {i for i in range(n) if firing.n_active[i].item() / 50 < rate}
    assert [int(i in weak) + 2 * (i in short) + 4 * (i in rare) for i in range(n)] == bits.tolist()
    row = pruning_row("s", bits, 50, config)
    sizes = {"weak": weak, "short": short, "rare": rare, "weak_short": weak & short}
    sizes |= {"weak_rare": weak & rare, "short_rare": short & rare, "all_three": weak & short & rare}
    assert {name: row[f"n_{name}"] for name in sizes} == {name: len(s) for name, s in sizes.items()}
    single = row["n_weak"] + row["n_short"] + row["n_rare"]
    pairs = row["n_weak_short"] + row["n_weak_rare"] + row["n_short_rare"]
    assert row["n_pruned"] == single - pairs + row["n_all_three"] == len(weak | short | rare)


@pytest.mark.parametrize("sae", ALL, ids=lambda s: s.info.architecture)
def test_a_pruned_feature_never_fires_again_and_others_fire_as_before(sae, tmp_path):
    gone = torch.zeros(sae.d_sae, dtype=torch.uint8)
    gone[::3] = torch.arange(10, dtype=torch.uint8) % 7 + 1
    save_sae(pruned(sae, gone), tmp_path / "sae")
    less = load_sae(tmp_path / "sae")
    assert less.d_sae == sae.d_sae
    assert torch.equal(less.W_dec, sae.W_dec)
    for size in (1e-3, 1.0, 1e3):
        x = size * torch.randn(200, D_MODEL, generator=torch.Generator().manual_seed(3))
        before, after = sae.encode(x), less.encode(x)
        assert (before[:, gone > 0] > 0).any()
        assert not after[:, gone > 0].any()
        if sae.activation != "topk":
            assert torch.equal(after[:, gone == 0], before[:, gone == 0])


def test_in_a_topk_sae_the_next_features_take_the_places():
    sae = ALL[0]
    gone = torch.tensor([1] * 10 + [0] * 20, dtype=torch.uint8)
    x = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(4))
    pre = sae.preactivations(x)
    pre[:, :10] = -1
    kept = pre.topk(5).indices
    expected = torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept).relu())
    torch.testing.assert_close(pruned(sae, gone).encode(x), expected)


def test_limits_of_activation_hold_at_every_scale_of_the_inputs():
    """The same SAE for inputs ten times as large prunes the same features."""
    sae = random_sae("L01.z", seed=1, d_sae=200)
    x = torch.randn(300, D_MODEL, generator=torch.Generator().manual_seed(5))
    config = PruneConfig(max_activation=5.0, decoder_norm=0.0, firing_rate=0.0)
    found = []
    for size in (1.0, 10.0):
        scaled = replace(sae, b_enc=sae.b_enc * size, b_dec=sae.b_dec * size)
        firing = Firing.empty(scaled.d_sae)
        firing.update(x * size, scaled.active(x * size))
        found.append(pruned_bits(scaled.W_dec.norm(dim=1), firing, D_MODEL, config))
    assert torch.equal(*found)
    assert 0 < int(found[0].sum()) < 200
