"""Load a language model as a TransformerBridge, raw or folded, and read its weights per head."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from atlas.configs import ModelConfig
from atlas.errors import ModelError
from atlas.lm.files import ModelFiles, find_model
from atlas.sites import ModelShape


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model: the bridge, its files, its sizes and how its weights were prepared."""

    bridge: Any
    files: ModelFiles
    shape: ModelShape
    processing: str
    device: torch.device

    @property
    def name(self) -> str:
        """The model's short name."""
        return self.files.name

    def W_O(self, layer: int) -> Float[Tensor, "n_heads d_head d_model"]:
        """The output matrix of each head of a layer."""
        return cast(Tensor, self.bridge.blocks[layer].attn.W_O).detach()

    def b_O(self, layer: int) -> Float[Tensor, " d_model"]:
        """What a layer's attention adds to the stream beside its heads; zeros where it has no bias."""
        bias = getattr(self.bridge.blocks[layer].attn, "b_O", None)
        return self.W_O(layer).new_zeros(self.shape.d_model) if bias is None else cast(Tensor, bias).detach()

    def W_Q(self, layer: int) -> Float[Tensor, "n_heads d_model d_head"]:
        """The query matrix of each head of a layer."""
        return cast(Tensor, self.bridge.blocks[layer].attn.W_Q).detach()

    def W_K(self, layer: int) -> Float[Tensor, "n_heads d_model d_head"]:
        """The key matrix of each head of a layer."""
        return cast(Tensor, self.bridge.blocks[layer].attn.W_K).detach()

    def W_pos(self) -> Float[Tensor, "n_ctx d_model"] | None:
        """The embedding of each position; None for a model without absolute ones (rotary, ALiBi)."""
        found = getattr(self.bridge, "W_pos", None)
        return None if found is None else cast(Tensor, found).detach()

    def logit_directions(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding with the final LayerNorm's weight folded in, centred over d_model and d_vocab.

        A direction in the residual stream times this matrix is its effect on the logits, up to the
        LayerNorm's scale and without biases (``logit_effects`` in the table reference).
        """
        W_U = cast(Tensor, self.bridge.W_U).detach().float()
        weight = getattr(self.bridge.ln_final, "weight", None)
        if weight is not None and self.processing == "raw":
            W_U = weight.detach().float()[:, None] * W_U
        W_U = W_U - W_U.mean(0, keepdim=True)
        return W_U - W_U.mean(1, keepdim=True)


def load_model(config: ModelConfig, device: torch.device) -> LanguageModel:
    """Load the model that ``config`` names, in float32 and ready for hooks.

    Raises:
        ModelError: the folder is missing or damaged, tensors are missing or hold NaN, or
            transformer_lens has no adapter for the architecture.
    """
    files = find_model(config.name)
    return _load(files, config.processing, device)


@lru_cache(maxsize=1)
def _load(files: ModelFiles, processing: str, device: torch.device) -> LanguageModel:
    """Steps of one build share a loaded model; only the latest is kept."""
    from transformer_lens.model_bridge import TransformerBridge

    hf, tokenizer = _read_folder(files)
    try:
        bridge = TransformerBridge.boot_transformers(
            str(files.path), hf_model=hf, tokenizer=tokenizer, device=str(device)
        )
        if processing == "folded":
            bridge.enable_compatibility_mode(disable_warnings=True)
    except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"model {files.name!r} cannot be booted by transformer_lens: {error}") from None
    bridge.eval()
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    cfg = bridge.cfg
    shape = ModelShape(cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head, cfg.d_vocab, cfg.n_ctx)
    return LanguageModel(bridge, files, shape, processing, device)


def _read_folder(files: ModelFiles) -> tuple[Any, Any]:
    """The Hugging Face model and tokenizer; damaged or missing tensors are an error, never random."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(files.path, local_files_only=True)
        # The same function, fused: one pass over memory where the other takes eight.
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"
        hf, info = AutoModelForCausalLM.from_pretrained(
            files.path,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(files.path, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged folder makes Hugging Face raise almost anything
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelError(f"model {files.name!r} in {str(files.path)!r} cannot be read: {reason}") from None
    _check_complete(files, hf, info)
    return hf, tokenizer


def _check_complete(files: ModelFiles, hf: Any, info: dict[str, Any]) -> None:
    bad = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", ())]))
    if bad:
        raise ModelError(f"model {files.name!r} lacks tensors of the right shape: {', '.join(bad[:4])}")
    for name, tensor in hf.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"tensor {name!r} of model {files.name!r} holds NaN or infinity")
