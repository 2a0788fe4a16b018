"""OpenMOSS's folders of 2025 and later: ``config.json`` and ``sae_weights.safetensors`` (W_E b_E W_D b_D).

    f = act(x W_E + b_E)      x^ = f W_D + b_D      b_D is never subtracted from the input

``norm_activation`` is what x was scaled by while training: nothing (``inference``), each token to norm
sqrt(d_model) (``token-wise``), or all tokens by one number (``dataset-wise``), which the weights file keeps
and which is folded in exactly:

    n = sqrt(d_model) / norm      W_enc = n W_E      W_dec = W_D / n      b_dec = b_D / n

With ``sparsity_include_decoder_norm`` the gate looks at pre-activations times the decoder norm: TopK keeps
the flag (activations here are theirs times the norm of W_dec's row), JumpReLU's threshold is divided by it.
"""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atlas.errors import SAEError, one_of
from atlas.interop.folding import without_rescale, without_subtraction
from atlas.interop.foreign import Foreign, Place, folders_with, renamed
from atlas.interop.ours import KEY, said_by_us, what_we_say
from atlas.interop.reading import maybe_text, read_json, read_safetensors, whole
from atlas.sae.files import write_tensors
from atlas.sae.model import SAE

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm."
_NORMALISATIONS = {"inference": "none", "dataset-wise": "none", "token-wise": "constant_norm_rescale"}


def places(names: Collection[str]) -> list[Place]:
    """Folders of this format in a tree of file names; one with a ``cfg.json`` is SAELens's."""
    found = folders_with(names, CONFIG, WEIGHTS)
    return [place for place in found if str(Path(place.at) / "cfg.json") not in names]


def read(folder: Path) -> Foreign:
    """What an OpenMOSS folder says.

    Raises:
        SAEError: a file is missing or damaged, it is no plain SAE (crosscoder, transcoder, GLU), its
            activation or normalisation has no fixed formula, or a tensor is missing or unknown.
    """
    where = f"OpenMOSS SAE in {str(folder)!r}"
    config = read_json(folder / CONFIG)
    one_of(f"{where}: sae_type", config.get("sae_type", "sae"), ("sae",), SAEError)
    refuse_transcoders(where, config)
    activation = str(config.get("act_fn"))
    one_of(f"{where}: act_fn", activation, ("relu", "topk", "jumprelu"), SAEError)
    normalisation = str(config.get("norm_activation"))
    one_of(f"{where}: norm_activation", normalisation, _NORMALISATIONS, SAEError)
    found = read_safetensors(folder / WEIGHTS)
    norms = {key.removeprefix(_NORM): found.pop(key) for key in list(found) if key.startswith(_NORM)}
    tensors = _tensors(where, found, config, activation)
    if normalisation == "dataset-wise":
        n = math.sqrt(whole(where, config, "d_model")) / _norm(where, norms, config)
        tensors |= scaled(tensors, n)
    gated_by_norm = _gated_by_norm(where, config, activation)
    if activation == "jumprelu" and gated_by_norm:
        tensors["threshold"] = tensors["threshold"] / found["W_D"].double().norm(dim=1)
    return Foreign(
        format="openmoss",
        config=config,
        tensors={name: tensor.to(torch.float32) for name, tensor in tensors.items()},
        architecture=activation,
        d_in=whole(where, config, "d_model"),
        k=whole(where, config, "top_k") if activation == "topk" else None,
        normalize_activations=_NORMALISATIONS[normalisation],
        apply_b_dec_to_input=False,
        rescale_acts_by_decoder_norm=activation == "topk" and gated_by_norm,
        **(said_of_site(config) | said_by_us(where, config)),
    )


def _gated_by_norm(where: str, config: dict[str, Any], activation: str) -> bool:
    """Whether decoder norms decide which features fire; a ReLU's do not."""
    stated = config.get("sparsity_include_decoder_norm", activation == "relu" or None)
    one_of(f"{where}: sparsity_include_decoder_norm", stated, (True, False), SAEError)
    return bool(stated)


def said_of_site(config: dict[str, Any]) -> dict[str, Any]:
    """Model and hook as OpenMOSS's configs name them, where they do."""
    model = maybe_text(config, "model_name") or maybe_text(config, "lm_name")
    return {"model": model, "hook": maybe_text(config, "hook_point_in")}


