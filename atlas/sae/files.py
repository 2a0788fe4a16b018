"""SAEs as folders in the format of SAELens 6: ``cfg.json`` and ``sae_weights.safetensors``.

What Head Atlas knows beside SAELens's own keys goes under ``metadata.head_atlas``.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atlas.errors import SAEError, StoreError
from atlas.sae.model import SAE, SAEInfo
from atlas.sites import Site

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SAELENS_NAMES = {"relu": "standard", "topk": "topk"}
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; StoreError where the disk refuses, which safetensors reports its own way."""
    try:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:
        raise StoreError(f"cannot write {path}: {error}") from None


def save_sae(sae: SAE, folder: Path) -> None:
    """Write the SAE into ``folder``, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, {name: getattr(sae, name).detach().float() for name in _TENSORS})
    (folder / CONFIG).write_text(json.dumps(_config(sae), indent=2), encoding="utf8")


def _config(sae: SAE) -> dict[str, Any]:
    info = sae.info
    known = asdict(info) | {"site": info.site.name}
    config: dict[str, Any] = {
        "architecture": _SAELENS_NAMES[info.architecture],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if info.site.kind == "z" and info.site.head is None else "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": info.model,
            "hook_name": info.site.hook_name,
            "hook_head_index": info.site.head,
            "context_size": info.context,
            "prepend_bos": True,
            "head_atlas": known,
        },
    }
    if info.k is not None:
        config["k"] = info.k
    return config


def load_sae(folder: Path) -> SAE:
    """Read an SAE that ``save_sae`` wrote.

    Raises:
        SAEError: a file is missing or damaged, a tensor is missing, has the wrong shape, or holds NaN.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise SAEError(f"SAE in {str(folder)!r} cannot be read: {str(error).splitlines()[0]}") from None
    missing = [name for name in _TENSORS if name not in tensors]
    if missing:
        raise SAEError(f"SAE in {str(folder)!r} lacks the tensors {', '.join(missing)}")
    known = config.get("metadata", {}).get("head_atlas")
    if known is None:
        raise SAEError(
            f"SAE in {str(folder)!r} was not written by Head Atlas: metadata.head_atlas is missing"
        )
    info = SAEInfo(**(known | {"site": Site.parse(known["site"])}))
    sae = SAE(info, *(tensors[name].to(torch.float32) for name in ("W_enc", "b_enc", "W_dec", "b_dec")))
    if (sae.d_in, sae.d_sae) != (config["d_in"], config["d_sae"]):
        raise SAEError(
            f"SAE in {str(folder)!r}: W_enc is {sae.d_in} x {sae.d_sae}, "
            f"{CONFIG} says {config['d_in']} x {config['d_sae']}"
        )
    return sae
