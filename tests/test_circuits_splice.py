"""Splicing: the identity to the last bit, edits against loops, gradients against differences."""

import pytest
import torch

from atlas.circuits.edits import ablate, drop_error, mask_of, patch, scale, set_to
from atlas.circuits.splice import Splice, feature_acts, run_spliced
from atlas.errors import ConfigError, SAEError
from atlas.lm.hooks import capture, logits_with
from tests.tiny import CPU, EXTRA_TENSORS, random_sae, random_tokens, tiny_model

TOKENS = torch.from_numpy(random_tokens(3, 9))
SITES = ("L00.z", "L00.H01.q", "L00.attn_out", "L00.mlp_out", "L01.resid_pre", "L01.z", "L01.H02.v")


def d_in(site):
    return 4 if ".H" in site else 12


def plain(model, tokens=TOKENS):
    return logits_with(model, tokens, {})


@pytest.mark.parametrize("processing", ["raw", "folded"])
@pytest.mark.parametrize("gradients", [False, True])
def test_identity_with_error_term_changes_no_bit(processing, gradients):
    model = tiny_model(processing)
    saes = [random_sae(s, d_in(s), seed=n, processing=processing) for n, s in enumerate(SITES)]
    with Splice(model, saes, gradients=gradients) as splice:
        assert torch.equal(splice.logits(TOKENS), plain(model))
    assert torch.equal(plain(model), logits_with(model, TOKENS, {})), "no hook is left behind"
    assert all(splice.acts[sae.info.name].abs().sum() > 0 for sae in saes)


@pytest.mark.parametrize("architecture", list(EXTRA_TENSORS))
@pytest.mark.parametrize("how", ["none", "constant_norm_rescale", "layer_norm"])
def test_without_error_the_model_goes_on_with_the_reconstruction(architecture, how):
    model = tiny_model()
    k = 5 if architecture == "topk" else None
    sae = random_sae("L01.z", k=k, architecture=architecture, normalize_activations=how)
    found, splice = run_spliced(model, TOKENS, [sae], error=False)
    expected = logits_with(model, TOKENS, {sae.info.site: sae.reconstruct})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    x = capture(model, TOKENS, [sae.info.site])[0][sae.info.site]
    assert torch.equal(splice.acts[sae.info.name].reshape(-1, sae.d_sae), sae.encode(x.reshape(-1, 12)))


def by_hand(model, sae, change, at, error=True, no_error=()):
    """The logits after a change of single numbers of single tokens, in plain loops."""

    def edit(x):
        out = x.clone()
        for b in range(x.shape[0]):
            for p in range(x.shape[1]):
                row = x[b, p][None]
                acts, left = sae.encode(row)[0].clone(), row[0] - sae.reconstruct(row)[0]
                if (b, p) in at:
                    change(acts, b, p)
                if (b, p) in no_error or not error:
                    left = torch.zeros_like(left)
                out[b, p] = sae.decode(acts[None], sae.scale(row))[0] + left
        return out

    return logits_with(model, TOKENS, {sae.info.site: edit})


OTHER = torch.from_numpy(random_tokens(3, 9, seed=5))
EVERYWHERE = {(b, p) for b in range(3) for p in range(9)}


def test_edits_against_loops():
    model, sae = tiny_model(), random_sae("L00.z", seed=4, normalize_activations="layer_norm")
    name = sae.info.name
    acts = feature_acts(model, TOKENS, sae)
    feature = int((acts > 0).float().sum((0, 1)).argmax())
    other = feature_acts(model, OTHER, sae)

    def zero(a, b, p):
        a[feature] = 0

    def thrice(a, b, p):
        a[feature] *= 3

    def seven(a, b, p):
        a[[0, feature]] = 7.0

    def from_other(a, b, p):
        a[:] = other[b, p]

    def all_zero(a, b, p):
        a[:] = 0

    cases = [
        ([ablate(name, feature)], zero, EVERYWHERE, set()),
        ([ablate(name, feature, 4)], zero, {(b, 4) for b in range(3)}, set()),
        ([scale(name, feature, 3.0, torch.tensor([1, 2, 3]))], thrice, {(0, 1), (1, 2), (2, 3)}, set()),
        ([set_to(name, [0, feature], 7.0, torch.tensor([[1, 2], [2, 3], [8, 8]]))], seven,
         {(0, 1), (0, 2), (1, 2), (1, 3), (2, 8)}, set()),
        ([patch(name, other, where=[2, 5])], from_other, {(b, p) for b in range(3) for p in (2, 5)}, set()),
        ([ablate(name), drop_error(name, 3)], all_zero, EVERYWHERE, {(b, 3) for b in range(3)}),
    ]  # fmt: skip
    for edits, change, at, no_error in cases:
        found, splice = run_spliced(model, TOKENS, [sae], edits)
        expected = by_hand(model, sae, change, at, no_error=no_error)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (found - plain(model)).abs().max() > 1e-3, "the edit does something"
    assert splice.acts[name].abs().sum() == 0


