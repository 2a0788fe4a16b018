"""Read and replace activations at named sites during a forward pass."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.lm.load import LanguageModel
from atlas.sites import STREAM_KINDS, Site

Edit = Callable[[Float[Tensor, "batch pos d_in"]], Float[Tensor, "batch pos d_in"]]


def read_site(hooked: Float[Tensor, "batch pos *rest"], site: Site) -> Float[Tensor, "batch pos d_in"]:
    """The site's vectors in a hooked activation: heads concatenated, or one head taken out.

    >>> hooked = torch.arange(6.0).reshape(1, 1, 2, 3)
    >>> read_site(hooked, Site("z", 0)).tolist(), read_site(hooked, Site("z", 0, 1)).tolist()
    ([[[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]], [[[3.0, 4.0, 5.0]]])
    """
    if site.kind in STREAM_KINDS:
        return hooked
    return hooked.flatten(2) if site.head is None else hooked[:, :, site.head]


def write_site(
    hooked: Float[Tensor, "batch pos *rest"], site: Site, value: Float[Tensor, "batch pos d_in"]
) -> Float[Tensor, "batch pos *rest"]:
    """The hooked activation with the site replaced; a single head's site replaces that head alone.

    >>> hooked = torch.zeros(1, 1, 2, 2)
    >>> write_site(hooked, Site("z", 0, 1), torch.ones(1, 1, 2)).flatten().tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    if site.head is None:
        return value.reshape(hooked.shape)
    out = hooked.clone()
    out[:, :, site.head] = value
    return out


@torch.no_grad()
def capture(
    model: LanguageModel,
    tokens: Int[Tensor, "batch pos"],
    sites: Sequence[Site],
    extra_hooks: Sequence[str] = (),
) -> tuple[dict[Site, Float[Tensor, "batch pos d_in"]], dict[str, Tensor]]:
    """One forward pass, stopped after the last layer needed: activations at ``sites`` and raw extra hooks."""
    raw: dict[str, Tensor] = {}

    def keep_as(name: str) -> Callable[..., None]:
        def keep(value: Tensor, hook: Any) -> None:  # noqa: ARG001 - the hook protocol passes both
            raw[name] = value

        return keep

    names = dict.fromkeys([*(s.hook_name for s in sites), *extra_hooks])
    last = max(int(name.split(".")[1]) for name in names)
    stop = last + 1 if last + 1 < model.shape.n_layers else None
    model.bridge.run_with_hooks(
        tokens, return_type=None, stop_at_layer=stop, fwd_hooks=[(name, keep_as(name)) for name in names]
    )
    return {s: read_site(raw[s.hook_name], s) for s in sites}, {name: raw[name] for name in extra_hooks}


@torch.no_grad()
def logits_with(
    model: LanguageModel, tokens: Int[Tensor, "batch pos"], edits: Mapping[Site, Edit]
) -> Float[Tensor, "batch pos d_vocab"]:
    """The model's logits while each site in ``edits`` is replaced by what its function returns."""

    def hook_for(site: Site, edit: Edit) -> Callable[..., Tensor]:
        def replace(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - the hook protocol passes both
            return write_site(value, site, edit(read_site(value, site)))

        return replace

    hooks = [(site.hook_name, hook_for(site, edit)) for site, edit in edits.items()]
    logits: Tensor = model.bridge.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    return logits
