"""Reading and replacing activations against the Hugging Face model's own modules and plain loops."""

import numpy as np
import pytest
import torch

from atlas.configs import ModelConfig
from atlas.errors import ConfigError
from atlas.lm import hooks
from atlas.lm.hooks import Resume, capture, logits_with, write_site
from atlas.lm.load import LanguageModel, load_model
from atlas.sites import Site

from .tiny import (
    CPU,
    D_HEAD,
    D_MODEL,
    D_VOCAB,
    N_HEADS,
    N_LAYERS,
    model_folder,
    random_tokens,
    rotary_folder,
    tiny_model,
)

TOKENS = torch.from_numpy(random_tokens(3, 9))


@pytest.fixture(scope="module")
def hf():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder(), attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def raw():
    return tiny_model("raw")


@pytest.fixture(scope="module")
def folded():
    return tiny_model("folded")


@pytest.fixture(scope="module")
def inside(hf):
    """What the Hugging Face modules hold: {hook name: tensor}, from forward hooks on them alone."""
    found: dict[str, torch.Tensor] = {}
    handles = []

    def heads(x):
        return x.reshape(*x.shape[:2], N_HEADS, D_HEAD)

    def watch(layer, block):
        def qkv(module, args, out):
            for name, part in zip("qkv", out.split(D_MODEL, dim=2), strict=True):
                found[f"blocks.{layer}.attn.hook_{name}"] = heads(part)

        def z(module, args):
            found[f"blocks.{layer}.attn.hook_z"] = heads(args[0])

        def keep(name):
            def hook(module, args, out):
                found[f"blocks.{layer}.{name}"] = out[0] if isinstance(out, tuple) else out

            return hook

        def before(module, args):
            found[f"blocks.{layer}.hook_resid_pre"] = args[0]

        return [
            block.attn.c_attn.register_forward_hook(qkv),
            block.attn.c_proj.register_forward_pre_hook(z),
            block.attn.c_proj.register_forward_hook(keep("hook_attn_out")),
            block.mlp.register_forward_hook(keep("hook_mlp_out")),
            block.register_forward_pre_hook(before),
        ]

    for layer, block in enumerate(hf.transformer.h):
        handles += watch(layer, block)
    with torch.no_grad():
        out = hf(TOKENS, output_attentions=True)
    for handle in handles:
        handle.remove()
    for layer, pattern in enumerate(out.attentions):
        found[f"blocks.{layer}.attn.hook_pattern"] = pattern
    found["logits"] = out.logits
    return found


STREAM = [Site(kind, layer) for kind in ("resid_pre", "attn_out", "mlp_out") for layer in range(N_LAYERS)]
WHOLE = [Site("z", layer) for layer in range(N_LAYERS)]
HEADS = [Site(kind, layer, head) for kind in "zqkv" for layer in range(N_LAYERS) for head in range(N_HEADS)]


