"""OpenMOSS's dictionaries of 2024: ``hyperparams.json`` and a safetensors or ``.pt`` file of weights.

Two generations, told apart by their tensors. The first (``encoder encoder_bias decoder feature_act_mask
feature_act_scale``, perhaps ``decoder_bias``):

    f = mask * scale * relu(n (x - b) encoder + encoder_bias)      x^ = (f decoder + b) / n

mask and scale are folded into the encoder, column by column, with s = mask * scale:

    s relu(p) = relu(s p) for s >= 0, so W_enc = s encoder and b_enc = s encoder_bias

which keeps every bit where s is 1, makes a masked feature (s = 0) silent, and is refused for s < 0, where
the identity does not hold. The second generation (``encoder.weight encoder.bias decoder.weight
decoder.bias``; Llama Scope) has ReLU, TopK or a JumpReLU with one stated threshold instead.

n is 1 (``none``), sqrt(d_model) / ||x|| (``token-wise``), or sqrt(d_model) / norm with the norm stated
(``dataset-wise``, folded in). From June 2024 the first generation subtracted b before it took the norm and
did not scale it back; with token-wise norms and a b other than zero that is no formula of ours, and it is
refused.
"""

import math
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from atlas.errors import SAEError, one_of
from atlas.interop.foreign import Foreign, Place, renamed
from atlas.interop.openmoss import refuse_transcoders, said_of_site, scaled
from atlas.interop.reading import (
    maybe_number,
    maybe_whole,
    read_json,
    read_pickle,
    read_safetensors,
    whole,
)

CONFIG = "hyperparams.json"
WEIGHTS = (
    "sae_weights.safetensors",
    "sae_weights.pt",
    "checkpoints/pruned.safetensors",
    "checkpoints/pruned.pt",
    "checkpoints/final.safetensors",
    "checkpoints/final.pt",
)
"""Where the weights may lie, first come first served: a pruned dictionary before the unpruned one."""

_FIRST = {"encoder": "W_enc", "encoder_bias": "b_enc", "decoder": "W_dec"}
_SECOND = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_FACTORS = ("feature_act_mask", "feature_act_scale")


def places(names: Collection[str]) -> list[Place]:
    """Folders of this format in a tree of file names."""
    found = []
    for name in sorted(name for name in names if PurePosixPath(name).name == CONFIG):
        folder = PurePosixPath(name).parent
        weights = next((w for w in WEIGHTS if str(folder / w) in names), None)
        if weights is not None:
            found.append(Place(str(folder), (name, str(folder / weights))))
    return found


def read(folder: Path) -> Foreign:
    """What an old OpenMOSS folder says.

    Raises:
        SAEError: a file is missing or damaged or would run code, it is no plain SAE, its normalisation
            cannot be said in one formula or lacks its number, or a tensor is missing or unknown.
    """
    where = f"OpenMOSS SAE in {str(folder)!r}"
    config = read_json(folder / CONFIG)
    refuse_transcoders(where, config)
    found = _weights(where, folder)
    second = "encoder.weight" in found
    activation = config.get("act_fn", "relu") if second else "relu"
    one_of(f"{where}: act_fn", activation, ("relu", "topk", "jumprelu"), SAEError)
    tensors = _second(where, found, config) if second else _first(where, found, config)
    if activation == "jumprelu":
        threshold = maybe_number(config, "jump_relu_threshold")
        if threshold is None:
            raise SAEError(f"{where}: {CONFIG} does not state the jump_relu_threshold of its JumpReLU")
        tensors["threshold"] = torch.full_like(tensors["b_enc"], threshold, dtype=torch.float32)
    tensors, normalisation = _normalised(where, tensors, config, second=second)
    subtracts = config.get("apply_decoder_bias_to_pre_encoder", not second)
    by_norm = config.get("sparsity_include_decoder_norm")
    if activation == "topk" and not isinstance(by_norm, bool):
        raise SAEError(f"{where}: {CONFIG} does not state sparsity_include_decoder_norm, which TopK needs")
    return Foreign(
        format="openmoss-old",
        config=config,
        tensors={name: tensor.to(torch.float32) for name, tensor in tensors.items()},
        architecture=activation,
        d_in=maybe_whole(where, config, "d_model", low=1),
        d_sae=maybe_whole(where, config, "d_sae", low=1),
        k=whole(where, config, "top_k") if activation == "topk" else None,
        l1_coefficient=maybe_number(config, "l1_coefficient"),
        normalize_activations=normalisation,
        apply_b_dec_to_input=bool(subtracts),
        rescale_acts_by_decoder_norm=activation == "topk" and bool(by_norm),
        **said_of_site(config),
    )


