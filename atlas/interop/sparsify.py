"""sparsify's folders: ``cfg.json`` and ``sae.safetensors``; TopK alone.

    f = the k largest of relu((x - b_dec) encoder.weight^T + encoder.bias)      x^ = f W_dec + b_dec

The folder's name is the module whose output it reads (``layers.5``, ``layers.5.mlp``); the run's
``config.json`` beside the folder says which model.
"""

import json
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from atlas.errors import SAEError, one_of
from atlas.interop.folding import without_rescale
from atlas.interop.foreign import Foreign, Place, folders_with, renamed, turned
from atlas.interop.hooks import hook_of_module
from atlas.interop.ours import said_by_us, what_we_say
from atlas.interop.reading import maybe_text, maybe_whole, read_json, read_safetensors, whole
from atlas.sae.files import write_tensors
from atlas.sae.model import SAE

CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def places(names: Collection[str]) -> list[Place]:
    """Folders of this format in a tree of file names, each with its run's config where there is one."""
    found = []
    for place in folders_with(names, CONFIG, WEIGHTS):
        run = str(PurePosixPath(place.at).parent / RUN)
        found.append(
            Place(place.at, (*place.files, run) if place.at != "." and run in names else place.files)
        )
    return found


def read(folder: Path) -> Foreign:
    """What a sparsify folder says.

    Raises:
        SAEError: a file is missing or damaged, it is a transcoder or has a skip connection, its
            activation is not TopK, or a tensor is missing or unknown.
    """
    where = f"sparsify SAE in {str(folder)!r}"
    config = read_json(folder / CONFIG)
    for key in ("transcode", "skip_connection", "signed"):
        if config.get(key):
            raise SAEError(f"{where}: {key} is set, which no SAE here has")
    one_of(f"{where}: activation", config.get("activation", "topk"), ("topk",), SAEError)
    d_in = whole(where, config, "d_in")
    d_sae = maybe_whole(where, config, "num_latents") or d_in * whole(where, config, "expansion_factor")
    tensors = renamed(where, read_safetensors(folder / WEIGHTS), _NAMES)
    run = _run(folder)
    said: dict[str, Any] = {
        "model": maybe_text(run, "model"),
        "hook": hook_of_module(folder.name),
        "corpus": maybe_text(run, "dataset") or "",
        "context": maybe_whole(where, run, "ctx_len") or 0,
    }
    return Foreign(
        format="sparsify",
        config=config | {"run": run},
        tensors=tensors | {"W_enc": turned(tensors["W_enc"])},
        architecture="topk",
        d_in=d_in,
        d_sae=d_sae,
        k=whole(where, config, "k"),
        **(said | said_by_us(where, config)),
    )


def _run(folder: Path) -> dict[str, Any]:
    path = folder.parent / RUN
    return read_json(path) if path.is_file() else {}


def allows(sae: SAE) -> str | None:
    """Why this format cannot say what the SAE is; None if it can."""
    info = sae.info
    if sae.activation != "topk":
        return f"it has TopK alone, and this SAE is {info.architecture}"
    if info.normalize_activations != "none":
        return f"it has no {info.normalize_activations}"
    return None if info.apply_b_dec_to_input else "it always subtracts b_dec, which this SAE does not"


def write(sae: SAE, folder: Path) -> None:
    """Write a sparsify folder; whoever loads it by hook point wants it named so, such as ``layers.5``."""
    sae = without_rescale(sae)
    unit = bool(torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae), atol=1e-4))
    config = {
        "activation": "topk",
        "expansion_factor": max(sae.d_sae // sae.d_in, 1),
        "normalize_decoder": unit,
        "num_latents": sae.d_sae,
        "k": sae.info.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
        "head_atlas": what_we_say(sae.info),
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "encoder.weight": sae.W_enc.T,
        "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    write_tensors(folder / WEIGHTS, tensors)
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf8")
