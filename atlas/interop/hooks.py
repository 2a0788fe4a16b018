"""Other people's names for places in a model, and what their model's weights mean there."""

import re
from collections.abc import Mapping
from typing import Any

from atlas.errors import SAEError
from atlas.sites import KINDS, Site

_HOOK = re.compile(r"blocks\.(\d+)\.(?:attn\.)?hook_([a-z_]+)")
_MODULE = re.compile(r"(?:.*\.)?(?:layers|h|blocks)[._](\d+)(?:\.(mlp|attn|attention|self_attn))?")
_SUBMODULE = re.compile(r"(resid_pre|resid_post|attn_out|mlp_out)_layer_(\d+)")
_MODULES = {
    None: "resid_post",
    "mlp": "mlp_out",
    "attn": "attn_out",
    "attention": "attn_out",
    "self_attn": "attn_out",
}
_MODELS = {"gpt2-small": "gpt2"}
_REFACTORED = "refactor_factored_attn_matrices"


def site_of(where: str, hook: str, head: int | None) -> Site:
    """The site of a TransformerLens hook; resid_post of a layer is resid_pre of the next one.

    >>> site_of("SAE", "blocks.5.attn.hook_q", 3).name
    'L05.H03.q'
    >>> site_of("SAE", "blocks.5.hook_resid_post", None).name
    'L06.resid_pre'
    """
    match = _HOOK.fullmatch(hook)
    layer, kind = (int(match[1]), match[2]) if match else (0, "")
    if kind == "resid_post":
        layer, kind = layer + 1, "resid_pre"
    if kind not in KINDS:
        raise SAEError(
            f"{where} reads {hook!r}, which is no site here; allowed: hooks of {', '.join(KINDS)} and "
            "resid_post, or give the site (--site L05.z)"
        )
    if kind in ("q", "k", "v") and head is None:
        raise SAEError(
            f"{where} reads {kind} of all heads of layer {layer} together; allowed: one head's {kind}"
        )
    return Site(kind, layer, head)


def hook_of_module(path: str) -> str | None:
    """The hook that a module's output is in TransformerLens, for sparsify's names of hook points.

    >>> hook_of_module("layers.5"), hook_of_module("transformer.h.3.mlp"), hook_of_module("embed_tokens")
    ('blocks.5.hook_resid_post', 'blocks.3.hook_mlp_out', None)
    """
    match = _MODULE.fullmatch(path)
    return f"blocks.{match[1]}.hook_{_MODULES[match[2]]}" if match else None


def hook_of_submodule(name: object) -> str | None:
    """The hook of dictionary_learning's ``submodule_name``, where it is one of the published kind.

    >>> hook_of_submodule("resid_post_layer_3")
    'blocks.3.hook_resid_post'
    """
    match = _SUBMODULE.fullmatch(name) if isinstance(name, str) else None
    return f"blocks.{match[2]}.hook_{match[1]}" if match else None


def model_called(name: str) -> str:
    """The short name that a build knows the model by.

    >>> model_called("gpt2-small"), model_called("EleutherAI/pythia-70m")
    ('gpt2', 'pythia-70m')
    """
    short = name.rstrip("/").split("/")[-1]
    return _MODELS.get(short, short)


def processing_at(where: str, site: Site, loaded_with: Mapping[str, Any]) -> str:
    """raw or folded: whether the model's weight processing changed what this site holds.

    Value biases folded away change z and v; centred writing weights change the residual stream; folding
    the LayerNorm changes no activation.

    >>> processing_at("SAE", Site("z", 5), {"fold_value_biases": True})
    'folded'
    >>> processing_at("SAE", Site("z", 5), {"center_writing_weights": True})
    'raw'
    """
    if loaded_with.get(_REFACTORED):
        raise SAEError(f"{where} was trained with {_REFACTORED}, which changes what heads hold; refused")
    if site.kind in ("z", "v"):
        decides = "fold_value_biases"
    else:
        decides = "" if site.kind in ("q", "k") else "center_writing_weights"
    return "folded" if loaded_with.get(decides) else "raw"
