"""First-order loss effects: gradients against finite differences, effects against exact ablation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.analysis.effects import LossEffects, first_order_effects
from atlas.analysis.text import ArrayBlocks
from atlas.configs import ModelConfig
from atlas.lm.hooks import gradients, logits_with
from atlas.lm.load import LanguageModel, load_model
from atlas.progress import NullProgress
from atlas.sae.model import SAE
from atlas.sites import Site

from .tiny import CPU, D_HEAD, random_sae, random_tokens, save_model, tiny_model

TOKENS = random_tokens(3, 9)
SITES = [
    Site("resid_pre", 0),
    Site("resid_pre", 1),
    Site("attn_out", 0),
    Site("mlp_out", 1),
    Site("z", 0),
    Site("z", 1),
    *(Site(kind, layer, head) for kind in "zqkv" for layer, head in ((0, 1), (1, 2))),
]


@pytest.fixture(scope="module", params=["raw", "folded"])
def exact(request, tmp_path_factory) -> LanguageModel:
    """The tiny model in float64."""
    folder: Path = save_model(tmp_path_factory.mktemp("float64") / "tiny")
    model = load_model(ModelConfig(str(folder), request.param), CPU)
    model.bridge.double()
    return model


def loss_of(model, tokens, edits) -> float:
    """The summed next-token cross-entropy, one token after the other."""
    log_p = logits_with(model, tokens, edits).double().log_softmax(-1)
    blocks, context = tokens.shape
    return -sum(log_p[b, t, tokens[b, t + 1]].item() for b in range(blocks) for t in range(context - 1))


@pytest.mark.parametrize("site", SITES, ids=lambda s: s.name)
def test_gradients_are_the_slopes_of_the_loss(exact, site):
    """Asked for together, as the sites of several SAEs are, each against a central difference of its own."""
    tokens = torch.from_numpy(TOKENS)
    x, gradient = gradients(exact, tokens, SITES)[site]
    assert x.shape == gradient.shape == (*TOKENS.shape, site.d_in(exact.shape))
    assert not x.requires_grad
    step = 1e-5
    for seed in range(2):
        along = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double()
        after, before = (
            loss_of(exact, tokens, {site: lambda v, move=sign * step * along: v + move}) for sign in (1, -1)
        )
        slope = (after - before) / (2 * step)
        assert abs(slope) > 1e-4
        assert (gradient * along).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_gradients_of_a_block_do_not_depend_on_its_neighbours():
    model, tokens = tiny_model(), torch.from_numpy(TOKENS)
    together = gradients(model, tokens, SITES)
    for block in range(len(tokens)):
        alone = gradients(model, tokens[block : block + 1], SITES)
        for site in SITES:
            torch.testing.assert_close(together[site][1][block], alone[site][1][0], rtol=1e-4, atol=1e-5)


def test_gradients_leave_the_model_as_it_was():
    model, tokens = tiny_model(), torch.from_numpy(TOKENS)
    before = logits_with(model, tokens, {})
    gradients(model, tokens, SITES)
    after = logits_with(model, tokens, {})
    assert torch.equal(before, after)
    assert not after.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in model.bridge.parameters())


# ---------------------------------------------------------------- effects


def ablated_losses(model: LanguageModel, sae: SAE, tokens: torch.Tensor) -> dict[int, list[float]]:
    """The rise of a block's loss when a feature is taken out of one token, for each firing, by feature."""
    site = sae.info.site
    rises: dict[int, list[float]] = {}
    for block in tokens.split(1):
        x = gradients(model, block, [site])[site][0][0].float()
        back = torch.ones(len(x), 1) if sae.scale(x) is None else sae.scale(x).back
        clean = loss_of(model, block, {})
        for position, feature, value in zip(*sae.active(x), strict=True):
            if position == 0:
                continue
            out = value * back[position] * sae.decoder_directions[feature]

            def edit(found, position=position, out=out):
                found = found.clone()
                found[0, position] -= out
                return found

            rises.setdefault(int(feature), []).append(loss_of(model, block, {site: edit}) - clean)
    return rises


SAES = {
    "whole z, TopK": {"site": "L01.z", "k": 4},
    "resid_pre, ReLU": {"site": "L00.resid_pre"},
    "one head's v": {"site": "L00.H02.v", "d_in": D_HEAD, "k": 3},
    "one head's q, gated": {"site": "L01.H00.q", "d_in": D_HEAD, "architecture": "gated"},
    "normalised by LayerNorm": {"site": "L00.attn_out", "k": 3, "normalize_activations": "layer_norm"},
    "normalised by norm": {"site": "L00.z", "k": 3, "normalize_activations": "constant_norm_rescale"},
    "rescaled by decoder norm": {"site": "L01.resid_pre", "k": 3, "rescale_acts_by_decoder_norm": True},
}