def test_one_feature_patched_leaves_the_others():
    model, sae = tiny_model(), random_sae("L00.z", seed=4)
    other = feature_acts(model, OTHER, sae)
    _, splice = run_spliced(model, TOKENS, [sae], [patch(sae.info.name, other[:1], 3, where=2)])
    before, after = feature_acts(model, TOKENS, sae), splice.acts[sae.info.name]
    assert torch.equal(after[:, 2, 3], other[:1, 2, 3].expand(3))
    after = after.clone()
    after[:, 2, 3] = before[:, 2, 3]
    assert torch.equal(after, before)


def test_later_saes_see_what_earlier_ones_left():
    model = tiny_model()
    first, second = random_sae("L00.z"), random_sae("L01.z", seed=1)
    _, splice = run_spliced(model, TOKENS, [second, first], error=False)
    seen = {}

    def keep(x):
        seen["x"] = x
        return x

    logits_with(model, TOKENS, {first.info.site: first.reconstruct, second.info.site: keep})
    torch.testing.assert_close(splice.x[second.info.name], seen["x"])


@pytest.mark.parametrize("normalise", ["none", "constant_norm_rescale"])
def test_gradients_against_differences(normalise):
    """Of a feature, an error term, and what an earlier feature does through a later SAE."""
    model = tiny_model()
    first = random_sae("L00.z", seed=4, normalize_activations=normalise)
    later = random_sae("L01.resid_pre", seed=6)
    tokens = TOKENS[:1]

    def logit(edits):
        return run_spliced(model, tokens, [first, later], edits)[0][0, -1, 5].double().item()

    with Splice(model, [first, later], gradients=True) as splice:
        splice.logits(tokens)[0, -1, 5].backward()
    for sae in (first, later):
        name = sae.info.name
        acts, step = splice.acts[name][0].detach(), 2e-2
        p, f = divmod(int(splice.acts[name].grad[0].abs().argmax()), sae.d_sae)
        up, down = (logit([set_to(name, f, float(acts[p, f]) + s, p)]) for s in (step, -step))
        assert splice.acts[name].grad[0, p, f].item() == pytest.approx((up - down) / (2 * step), rel=0.02)
    site, at = later.info.site, splice.errors[later.info.name].grad
    p, d = divmod(int(at[0].abs().argmax()), 12)

    def nudged(size):
        def edit(x):
            x = x.clone()
            x[0, p, d] += size
            return x

        return logits_with(model, tokens, {site: edit})[0, -1, 5].double().item()

    assert at[0, p, d].item() == pytest.approx((nudged(2e-2) - nudged(-2e-2)) / 4e-2, rel=0.02)


def test_gradients_without_the_error_term_pass_through_the_encoder():
    model = tiny_model()
    first, later = random_sae("L00.z", seed=4), random_sae("L01.resid_pre", seed=6)
    with Splice(model, [first, later], error=False, gradients=True) as splice:
        splice.logits(TOKENS[:1])[0, -1, 5].backward()
    name = first.info.name
    acts, step = splice.acts[name][0].detach(), 5e-3
    p, f = divmod(int(splice.acts[name].grad[0].abs().argmax()), first.d_sae)
    up, down = (
        run_spliced(model, TOKENS[:1], [first, later], [set_to(name, f, float(acts[p, f]) + s, p)], False)[0]
        for s in (step, -step)
    )
    difference = (up - down)[0, -1, 5].item() / (2 * step)
    assert splice.acts[name].grad[0, p, f].item() == pytest.approx(difference, rel=0.05)


def test_what_is_not_allowed_is_named():
    model, sae = tiny_model(), random_sae("L00.z")
    name = sae.info.name
    with pytest.raises(ConfigError, match=r"two SAEs .* L00\.z"):
        Splice(model, [sae, random_sae("L00.z", seed=2)])
    with pytest.raises(SAEError, match=r"feature 20 does not exist.* 0 to 19"):
        Splice(model, [sae], [ablate(name, 20)])
    with pytest.raises(SAEError, match="'other' is not known"):
        Splice(model, [sae], [ablate("other", 2)])
    with pytest.raises(SAEError, match="7 features"):
        Splice(model, [sae], [patch(name, torch.zeros(1, 9, 7))])
    with pytest.raises(SAEError, match="raw weights"):
        Splice(tiny_model("folded"), [sae])
    with pytest.raises(SAEError, match="reads 8 numbers"):
        Splice(model, [random_sae("L00.z", d_in=8)])
    with pytest.raises(ConfigError, match="without its error term"):
        Splice(model, [sae], [drop_error(name)], error=False)
    with pytest.raises(ConfigError, match="position 9 does not exist"):
        run_spliced(model, TOKENS, [sae], [ablate(name, 1, 9)])
    with pytest.raises(ConfigError, match="mask of shape"):
        mask_of(torch.zeros(2, 2, dtype=torch.bool), 3, 2, CPU)
    assert torch.equal(plain(model), logits_with(model, TOKENS, {})), "a failed pass leaves no hook"
