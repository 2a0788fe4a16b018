"""SAELens folders: ``cfg.json`` and ``sae_weights.safetensors``, of version 6 and the flat ones before.

The formulas and names are those of ``atlas.sae.model``, which are SAELens's. A file that scales its input
by the data set's average norm (``expected_average_only_in``) does not state that norm and is refused.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from atlas.errors import AtlasError, SAEError, one_of
from atlas.interop.folding import without_rescale
from atlas.interop.foreign import Foreign, Place, folders_with, renamed
from atlas.interop.hooks import site_of
from atlas.interop.reading import maybe_number, maybe_text, maybe_whole, read_json, read_safetensors, whole
from atlas.sae.files import CONFIG, WEIGHTS, save_sae, write_tensors
from atlas.sae.model import ACTIVATIONS, SAE

NAMES = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
_EXTRA = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}
_OLD_NAMES = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
_TOP = (
    "architecture",
    "d_in",
    "d_sae",
    "dtype",
    "device",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "k",
    "rescale_acts_by_decoder_norm",
)
"""Keys that version 6 has outside ``metadata``."""


def places(names: Collection[str]) -> list[Place]:
    """Folders of this format in a tree of file names."""
    return folders_with(names, CONFIG, WEIGHTS)


def is_ours(folder: Path) -> bool:
    """Whether Head Atlas wrote it, so that it says everything that there is to say."""
    metadata = read_json(folder / CONFIG).get("metadata")
    return isinstance(metadata, dict) and isinstance(metadata.get("head_atlas"), dict)


def read(folder: Path) -> Foreign:
    """What a SAELens folder says.

    Raises:
        SAEError: a file is missing or damaged, the architecture or the normalisation cannot be read,
            or a tensor is missing or has no known meaning.
    """
    where = f"SAELens SAE in {str(folder)!r}"
    original = read_json(folder / CONFIG)
    config = modern(where, original)
    metadata = config["metadata"]
    one_of(f"{where}: architecture", config.get("architecture"), NAMES, SAEError)
    architecture = NAMES[config["architecture"]]
    _no_transcoder(where, metadata)
    extra = _EXTRA.get(architecture, ("b_enc",))
    tensors = read_safetensors(folder / WEIGHTS)
    _no_scaling(where, tensors.pop("scaling_factor", None))
    loaded_with = metadata.get("model_from_pretrained_kwargs")
    return Foreign(
        format="saelens",
        config=original,
        tensors=renamed(where, tensors, {n: n for n in ("W_enc", "W_dec", "b_dec", *extra)}),
        architecture=architecture,
        d_in=whole(where, config, "d_in"),
        d_sae=maybe_whole(where, config, "d_sae", low=1),
        model=maybe_text(metadata, "model_name"),
        hook=_hook(metadata),
        head=maybe_whole(where, metadata, "hook_head_index"),
        loaded_with=loaded_with if isinstance(loaded_with, dict) else {},
        k=maybe_whole(where, config, "k", low=1) if architecture == "topk" else None,
        l1_coefficient=maybe_number(metadata, "l1_coefficient"),
        tokens_trained=maybe_whole(where, metadata, "training_tokens") or 0,
        corpus=maybe_text(metadata, "dataset_path") or "",
        context=maybe_whole(where, metadata, "context_size") or 0,
        seed=maybe_whole(where, metadata, "seed") or 0,
        normalize_activations=_normalisation(where, config.get("normalize_activations", "none")),
        apply_b_dec_to_input=_flag(where, config, "apply_b_dec_to_input", default=True),
        rescale_acts_by_decoder_norm=architecture == "topk"
        and _flag(where, config, "rescale_acts_by_decoder_norm", default=False),
    )


def modern(where: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config as version 6 writes it; of a flat older one, every other key goes under ``metadata``."""
    metadata = config.get("metadata")
    if isinstance(metadata, dict):
        version = re.match(r"\d+", str(metadata.get("sae_lens_version") or config.get("sae_lens_version")))
        if version and int(version[0]) >= 6:
            return config
    flat = {_OLD_NAMES.get(key, key): value for key, value in config.items()}
    flat.setdefault("architecture", "standard")
    activation = flat.get("activation_fn_str", flat.get("activation_fn", "relu"))
    one_of(f"{where}: activation_fn_str", activation, ("relu", "topk"), SAEError)
    if activation == "topk":
        arguments = flat.get("activation_fn_kwargs")
        arguments = arguments if isinstance(arguments, dict) else {}
        if arguments.get("signed"):
            raise SAEError(f"{where}: a signed TopK keeps negative activations, which no SAE here has")
        flat |= {"architecture": "topk", "k": arguments.get("k", flat.get("k"))}
    if flat.get("normalize_activations") in (None, False):
        flat["normalize_activations"] = "none"
    top = {key: flat[key] for key in _TOP if key in flat}
    return top | {"metadata": {key: value for key, value in flat.items() if key not in _TOP}}


