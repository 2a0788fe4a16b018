"""One forward pass over a prompt, kept whole in float64, and the weights that read parts of it."""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.corpus.tokens import bos_id, load_tokenizer, visible
from atlas.errors import ConfigError, ModelError
from atlas.lm.load import LanguageModel

_PER_LAYER = {
    "resid_pre": "hook_resid_pre", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z", "v": "attn.hook_v", "pattern": "attn.hook_pattern", "ln_scale": "ln1.hook_scale",
}  # fmt: skip
NORMS = ("LN", "LNPre", "RMS", "RMSPre")


@dataclass(frozen=True)
class Pass:
    """What one prompt made of every layer; lists are by layer, numbers are float64."""

    tokens: Int[Tensor, " pos"]
    embed: Float[Tensor, "pos d_model"]
    pos_embed: Float[Tensor, "pos d_model"] | None
    resid_pre: list[Float[Tensor, "pos d_model"]]
    attn_out: list[Float[Tensor, "pos d_model"]]
    mlp_out: list[Float[Tensor, "pos d_model"]]
    z: list[Float[Tensor, "pos heads_d_head"]]
    v: list[Float[Tensor, "pos heads d_head"]]
    pattern: list[Float[Tensor, "heads query key"]]
    ln_scale: list[Float[Tensor, "pos 1"]]


@torch.no_grad()
def run_pass(model: LanguageModel, tokens: Int[Tensor, " pos"]) -> Pass:
    """Run the model over one prompt and keep what circuits are traced through."""
    layers = range(model.shape.n_layers)
    names = [f"blocks.{n}.{hook}" for n in layers for hook in _PER_LAYER.values()]
    has_pos = model.W_pos() is not None
    streams = ["hook_embed", *(["hook_pos_embed"] if has_pos else [])]
    raw: dict[str, Tensor] = {}

    def keep_as(name: str) -> Any:
        def keep(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - the hook protocol passes both
            raw[name] = value
            return value

        return keep

    batch = tokens.to(model.device)[None]
    hooks = [(name, keep_as(name)) for name in [*streams, *names]]
    model.bridge.run_with_hooks(batch, return_type=None, fwd_hooks=hooks)
    parts = {
        part: [raw[f"blocks.{n}.{hook}"][0].double() for n in layers] for part, hook in _PER_LAYER.items()
    }
    parts["z"] = [z.flatten(1) for z in parts["z"]]
    parts["v"] = [_every_head(v, model.shape.n_heads, 1) for v in parts["v"]]
    pos = raw["hook_pos_embed"].double().reshape(-1, model.shape.d_model)[-len(tokens) :] if has_pos else None
    return Pass(tokens.to(model.device), raw["hook_embed"][0].double(), pos, **parts)


def _every_head(values: Tensor, n_heads: int, dim: int) -> Tensor:
    """Values of shared key-value heads, once for every head that reads them."""
    return values.repeat_interleave(n_heads // values.shape[dim], dim)


@dataclass(frozen=True)
class Reads:
    """How a layer's values come from the residual stream: v = norm(x) W_V + b_V; norm(x) as in ``Norm``."""

    W_V: Float[Tensor, "heads d_model d_head"]
    b_V: Float[Tensor, "heads d_head"]  # noqa: N815 - the field's name
    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    """A LayerNorm takes the mean out of its input; an RMSNorm does not."""

    def back(
        self, direction: Float[Tensor, "*n d_model"], scale: Float[Tensor, "*scales 1"]
    ) -> Float[Tensor, "*n d_model"]:
        """g with norm(x) . direction = x . g + bias . direction, the norm's scale held fixed.

        norm(x) = (x - mean(x)) / scale * weight + bias, so g = (w - mean(w)) / scale, w = weight * direction.
        """
        w = self.weight * direction
        return (w - w.mean(-1, keepdim=True) if self.centred else w) / scale


@lru_cache(maxsize=64)
def reads_of(model: LanguageModel, layer: int) -> Reads:
    """A layer's value weights and the norm before its attention; ModelError for a norm of another kind."""
    kind = str(model.bridge.cfg.normalization_type)
    if kind not in NORMS:
        raise ModelError(
            f"normalisation {kind!r} of {model.name!r} is not known; allowed: {', '.join(NORMS)}"
        )
    block, shape = model.bridge.blocks[layer], model.shape
    W_V = _every_head(block.attn.W_V.detach().double(), shape.n_heads, 0)
    b_V = getattr(block.attn, "b_V", None)
    b_V = W_V.new_zeros(shape.n_heads, shape.d_head) if b_V is None else b_V.detach().double()
    weight, bias = getattr(block.ln1, "weight", None), getattr(block.ln1, "bias", None)
    return Reads(
        W_V,
        _every_head(b_V.reshape(-1, shape.d_head), shape.n_heads, 0),
        W_V.new_ones(shape.d_model) if weight is None else weight.detach().double(),
        W_V.new_zeros(shape.d_model) if bias is None else bias.detach().double(),
        kind.startswith("LN"),
    )


@cache
def _tokenizer(folder: str) -> Any:
    from pathlib import Path

    return load_tokenizer(Path(folder))


def tokenise(model: LanguageModel, text: str) -> Int[Tensor, " pos"]:
    """BOS and the text's tokens; ConfigError for a text that is empty or longer than the model's context."""
    tokenizer = _tokenizer(str(model.files.path))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt {text!r} holds no token; at least one is needed")
    if len(ids) >= model.shape.n_ctx:
        raise ConfigError(f"prompt of {len(ids)} tokens is too long; allowed: {model.shape.n_ctx - 1}")
    return torch.tensor([bos_id(tokenizer), *ids])


def token_texts(model: LanguageModel, tokens: Int[Tensor, " pos"]) -> list[str]:
    """Each token as people see it: spaces as ·, BOS by name."""
    tokenizer = _tokenizer(str(model.files.path))
    return [
        tokenizer.convert_ids_to_tokens(one) if one == bos_id(tokenizer) else visible(tokenizer.decode([one]))
        for one in tokens.tolist()
    ]
