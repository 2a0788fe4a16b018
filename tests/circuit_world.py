"""A three-layer random GPT-2 with all biases, and words and prompts for IOI that its tokenizer knows."""

import tempfile
from functools import cache
from pathlib import Path

import torch

from atlas.circuits.ioi_prompts import Words, draw_prompts, tokenised
from atlas.circuits.ioi_runs import Runs
from atlas.configs import ModelConfig
from atlas.lm.load import load_model
from tests import tiny
from tests.tiny import CPU, D_MODEL, D_VOCAB, N_HEADS, random_sae

WORDS = Words(tuple(f"w{i}" for i in range(1, 12)), ("w20", "w21"), ("w22", "w23"), substitute=False)


@cache
def folder(n_layers: int = 3) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=D_VOCAB, n_positions=48, n_embd=D_MODEL, n_layer=n_layers, n_head=N_HEADS, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    noise = torch.Generator().manual_seed(3)
    path = Path(tempfile.mkdtemp(prefix="atlas-circuits-")) / "toy"
    return tiny._save_random(GPT2LMHeadModel(config), path, noise)


@cache
def model(processing: str = "raw"):
    return load_model(ModelConfig(str(folder()), processing), CPU)


@cache
def runs(n: int = 8, processing: str = "raw") -> Runs:
    return Runs(model(processing), tokenised(model(processing), draw_prompts(WORDS, n, seed=1)))


@cache
def saes(processing: str = "raw"):
    """A z SAE of each layer, and one on the stream before each."""
    more = {"processing": processing}
    z = {n: random_sae(f"L0{n}.z", seed=n + 1, **more) for n in range(3)}
    return z, {n: random_sae(f"L0{n}.resid_pre", seed=n + 7, k=6, **more) for n in range(3)}