def _hook(metadata: dict[str, Any]) -> str | None:
    hook = maybe_text(metadata, "hook_name")
    layer = metadata.get("hook_layer", metadata.get("hook_point_layer"))
    return hook.replace("{layer}", str(layer)) if hook else None


def _normalisation(where: str, value: object) -> str:
    if value is True or value == "expected_average_only_in":
        raise SAEError(
            f"{where} divides by the average norm of its data set, which the file does not state; fold it "
            "into the weights in SAELens (fold_activation_norm_scaling_factor) and save it again"
        )
    return str(value)


def _flag(where: str, config: dict[str, Any], key: str, *, default: bool) -> bool:
    value = config.get(key, default)
    one_of(f"{where}: {key}", value, (True, False), SAEError)
    return bool(value)


def _no_transcoder(where: str, metadata: dict[str, Any]) -> None:
    out = metadata.get("hook_name_out")
    if out is not None and out != metadata.get("hook_name"):
        raise SAEError(f"{where} is a transcoder: it reads {metadata.get('hook_name')!r} and writes {out!r}")


def _no_scaling(where: str, factor: Any) -> None:
    """SAELens once saved a factor of ones with every SAE."""
    if factor is not None and not bool((factor == 1).all()):
        raise SAEError(f"{where} has a finetuning scaling_factor other than 1; fold it into W_dec first")


def write(sae: SAE, folder: Path) -> None:
    """Write a SAELens 6 folder; one that came from SAELens keeps every key of its config, and its dtypes."""
    if sae.info.rescale_acts_by_decoder_norm and sae.activation != "topk":
        sae = without_rescale(sae)
    save_sae(sae, folder)
    settings = json.loads(sae.info.settings or "{}")
    if not isinstance(settings, dict) or settings.get("format") != "saelens":
        return
    written = read_json(folder / CONFIG)
    theirs = modern(f"SAE {sae.info.name!r}", settings["config"])
    for key in ("dtype", "device", "reshape_activations"):
        written[key] = theirs.get(key, written[key])
    kept = theirs["metadata"]
    if int((re.match(r"\d+", str(kept.get("sae_lens_version"))) or ["0"])[0]) < 6:
        kept = {key: value for key, value in kept.items() if key != "sae_lens_version"}
    if not _same_site(sae, kept):
        kept = {key: kept[key] for key in kept if key not in ("hook_name", "hook_head_index")}
    rest = {key: value for key, value in theirs.items() if key not in written}
    written = written | rest | {"metadata": written["metadata"] | kept}
    (folder / CONFIG).write_text(json.dumps(written, indent=2), encoding="utf8")
    _restore_dtypes(folder / WEIGHTS, settings.get("dtypes", {}))


def _same_site(sae: SAE, metadata: dict[str, Any]) -> bool:
    try:
        hook = _hook(metadata)
        return hook is not None and site_of("", hook, metadata.get("hook_head_index")) == sae.info.site
    except AtlasError:
        return False


def _restore_dtypes(path: Path, dtypes: dict[str, str]) -> None:
    """Back to the dtypes that the file had, where that loses nothing."""
    import torch

    tensors = load_file(path)
    changed = False
    for name, dtype in dtypes.items():
        if name in tensors and dtype != "float32":
            narrow = tensors[name].to(getattr(torch, dtype))
            if torch.equal(narrow.to(torch.float32), tensors[name]):
                tensors[name], changed = narrow, True
    if changed:
        write_tensors(path, tensors)


def allows(sae: SAE) -> str | None:
    """Why this format cannot say what the SAE is; None, for it always can."""
    return None if sae.activation in ACTIVATIONS.values() else sae.activation