def expected_at(inside, site):
    hooked = inside[site.hook_name]
    if site.head is not None:
        return hooked[:, :, site.head]
    return hooked.reshape(*hooked.shape[:2], -1)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def test_every_site_holds_what_the_model_computed(raw, inside):
    sites = [*STREAM, *WHOLE, *HEADS]
    found, extra = capture(raw, TOKENS, sites, ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"])
    assert set(found) == set(sites)
    for site in sites:
        assert found[site].shape == (*TOKENS.shape, site.d_in(raw.shape))
        close(found[site], expected_at(inside, site))
    for name, pattern in extra.items():
        close(pattern, inside[name])


@pytest.mark.parametrize("site", [*STREAM, *WHOLE, HEADS[0], HEADS[-1]], ids=lambda s: s.name)
def test_stopping_early_changes_nothing(raw, site):
    alone = capture(raw, TOKENS, [site])[0][site]
    with_all = capture(raw, TOKENS, [*STREAM, *WHOLE, *HEADS])[0][site]
    assert torch.equal(alone, with_all)


def test_later_layers_are_not_run(raw):
    ran = []
    handle = raw.bridge.blocks[1].attn.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        capture(raw, TOKENS, [Site("z", 0)])
        assert not ran
        capture(raw, TOKENS, [Site("z", 1)])
        assert ran
    finally:
        handle.remove()


def test_nothing_is_computed_after_the_last_site(raw):
    """Neither the last layer's MLP nor the unembedding; and the next whole pass is whole."""
    last = raw.shape.n_layers - 1
    ran = []
    late = (raw.bridge.blocks[last].mlp, raw.bridge.unembed)
    handles = [module.register_forward_pre_hook(lambda *_: ran.append(1)) for module in late]
    try:
        capture(raw, TOKENS, [Site("z", last)], [f"blocks.{last}.attn.hook_pattern"])
        assert not ran
        logits_with(raw, TOKENS, {})
        assert len(ran) == 2
    finally:
        for handle in handles:
            handle.remove()


def test_logits_are_the_models_own(raw, folded, hf, inside):
    close(logits_with(raw, TOKENS, {}), inside["logits"], atol=2e-5)
    log_p = logits_with(folded, TOKENS, {}).log_softmax(-1)
    close(log_p, inside["logits"].log_softmax(-1), atol=5e-5)


# ---------------------------------------------------------------- folded weights


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_folding_takes_a_constant_from_values_and_nothing_from_patterns(raw, folded, hf, layer):
    """Folded z is raw z without b_V + ln1.b W_V, since the pattern's rows sum to 1."""
    block = hf.transformer.h[layer]
    W_V = block.attn.c_attn.weight[:, 2 * D_MODEL :].detach().double()
    b_V = block.attn.c_attn.bias[2 * D_MODEL :].detach().double()
    constant = b_V + block.ln_1.bias.detach().double() @ W_V
    assert constant.abs().mean() > 0.1, "the model has biases to fold"
    site, pattern = Site("z", layer), f"blocks.{layer}.attn.hook_pattern"
    z, at = capture(raw, TOKENS, [site], [pattern])
    z_folded, at_folded = capture(folded, TOKENS, [site], [pattern])
    close(at_folded[pattern], at[pattern])
    expected = constant.float().expand_as(z[site])
    close(z[site] - z_folded[site], expected)


@pytest.mark.parametrize("processing", ["raw", "folded"])
def test_heads_write_what_attn_out_holds(processing):
    """sum over heads of z_h W_O[h] + b_O = attn_out (folded: up to the mean that folding takes out)."""
    model = tiny_model(processing)
    for layer in range(N_LAYERS):
        sites = Site("z", layer), Site("attn_out", layer)
        found, _ = capture(model, TOKENS, sites)
        z = found[sites[0]].reshape(*TOKENS.shape, N_HEADS, D_HEAD)
        written = torch.zeros_like(found[sites[1]])
        for head in range(N_HEADS):
            written += z[:, :, head] @ model.W_O(layer)[head]
        rest = found[sites[1]] - written
        close(rest, rest[:1, :1].expand_as(rest), atol=2e-5)


def test_logit_directions_predict_the_logits(raw, folded, hf):
    """Without biases: final LayerNorm's scale times logits equals x W, both centred over the vocabulary."""
    for model in (raw, folded):
        W = model.logit_directions()
        assert W.shape == (D_MODEL, D_VOCAB)
        close(W.mean(0), torch.zeros(D_VOCAB), atol=1e-6)
        close(W.mean(1), torch.zeros(D_MODEL), atol=1e-6)
    close(raw.logit_directions(), folded.logit_directions(), atol=1e-5)
    ln, head = hf.transformer.ln_f, hf.lm_head.weight.detach()
    x = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0))
    centred = x - x.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + ln.eps).sqrt()
    logits = (ln(x) - ln.bias).detach() @ head.T
    expected = (logits - logits.mean(1, keepdim=True)) * scale
    close(x @ raw.logit_directions(), expected, atol=1e-5)


# ---------------------------------------------------------------- replacing


def test_write_site_replaces_one_head_alone():
    hooked = torch.randn(2, 3, N_HEADS, D_HEAD)
    before = hooked.clone()
    value = torch.randn(2, 3, D_HEAD)
    out = write_site(hooked, Site("z", 0, 1), value)
    assert torch.equal(hooked, before), "the input is left alone"
    assert torch.equal(out[:, :, 1], value)
    assert torch.equal(out[:, :, [0, 2]], before[:, :, [0, 2]])
    whole = torch.randn(2, 3, D_MODEL)
    assert torch.equal(write_site(hooked, Site("z", 0), whole).reshape(2, 3, D_MODEL), whole)
    stream = torch.randn(2, 3, D_MODEL)
    assert torch.equal(write_site(stream, Site("mlp_out", 0), whole), whole)


@pytest.mark.parametrize("site", [*STREAM, *WHOLE, *HEADS], ids=lambda s: s.name)
def test_replacing_a_site_by_itself_changes_nothing(raw, site):
    close(logits_with(raw, TOKENS, {site: lambda x: x.clone()}), logits_with(raw, TOKENS, {}))


@pytest.mark.parametrize("site", [WHOLE[1], HEADS[1], STREAM[-1], HEADS[-1]], ids=lambda s: s.name)
def test_an_edit_reaches_the_logits_and_is_gone_afterwards(raw, site):
    clean = logits_with(raw, TOKENS, {})
    assert not torch.allclose(logits_with(raw, TOKENS, {site: torch.zeros_like}), clean, atol=1e-3)
    assert torch.equal(logits_with(raw, TOKENS, {}), clean)


def hf_logits_with_z(hf, layer, change):
    """Logits when ``change`` edits the input of the layer's c_proj (z, [batch, pos, head, d_head])."""

    def edit(module, args):
        z = args[0].reshape(*args[0].shape[:2], N_HEADS, D_HEAD).clone()
        return (change(z).reshape(args[0].shape),)

    handle = hf.transformer.h[layer].attn.c_proj.register_forward_pre_hook(edit)
    try:
        with torch.no_grad():
            return hf(TOKENS).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_edits_of_heads_match_edits_of_the_models_own_modules(raw, hf, layer):
    def one(z):
        z[:, :, 1] = 2 * z[:, :, 1] + 0.5
        return z

    def two(z):
        z[:, :, 0], z[:, :, 2] = 0, 1
        return z

    close(
        logits_with(raw, TOKENS, {Site("z", layer, 1): lambda x: 2 * x + 0.5}),
        hf_logits_with_z(hf, layer, one),
        atol=5e-5,
    )
    both = {Site("z", layer, 0): torch.zeros_like, Site("z", layer, 2): torch.ones_like}
    close(logits_with(raw, TOKENS, both), hf_logits_with_z(hf, layer, two), atol=5e-5)