def _weights(where: str, folder: Path) -> dict[str, Tensor]:
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise SAEError(f"{where} has no weights; looked for {', '.join(WEIGHTS)}")
    return read_pickle(path) if path.suffix == ".pt" else read_safetensors(path)


def _first(where: str, found: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    names = dict(_FIRST)
    if config.get("use_decoder_bias", "decoder_bias" in found):
        names["decoder_bias"] = "b_dec"
    factors = {name: name for name in _FACTORS if name in found}
    tensors = renamed(where, found, names | factors)
    for name in factors:
        s = tensors.pop(name).float()
        width = tensors["W_enc"].shape[-1:]
        if tensors["W_enc"].ndim != 2 or not s.shape == tensors["b_enc"].shape == width:
            raise SAEError(
                f"{where}: encoder, encoder_bias and {name} have the shapes {tuple(tensors['W_enc'].shape)}, "
                f"{tuple(tensors['b_enc'].shape)} and {tuple(s.shape)}; one number per feature is needed"
            )
        if not bool((s >= 0).all()):
            raise SAEError(f"{where}: {name} is below zero or NaN somewhere and cannot be folded in")
        tensors["W_enc"] = tensors["W_enc"] * s
        tensors["b_enc"] = tensors["b_enc"] * s
    return _with_bias(tensors)


def _second(where: str, found: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    names = dict(_SECOND)
    if config.get("use_decoder_bias", "decoder.bias" in found):
        names["decoder.bias"] = "b_dec"
    tensors = renamed(where, found, names)
    for name in ("W_enc", "W_dec"):
        if tensors[name].ndim != 2:
            raise SAEError(f"{where}: {name} has shape {tuple(tensors[name].shape)}, not two dimensions")
        tensors[name] = tensors[name].T
    return _with_bias(tensors)


def _with_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if "b_dec" not in tensors:
        tensors["b_dec"] = torch.zeros(tensors["W_enc"].shape[0])
    return tensors


def _normalised(
    where: str, tensors: dict[str, Tensor], config: dict[str, Any], *, second: bool
) -> tuple[dict[str, Tensor], str]:
    """The tensors with a stated norm folded in, and the normalisation that is left to do."""
    how = config.get("norm_activation")
    one_of(f"{where}: norm_activation", how, ("none", "token-wise", "dataset-wise"), SAEError)
    biased = bool(tensors["b_dec"].any())
    late = not second and "apply_decoder_bias_to_pre_encoder" in config
    if how == "token-wise":
        if late and biased:
            raise SAEError(
                f"{where} takes each token's norm after the decoder bias is subtracted and does not scale "
                "that bias back; there is no such normalisation here"
            )
        return tensors, "constant_norm_rescale"
    if how == "dataset-wise":
        n = math.sqrt(tensors["W_enc"].shape[0]) / _stated_norm(where, config)
        if late:
            # relu(n p) / n: the activations were divided by n again, so only the bias is left with it.
            return tensors | {"b_enc": tensors["b_enc"].double() / n}, "none"
        return tensors | scaled(tensors, n), "none"
    return tensors, "none"


def _stated_norm(where: str, config: dict[str, Any]) -> float:
    stated = config.get("dataset_average_activation_norm")
    stated = stated if isinstance(stated, dict) else {}
    norm, out = maybe_number(stated, "in"), maybe_number(stated, "out")
    if norm is None or not (math.isfinite(norm) and norm > 0):
        raise SAEError(
            f"{where} divides by the average norm of its data set, which {CONFIG} does not state in "
            "dataset_average_activation_norm"
        )
    if out is not None and out != norm:
        raise SAEError(f"{where} states two norms, in {norm} and out {out}; one site has one")
    return norm
