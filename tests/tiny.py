"""A tiny random GPT-2 on disk, a tiny token store and random SAEs: small enough for loops in plain Python.

Unlike a freshly initialised model, every bias is nonzero and every LayerNorm weight differs from 1, so
that a forgotten bias or an unfolded weight shows.
"""

import atexit
import json
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from atlas.configs import ModelConfig
from atlas.lm.load import LanguageModel, load_model
from atlas.sae.model import SAE, SAEInfo
from atlas.sites import Site

N_LAYERS, N_HEADS, D_MODEL, N_CTX = 2, 3, 12, 24
D_HEAD = D_MODEL // N_HEADS
WORDS = ("<bos>", *(f"w{i}" for i in range(46)))
D_VOCAB = len(WORDS)
CPU = torch.device("cpu")
EXTRA_TENSORS = {
    "relu": (),
    "topk": (),
    "jumprelu": ("threshold",),
    "batchtopk": ("threshold",),
    "matryoshka": ("threshold",),
    "gated": ("b_gate", "r_mag"),
}
"""The tensors that each architecture has beside W_enc, b_enc, W_dec and b_dec."""


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words with a BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<bos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<bos>", unk_token="<bos>", pad_token="<bos>"
    )
    fast.save_pretrained(folder)


def save_model(folder: Path, seed: int = 0) -> Path:
    """Write the model as a Hugging Face folder and return it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=D_VOCAB,
        n_positions=N_CTX,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    noise = torch.Generator().manual_seed(seed)
    return _save_random(model, folder, noise)


def save_rotary_model(folder: Path) -> Path:
    """A GPT-NeoX of the same sizes: rotary positions, attention and MLP in parallel."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=D_VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        intermediate_size=4 * D_MODEL,
        max_position_embeddings=N_CTX,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save_random(GPTNeoXForCausalLM(config), folder, torch.Generator().manual_seed(1))


def _save_random(model, folder: Path, noise: torch.Generator) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = torch.randn(parameter.shape, generator=noise)
            is_scale = (".ln_" in name or "layer_norm" in name) and name.endswith("weight")
            parameter.copy_(1 + 0.3 * random if is_scale else 0.35 * random)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def random_tokens(blocks: int, context: int = 10, seed: int = 0) -> np.ndarray:
    """Token ids [blocks, context]; BOS at position 0 and nowhere else."""
    tokens = np.random.default_rng(seed).integers(1, D_VOCAB, (blocks, context))
    tokens[:, 0] = 0
    return tokens


def save_store(folder: Path, tokens: np.ndarray) -> Path:
    """Write the blocks as a token store, in this order, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens.astype(np.uint16).tofile(folder / "tokens.bin")
    meta = {
        "corpus": "tiny",
        "context": tokens.shape[1],
        "n_blocks": len(tokens),
        "bos": 0,
        "dtype": "uint16",
        "documents": 1,
        "characters": 100,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "sources.json").write_text(json.dumps({"names": ["d"], "block_document": [0] * len(tokens)}))
    return folder


def random_sae(
    site: str = "L01.z",
    d_in: int = D_MODEL,
    d_sae: int = 20,
    k: int | None = None,
    seed: int = 0,
    processing: str = "raw",
    scale: float = 1.0,
    architecture: str | None = None,
    **known: object,
) -> SAE:
    """An SAE with random weights and nonzero biases; TopK where k is given, else ReLU, or as asked.

    Further keywords are fields of SAEInfo, such as normalize_activations.
    """
    g = torch.Generator().manual_seed(seed)
    architecture = architecture or ("relu" if k is None else "topk")
    info = SAEInfo(
        name=f"tiny/{site}.{architecture}-{d_sae}",
        model="tiny",
        processing=processing,
        site=Site.parse(site),
        architecture=architecture,
        k=k,
        l1_coefficient=1.0 if k is None else None,
        tokens_trained=0,
        corpus="tiny",
        context=10,
        seed=seed,
        origin="trained",
        code_version="0",
    )
    shapes = ((d_in, d_sae), (d_sae,), (d_sae, d_in), (d_in,))
    tensors = [scale * 0.4 * torch.randn(shape, generator=g) for shape in shapes]
    more = {name: scale * 0.4 * torch.randn(d_sae, generator=g) for name in EXTRA_TENSORS[architecture]}
    if "threshold" in more:
        more["threshold"] = more["threshold"].abs()
    return SAE(replace(info, **known), *tensors, **more)


@cache
def model_folder() -> Path:
    """The tiny model, written once per test run; tests that damage a model copy it first."""
    root = Path(tempfile.mkdtemp(prefix="atlas-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return save_model(root / "tiny")


@cache
def rotary_folder() -> Path:
    """The rotary model, written once per test run."""
    return save_rotary_model(model_folder().parent / "rotary")


@cache
def tiny_model(processing: str = "raw") -> LanguageModel:
    """The tiny model, loaded once per test run and processing."""
    return load_model(ModelConfig(str(model_folder()), processing), CPU)
