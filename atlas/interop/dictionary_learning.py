"""dictionary_learning's folders: ``ae.pt``, a state dict, and ``config.json``.

The class named in ``trainer.dict_class`` decides the tensors' names and the formula:

    AutoEncoder              relu of encoder(x - bias)
    AutoEncoderNew           relu of encoder(x), without the subtraction
    GatedAutoEncoder         gated, as ours
    AutoEncoderTopK          TopK of encoder(x - b_dec)
    BatchTopKSAE             relu of encoder(x - b_dec) where it is above one threshold
    MatryoshkaBatchTopKSAE   the same, with W_enc and W_dec
    JumpReluAutoEncoder      x W_enc + b_enc where it is above its own threshold, without the subtraction

``encoder.weight`` is W_enc transposed, ``decoder.weight`` W_dec transposed. Activations are those of the
stored weights; that program rescales an AutoEncoder to unit decoder rows when it loads one.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atlas.errors import SAEError, one_of
from atlas.interop.folding import without_rescale, without_subtraction
from atlas.interop.foreign import Foreign, Place, folders_with, renamed, turned
from atlas.interop.hooks import hook_of_submodule
from atlas.interop.ours import KEY, said_by_us, what_we_say
from atlas.interop.reading import maybe_number, maybe_text, maybe_whole, read_json, read_pickle
from atlas.sae.model import SAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_BATCH = {"threshold": "threshold"}


@dataclass(frozen=True)
class _Kind:
    """One dict_class: its architecture, its tensors under our names, what else its state dict holds."""

    architecture: str
    names: dict[str, str]
    subtracts: bool = True
    buffers: tuple[str, ...] = ()


KINDS = {
    "AutoEncoder": _Kind("relu", _LINEAR | {"encoder.bias": "b_enc", "bias": "b_dec"}),
    "AutoEncoderNew": _Kind(
        "relu", _LINEAR | {"encoder.bias": "b_enc", "decoder.bias": "b_dec"}, subtracts=False
    ),
    "GatedAutoEncoder": _Kind(
        "gated",
        _LINEAR | {"decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag", "r_mag": "r_mag"},
    ),
    "AutoEncoderTopK": _Kind(
        "topk", _LINEAR | {"encoder.bias": "b_enc", "b_dec": "b_dec"}, buffers=("k", "threshold")
    ),
    "BatchTopKSAE": _Kind(
        "batchtopk", _LINEAR | {"encoder.bias": "b_enc", "b_dec": "b_dec"} | _BATCH, buffers=("k",)
    ),
    "MatryoshkaBatchTopKSAE": _Kind("matryoshka", _PLAIN | _BATCH, buffers=("k", "group_sizes")),
    "JumpReluAutoEncoder": _Kind("jumprelu", _PLAIN | _BATCH, subtracts=False),
}


def places(names: Collection[str]) -> list[Place]:
    """Folders of this format in a tree of file names."""
    return folders_with(names, CONFIG, WEIGHTS)


def read(folder: Path) -> Foreign:
    """What a dictionary_learning folder says.

    Raises:
        SAEError: a file is missing or damaged, would run code, the class is not known, a tensor is missing
            or unknown, or a BatchTopK SAE has no threshold.
    """
    where = f"dictionary_learning SAE in {str(folder)!r}"
    config = read_json(folder / CONFIG)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise SAEError(f"{where}: {CONFIG} has no 'trainer' with the SAE's class")
    one_of(f"{where}: dict_class", trainer.get("dict_class"), KINDS, SAEError)
    kind = KINDS[trainer["dict_class"]]
    state = read_pickle(folder / WEIGHTS)
    tensors = renamed(where, state, kind.names, kind.buffers)
    if kind.names.get("encoder.weight"):
        tensors |= {"W_enc": turned(tensors["W_enc"]), "W_dec": turned(tensors["W_dec"])}
    if "threshold" in tensors and kind.architecture != "jumprelu":
        tensors["threshold"] = _spread(where, tensors["threshold"], tensors["b_enc"])
    buffer = config.get("buffer")
    buffer = buffer if isinstance(buffer, dict) else {}
    said: dict[str, Any] = {
        "model": maybe_text(trainer, "lm_name"),
        "hook": hook_of_submodule(trainer.get("submodule_name")),
        "seed": maybe_whole(where, trainer, "seed") or 0,
        "context": maybe_whole(where, buffer, "ctx_len") or 0,
        "l1_coefficient": maybe_number(trainer, "l1_penalty"),
    }
    return Foreign(
        format="dictionary_learning",
        config=config,
        tensors=tensors,
        architecture=kind.architecture,
        d_in=maybe_whole(where, trainer, "activation_dim", low=1),
        d_sae=maybe_whole(where, trainer, "dict_size", low=1),
        k=_k(where, trainer, state) if "k" in kind.buffers else None,
        apply_b_dec_to_input=kind.subtracts,
        **(said | said_by_us(where, config)),
    )


def _k(where: str, trainer: dict[str, Any], state: dict[str, Tensor]) -> int | None:
    """k from the config; the state dict's own, where it has one, must be the same."""
    stated = maybe_whole(where, trainer, "k", low=1)
    kept = int(state["k"].item()) if "k" in state and state["k"].numel() == 1 else None
    if stated is not None and kept is not None and stated != kept:
        raise SAEError(f"{where}: {CONFIG} says k {stated}, {WEIGHTS} says {kept}")
    return stated or kept