def small_sae(**how) -> SAE:
    """An SAE whose features write so little that first order holds: pre-activations as ever, small rows."""
    sae = random_sae(d_sae=10, **how)
    if not sae.info.rescale_acts_by_decoder_norm:
        return sae.with_tensors({"W_dec": 1e-3 * sae.W_dec})
    return sae.with_tensors({"W_enc": 1e-3 * sae.W_enc, "b_enc": 1e-3 * sae.b_enc})


@pytest.mark.parametrize("how", SAES.values(), ids=SAES.keys())
def test_effects_are_those_of_ablating_small_features(exact, how):
    sae = small_sae(**how)
    work = LossEffects(exact, [sae], ArrayBlocks(TOKENS))
    work.run(range(len(TOKENS)), NullProgress())
    (found,) = work.finish()
    rises = ablated_losses(exact, sae, torch.from_numpy(TOKENS))
    assert len(rises) > 3
    assert found["n_loss"].tolist() == [len(rises.get(f, [])) for f in range(sae.d_sae)]
    size = max(np.mean(np.abs(r)) for r in rises.values())
    for f in range(sae.d_sae):
        expected = np.mean(rises[f]) if f in rises else np.nan
        assert found["loss_effect"][f] == pytest.approx(expected, rel=2e-2, abs=5e-3 * size, nan_ok=True), f


def test_the_effect_is_minus_activation_times_slope():
    """By hand: feature 0 fires with 2 and 1, its row is (3, 0); feature 1 never fires."""
    sae = random_sae(d_in=2, d_sae=2, architecture="relu").with_tensors(
        {
            "W_enc": torch.eye(2),
            "b_enc": torch.tensor([0.0, -9.0]),
            "W_dec": torch.tensor([[3.0, 0.0], [0.0, 1.0]]),
            "b_dec": torch.zeros(2),
        }
    )
    x = torch.tensor([[2.0, 1.0], [-1.0, 1.0], [1.0, 0.0]])
    gradient = torch.tensor([[0.5, 7.0], [100.0, 7.0], [-2.0, 7.0]])
    n, total = first_order_effects(sae, x, gradient)
    assert n.tolist() == [2, 0]
    assert total.tolist() == [-(2 * 3 * 0.5) + 1 * 3 * 2.0, 0]


def test_nothing_fires():
    sae = random_sae(architecture="relu").with_tensors({"b_enc": torch.full((20,), -1e3)})
    work = LossEffects(tiny_model(), [sae], ArrayBlocks(TOKENS))
    work.run(range(2), NullProgress())
    (found,) = work.finish()
    assert np.isnan(found["loss_effect"]).all()
    assert found["n_loss"].tolist() == [0] * 20


@pytest.fixture(scope="module")
def units() -> list[LossEffects]:
    """Every block of a text on its own, for two SAEs at one site and one at a head of it."""
    saes = [random_sae(k=4), random_sae(d_sae=7), random_sae("L01.H01.z", d_in=D_HEAD, k=2)]
    parts = []
    for block in range(5):
        parts.append(LossEffects(tiny_model(), saes, ArrayBlocks(random_tokens(5, 9, seed=7))))
        parts[-1].update(range(block, block + 1))
    return parts


def test_batches_change_nothing(units, monkeypatch):
    together = LossEffects(units[0].model, units[0].saes, units[0].store)
    seen = []

    class Watch:
        def update(self, done, total, message=""):
            seen.append((done, total))

    monkeypatch.setattr("atlas.analysis.effects.BATCH_BLOCKS", 2)
    together.run(range(5), Watch())
    assert seen == [(2, 5), (4, 5), (5, 5)]
    same(together, merged(units), rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(5)), st.integers(1, 4))
def test_parts_merge_in_any_order_and_grouping(units, order, cut):
    """Sums of float64, so the order shows in the last bits alone."""
    first, rest = ([units[i] for i in part] for part in (order[:cut], order[cut:]))
    same(merged([merged(first), merged(rest)]), merged(units), rtol=1e-12, atol=1e-12)


def merged(parts):
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    return whole


def same(a: LossEffects, b: LossEffects, rtol: float, atol: float) -> None:
    for one, other in zip(a.finish(), b.finish(), strict=True):
        assert one["n_loss"].tolist() == other["n_loss"].tolist()
        assert one["n_loss"].any()
        np.testing.assert_allclose(one["loss_effect"], other["loss_effect"], rtol=rtol, atol=atol)
