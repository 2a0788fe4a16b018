"""SAEs as folders in the format of SAELens 6: ``cfg.json`` and ``sae_weights.safetensors``.

What Head Atlas knows beside SAELens's own keys goes under ``metadata.head_atlas``.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atlas.configs import NORMALISATIONS
from atlas.errors import AtlasError, SAEError, StoreError, one_of
from atlas.sae.model import ACTIVATIONS, SAE, SAEInfo
from atlas.sites import Site

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SAELENS_NAMES = {
    "relu": "standard",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
}


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
    tensors = {name: t.detach().float() for name, t in sae.tensors().items()}
    if sae.activation == "gated":
        tensors["b_mag"] = tensors.pop("b_enc")
    write_tensors(folder / WEIGHTS, tensors)
    (folder / CONFIG).write_text(json.dumps(_config(sae), indent=2), encoding="utf8")


def _config(sae: SAE) -> dict[str, Any]:
    info = sae.info
    known = asdict(info) | {"site": info.site.name}
    config: dict[str, Any] = {
        "architecture": SAELENS_NAMES[info.architecture],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": info.apply_b_dec_to_input,
        "normalize_activations": info.normalize_activations,
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
    if sae.activation == "topk":
        config["k"] = info.k
        config["rescale_acts_by_decoder_norm"] = info.rescale_acts_by_decoder_norm
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
    info, d_in, d_sae = _read_config(folder, config)
    return sae_of(f"SAE in {str(folder)!r}", info, tensors, d_in, d_sae)


def sae_of(where: str, info: SAEInfo, tensors: Mapping[str, torch.Tensor], d_in: int, d_sae: int) -> SAE:
    """An SAE from tensors under SAELens's names, which must be there, have their shapes and be finite.

    Raises:
        SAEError: naming ``where`` and the tensor.
    """
    activation = ACTIVATIONS[info.architecture]
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    extra = {"gated": ("b_gate", "r_mag", "b_mag"), "jumprelu": ("b_enc", "threshold")}
    shapes |= dict.fromkeys(extra.get(activation, ("b_enc",)), (d_sae,))
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise SAEError(f"{where} lacks the tensors {', '.join(missing)}")
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            raise SAEError(f"{where}: {name} has shape {found}; {CONFIG} says d_in {d_in}, d_sae {d_sae}")
    kept = {("b_enc" if n == "b_mag" else n): tensors[n].to(torch.float32) for n in shapes}
    return SAE(info, **kept)


def _read_config(folder: Path, config: Any) -> tuple[SAEInfo, int, int]:
    """What the config says of the SAE, d_in and d_sae; SAEError for anything else than ``save_sae`` wrote."""
    where = f"SAE in {str(folder)!r}"
    try:
        known, d_in, d_sae = config["metadata"]["head_atlas"], config["d_in"], config["d_sae"]
        if set(known) != {f.name for f in fields(SAEInfo)}:
            raise KeyError("head_atlas")
        site, architecture, k = Site.parse(known["site"]), known["architecture"], known["k"]
        one_of("architecture", architecture, SAELENS_NAMES, SAEError)
        one_of("normalize_activations", known["normalize_activations"], NORMALISATIONS, SAEError)
        if not isinstance(d_sae, int) or not isinstance(d_in, int):
            raise SAEError(f"d_in {d_in!r} and d_sae {d_sae!r} are not allowed; they must be whole numbers")
    except (KeyError, TypeError, AttributeError):
        raise SAEError(f"{where}: {CONFIG} lacks what Head Atlas writes in metadata.head_atlas") from None
    except AtlasError as error:
        raise SAEError(f"{where}: {error}") from None
    if architecture == "topk" and not (isinstance(k, int) and 0 < k <= d_sae):
        raise SAEError(f"{where}: k {k!r} is not allowed; it must be from 1 to d_sae {d_sae}")
    return SAEInfo(**(known | {"site": site})), d_in, d_sae