def _spread(where: str, threshold: Tensor, like: Tensor) -> Tensor:
    """One threshold for all features; below zero means that training never set it."""
    if threshold.numel() != 1:
        raise SAEError(f"{where}: threshold has shape {tuple(threshold.shape)}, one number is needed")
    if float(threshold) < 0:
        raise SAEError(
            f"{where}: its threshold was never set ({float(threshold)}), and it is needed to encode"
        )
    return threshold.reshape(1).expand(like.shape).contiguous()


def allows(sae: SAE) -> str | None:
    """Why this format cannot say what the SAE is; None if it can."""
    info = sae.info
    if info.normalize_activations != "none":
        return f"it has no {info.normalize_activations}"
    if sae.activation in ("topk", "gated") and not info.apply_b_dec_to_input:
        return f"its {info.architecture} SAEs always subtract b_dec, which this one does not"
    return None


def write(sae: SAE, folder: Path) -> None:
    """Write ``ae.pt`` and ``config.json``; see ``_said_as`` for the class that an SAE is written as."""
    sae = without_rescale(sae)
    name = _said_as(sae)
    if name == "JumpReluAutoEncoder":
        sae = without_subtraction(sae)
    kind, tensors = KINDS[name], sae.tensors()
    if name == "GatedAutoEncoder":
        tensors["b_mag"] = tensors.pop("b_enc")
    state = {theirs: tensors[ours] for theirs, ours in kind.names.items()}
    if "encoder.weight" in state:
        state |= {key: state[key].T.contiguous() for key in _LINEAR}
    if name == "BatchTopKSAE":
        state["threshold"] = state["threshold"][0].clone()
    if "k" in kind.buffers:
        state["k"] = torch.tensor(sae.info.k, dtype=torch.int32)
    if name == "AutoEncoderTopK":
        state["threshold"] = torch.tensor(-1.0)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(_config(sae, name), indent=2), encoding="utf8")


def _said_as(sae: SAE) -> str:
    """The class that says what the SAE is, with its bits kept where there is one.

    A JumpReLU SAE with one threshold, a k and the subtraction is a BatchTopKSAE; any other one loses the
    subtraction, which goes into b_enc.
    """
    info = sae.info
    if sae.activation == "relu":
        return "AutoEncoder" if info.apply_b_dec_to_input else "AutoEncoderNew"
    if sae.activation in ("topk", "gated"):
        return {"topk": "AutoEncoderTopK", "gated": "GatedAutoEncoder"}[sae.activation]
    threshold = sae.threshold
    one = threshold is not None and bool((threshold == threshold[0]).all()) and float(threshold[0]) >= 0
    return "BatchTopKSAE" if one and info.k and info.apply_b_dec_to_input else "JumpReluAutoEncoder"


def _config(sae: SAE, name: str) -> dict[str, Any]:
    info = sae.info
    trainer = {
        "dict_class": name,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "layer": info.site.layer,
        "lm_name": info.model,
        "submodule_name": f"{info.site.kind}_layer_{info.site.layer}" if info.site.head is None else None,
        "seed": info.seed,
    }
    if "k" in KINDS[name].buffers:
        trainer["k"] = info.k
    return {"trainer": trainer, "buffer": {"ctx_len": info.context}, KEY: what_we_say(info)}
