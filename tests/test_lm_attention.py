"""One layer's attention from the residual stream before it: a plain loop, and a whole pass bit for bit."""

import pytest
import torch

from atlas.configs import ModelConfig
from atlas.lm.attention import QKV, attend, project, replays
from atlas.lm.hooks import capture
from atlas.lm.load import load_model
from atlas.sites import Site

from .tiny import CPU, N_CTX, N_LAYERS, model_folder, random_tokens, rotary_folder, tiny_model

TOKENS = torch.from_numpy(random_tokens(5, N_CTX))


def test_attention_against_a_loop():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 6, 3, 5, generator=g) for _ in range(3))
    pattern, z = attend(QKV(q, k, v))
    assert pattern.shape == (2, 3, 6, 6)
    assert z.shape == (2, 6, 3, 5)
    for b in range(2):
        for h in range(3):
            for i in range(6):
                scores = [(q[b, i, h].double() @ k[b, j, h].double()).item() / 5**0.5 for j in range(i + 1)]
                expected = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
                assert torch.allclose(pattern[b, h, i, : i + 1].double(), expected, atol=1e-6)
                assert not pattern[b, h, i, i + 1 :].any()
                mean = expected @ v[b, : i + 1, h].double()
                assert torch.allclose(z[b, i, h].double(), mean, atol=1e-6)


@pytest.mark.parametrize("processing", ["raw", "folded"])
@pytest.mark.parametrize("some", [slice(0, 5), slice(3, 5)])
def test_every_bit_of_a_whole_pass(processing, some):
    model, layers = tiny_model(processing), range(N_LAYERS)
    hooks = [f"blocks.{layer}.attn.hook_{what}" for layer in layers for what in "qkv"]
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
    sites = [Site(kind, layer) for layer in layers for kind in ("resid_pre", "z")]
    x, raw = capture(model, TOKENS, sites, hooks + patterns)
    assert replays(model, 5, N_CTX)
    for layer in layers:
        heads = project(model, layer, x[Site("resid_pre", layer)])
        for what, part in zip("qkv", heads, strict=True):
            assert torch.equal(part, raw[f"blocks.{layer}.attn.hook_{what}"]), what
        pattern, z = attend(heads.at(some))
        assert torch.equal(pattern, raw[patterns[layer]][some])
        assert torch.equal(z.flatten(2), x[Site("z", layer)][some])
        pattern, z = attend(heads.at(some, [2]))
        assert torch.equal(pattern, raw[patterns[layer]][some][:, [2]])


def test_a_model_that_rotates_its_queries_is_not_replayed():
    assert not replays(load_model(ModelConfig(str(rotary_folder())), CPU), 2, N_CTX)


def test_a_model_that_scales_its_scores_otherwise_is_not_replayed(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from .tiny import save_tokenizer

    config = GPT2Config.from_pretrained(model_folder(), scale_attn_by_inverse_layer_idx=True)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert not replays(load_model(ModelConfig(str(tmp_path)), CPU), 2, N_CTX)
