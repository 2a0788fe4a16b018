"""A forward pass from layer to layer: every bit of a hooked pass, or the hooked pass itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.configs import ModelConfig
from atlas.lm import layers
from atlas.lm.hooks import capture
from atlas.lm.layers import agrees, read_sites
from atlas.lm.load import load_model
from atlas.lm.runtime import lanes
from atlas.sites import HEAD_KINDS, STREAM_KINDS, Site

from .tiny import CPU, N_CTX, N_HEADS, N_LAYERS, model_folder, random_tokens, rotary_folder, tiny_model

ALL = [Site(kind, layer) for layer in range(N_LAYERS) for kind in ("z", *STREAM_KINDS)]
ALL += [
    Site(kind, layer, head) for layer in range(N_LAYERS) for kind in HEAD_KINDS for head in range(N_HEADS)
]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(ALL), min_size=1, max_size=6, unique=True),
    st.integers(1, 11), st.integers(1, N_CTX), st.sampled_from(["raw", "folded"]), st.booleans(),
)  # fmt: skip
def test_every_bit_of_a_hooked_pass(sites, blocks, context, processing, with_pool):
    model = tiny_model(processing)
    tokens = torch.from_numpy(random_tokens(blocks, context, seed=blocks))
    if with_pool:
        with lanes() as pool:
            found = read_sites(model, tokens, sites, pool)
    else:
        found = read_sites(model, tokens, sites)
    whole, _ = capture(model, tokens, sites)
    assert found.keys() == whole.keys()
    for site in sites:
        assert torch.equal(found[site], whole[site]), site.name


@pytest.mark.parametrize("processing", ["raw", "folded"])
def test_batches_of_the_usual_shape_need_no_hooks(processing, monkeypatch):
    model, site = tiny_model(processing), Site("z", 1)
    tokens = torch.from_numpy(random_tokens(16, N_CTX))
    assert agrees(model, 16, N_CTX)
    whole = capture(model, tokens, [site])[0][site]
    monkeypatch.setattr(layers, "capture", None)
    assert torch.equal(read_sites(model, tokens, [site])[site], whole)


def test_no_gradient_is_kept():
    found = read_sites(tiny_model(), torch.from_numpy(random_tokens(3, N_CTX)), [Site("mlp_out", 1)])
    assert not found[Site("mlp_out", 1)].requires_grad


@pytest.mark.parametrize("change", ["rotary", "scaled"])
def test_a_model_of_another_make_is_read_by_hooks(change, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from .tiny import save_tokenizer

    folder = rotary_folder()
    if change == "scaled":
        config = GPT2Config.from_pretrained(model_folder(), scale_attn_by_inverse_layer_idx=True)
        folder = tmp_path
        GPT2LMHeadModel(config).save_pretrained(folder)
        save_tokenizer(folder)
    model = load_model(ModelConfig(str(folder)), CPU)
    tokens, sites = torch.from_numpy(random_tokens(3, N_CTX)), [Site("z", 0), Site("resid_pre", 1)]
    assert not agrees(model, 3, N_CTX)
    found, whole = read_sites(model, tokens, sites), capture(model, tokens, sites)[0]
    for site in sites:
        assert torch.equal(found[site], whole[site])


def test_an_operation_that_differs_in_one_bit_is_noticed(monkeypatch):
    attend = layers.attend

    def off(heads):
        pattern, z = attend(heads)
        return pattern, z * (1 + 2**-22)

    monkeypatch.setattr(layers, "attend", off)
    agrees.cache_clear()
    assert not agrees(tiny_model(), 3, N_CTX)
    agrees.cache_clear()