def refuse_transcoders(where: str, config: dict[str, Any]) -> None:
    """SAEError for what is no sparse autoencoder of one site."""
    hook_in, hook_out = config.get("hook_point_in"), config.get("hook_point_out")
    if hook_out is not None and hook_out != hook_in:
        raise SAEError(f"{where} is a transcoder: it reads {hook_in!r} and writes {hook_out!r}")
    if config.get("use_glu_encoder"):
        raise SAEError(f"{where} has a GLU encoder, which no SAE here has")


def scaled(tensors: dict[str, Tensor], n: float) -> dict[str, Tensor]:
    """The weights of an SAE that reads x n and writes x^ n, for x itself; products in float64."""
    return {
        "W_enc": tensors["W_enc"].double() * n,
        "W_dec": tensors["W_dec"].double() / n,
        "b_dec": tensors["b_dec"].double() / n,
    }


def _tensors(
    where: str, found: dict[str, Tensor], config: dict[str, Any], activation: str
) -> dict[str, Tensor]:
    names = {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec"}
    if config.get("use_decoder_bias", True):
        names["b_D"] = "b_dec"
    if activation == "jumprelu":
        names[LOG_THRESHOLD] = "threshold"
    tensors = renamed(where, found, names)
    if tensors["W_enc"].ndim != 2 or tensors["W_dec"].ndim != 2:
        raise SAEError(f"{where}: W_E and W_D need two dimensions")
    if tensors["W_dec"].shape != tensors["W_enc"].T.shape:
        raise SAEError(
            f"{where}: W_D has shape {tuple(tensors['W_dec'].shape)}, "
            f"W_E of {tuple(tensors['W_enc'].shape)} asks for {tuple(tensors['W_enc'].T.shape)}"
        )
    tensors.setdefault("b_dec", torch.zeros(tensors["W_enc"].shape[0]))
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].double().exp()
        if tensors["threshold"].shape != tensors["W_enc"].shape[1:]:
            raise SAEError(f"{where}: {LOG_THRESHOLD} needs one number per feature")
    return tensors


def _norm(where: str, norms: dict[str, Tensor], config: dict[str, Any]) -> float:
    """The data set's average norm at the hook; one that is not stated is refused, not guessed."""
    hook = str(config.get("hook_point_in"))
    kept = norms.get(hook)
    if kept is None or kept.numel() != 1 or not (torch.isfinite(kept).all() and float(kept) > 0):
        raise SAEError(
            f"{where} divides by the average norm of its data set, which {WEIGHTS} does not state "
            f"under {_NORM + hook!r}; save it again with the scale folded in"
        )
    return float(kept)


def allows(sae: SAE) -> str | None:
    """Why this format cannot say what the SAE is; None if it can."""
    if sae.activation == "gated":
        return "it has no gated SAEs"
    return "it has no layer_norm" if sae.info.normalize_activations == "layer_norm" else None


def write(sae: SAE, folder: Path) -> None:
    """Write ``config.json`` and the weights; b_dec's subtraction goes into b_E."""
    if sae.activation != "topk":
        sae = without_rescale(sae)
    sae = without_subtraction(sae)
    info, hook = sae.info, sae.info.site.hook_name
    config = {
        "sae_type": "sae",
        "d_model": sae.d_in,
        "expansion_factor": _factor(sae.d_in, sae.d_sae),
        "hook_point_in": hook,
        "hook_point_out": hook,
        "use_decoder_bias": True,
        "act_fn": sae.activation,
        "norm_activation": "inference" if info.normalize_activations == "none" else "token-wise",
        "sparsity_include_decoder_norm": info.rescale_acts_by_decoder_norm,
        "use_glu_encoder": False,
        "dtype": "torch.float32",
        "device": "cpu",
        KEY: what_we_say(info),
    }
    if sae.activation == "topk":
        config["top_k"] = info.k
    tensors = {"W_E": sae.W_enc, "b_E": sae.b_enc, "W_D": sae.W_dec, "b_D": sae.b_dec}
    if sae.threshold is not None:
        # Below zero a threshold means what zero means, for activations are positive.
        tensors[LOG_THRESHOLD] = sae.threshold.double().clamp_min(0).log().float()
    tensors[_NORM + hook] = torch.tensor(math.sqrt(sae.d_in))
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors)
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf8")


def _factor(d_in: int, d_sae: int) -> float:
    """The factor whose product with d_in, cut to a whole number, is d_sae."""
    factor = d_sae / d_in
    return factor if int(d_in * factor) == d_sae else math.nextafter(factor, math.inf)