def test_values_are_edited_before_attention_mixes_them(raw, inside):
    """v of one head doubled doubles that head's z."""
    site, z = Site("v", 1, 2), Site("z", 1, 2)
    seen = {}

    def watch(value):
        seen["z"] = value.clone()
        return value

    logits_with(raw, TOKENS, {site: lambda v: 2 * v, z: watch})
    close(seen["z"], 2 * expected_at(inside, z))


def test_bundled_model_agrees_with_hugging_face():
    """A trained model in half precision on disk, with its own tokenizer."""
    from transformers import AutoModelForCausalLM

    from atlas.configs import ModelConfig
    from atlas.lm.files import find_model
    from atlas.lm.load import load_model

    model = load_model(ModelConfig("docs-2l"), torch.device("cpu"))
    assert isinstance(model, LanguageModel)
    hf = AutoModelForCausalLM.from_pretrained(find_model("docs-2l").path, dtype=torch.float32).eval()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(1, 4096, (1, 12)))
    with torch.no_grad():
        close(logits_with(model, tokens, {}), hf(tokens).logits, atol=1e-3)


# ---------------------------------------------------------------- resuming


def stream_at(model, layer):
    site = Site("resid_pre", layer)
    return Resume(layer, capture(model, TOKENS, [site])[0][site])


@pytest.mark.parametrize("processing", ["raw", "folded"])
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_a_resumed_pass_is_the_whole_pass_without_the_earlier_layers(processing, layer):
    model = tiny_model(processing)
    resume, whole = stream_at(model, layer), logits_with(model, TOKENS, {})
    ran = []
    handles = [
        model.bridge.blocks[i].attn.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i in range(N_LAYERS)
    ]
    try:
        resumed = logits_with(model, TOKENS, {}, resume)
        assert ran[-(N_LAYERS - layer) :] == list(range(layer, N_LAYERS))
        ran.clear()
        assert torch.equal(logits_with(model, TOKENS, {}, resume), resumed)
        assert ran == list(range(layer, N_LAYERS))
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(resumed, whole)
    assert torch.equal(logits_with(model, TOKENS, {}), whole), "later passes are whole again"


@pytest.mark.parametrize("site", [*STREAM, *WHOLE, *HEADS[::2]], ids=lambda s: s.name)
def test_an_edit_in_a_resumed_pass_is_the_same_edit(raw, site):
    edits = {site: lambda x: 0.5 * x + 0.1}
    resumed = logits_with(raw, TOKENS, edits, stream_at(raw, site.layer))
    assert torch.equal(resumed, logits_with(raw, TOKENS, edits))
    assert not torch.allclose(resumed, logits_with(raw, TOKENS, {}), atol=1e-3)


def test_an_edit_before_the_resumed_layer_is_refused(raw):
    with pytest.raises(ConfigError, match=r"L00\.z.*layer 1"):
        logits_with(raw, TOKENS, {Site("z", 0): torch.zeros_like}, stream_at(raw, 1))


def test_blocks_run_again_after_an_error_in_a_resumed_pass(raw):
    whole, resume = logits_with(raw, TOKENS, {}), stream_at(raw, 1)

    def fail(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        logits_with(raw, TOKENS, {Site("z", 1): fail}, resume)
    assert torch.equal(logits_with(raw, TOKENS, {}), whole)


def test_a_model_that_cannot_resume_gets_the_whole_pass(raw, monkeypatch):
    whole, resume = logits_with(raw, TOKENS, {}), stream_at(raw, 1)

    def refuse(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(type(raw.bridge), "_setup_start_at_layer", refuse)
    hooks._can_resume.cache_clear()
    try:
        assert torch.equal(logits_with(raw, TOKENS, {}, resume), whole)
    finally:
        hooks._can_resume.cache_clear()


@pytest.fixture(scope="module")
def rotary():
    """A tiny random GPT-NeoX: rotary positions, attention and MLP in parallel."""
    return load_model(ModelConfig(str(rotary_folder())), CPU)


def test_positions_are_right_in_a_resumed_pass_of_a_rotary_model(rotary):
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(rotary_folder(), attn_implementation="eager").eval()
    with torch.no_grad():
        close(logits_with(rotary, TOKENS, {}), hf(TOKENS).logits, atol=1e-4)
    resume = stream_at(rotary, 1)
    assert hooks._can_resume(rotary)
    assert torch.equal(logits_with(rotary, TOKENS, {}, resume), logits_with(rotary, TOKENS, {}))
    edits = {Site("q", 1, 1): lambda x: -x}
    assert torch.equal(logits_with(rotary, TOKENS, edits, resume), logits_with(rotary, TOKENS, edits))
