"""Read and replace activations at named sites during a forward pass, or during its last part alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from atlas.errors import ConfigError
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
    """One forward pass, stopped as soon as all is seen: activations at ``sites`` and raw extra hooks."""
    names = dict.fromkeys([*(s.hook_name for s in sites), *extra_hooks])
    raw: dict[str, Tensor] = {}

    def keep_as(name: str) -> Callable[..., None]:
        def keep(value: Tensor, hook: Any) -> None:  # noqa: ARG001 - the hook protocol passes both
            raw[name] = value
            # What follows the last of them, such as the unembedding, would be computed for nothing.
            if len(raw) == len(names):
                raise StopAtLayerException(value)

        return keep

    last = max(int(name.split(".")[1]) for name in names)
    model.bridge.run_with_hooks(
        tokens, return_type=None, stop_at_layer=last + 1, fwd_hooks=[(name, keep_as(name)) for name in names]
    )
    return {s: read_site(raw[s.hook_name], s) for s in sites}, {name: raw[name] for name in extra_hooks}


def gradients(
    model: LanguageModel, tokens: Int[Tensor, "batch pos"], sites: Sequence[Site]
) -> dict[Site, tuple[Float[Tensor, "batch pos d_in"], Float[Tensor, "batch pos d_in"]]]:
    """Activations at ``sites``, and the gradient there of the summed next-token cross-entropy (nats).

    One forward and one backward pass; a gradient is that of everything the activation reaches.
    """
    raw: dict[str, Tensor] = {}

    def keep_as(name: str) -> Callable[..., Tensor]:
        def keep(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - the hook protocol passes both
            # The weights ask for no gradient, so the graph begins at the first activation that does.
            raw[name] = value if value.requires_grad else value.detach().requires_grad_()
            return raw[name]

        return keep

    names = list(dict.fromkeys(site.hook_name for site in sites))
    with torch.enable_grad():
        logits = _logits(model, tokens, fwd_hooks=[(name, keep_as(name)) for name in names])
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum"
        )
        found = dict(zip(names, torch.autograd.grad(loss, [raw[name] for name in names]), strict=True))
    return {
        site: (read_site(raw[site.hook_name].detach(), site), read_site(found[site.hook_name], site))
        for site in sites
    }


class Resume(NamedTuple):
    """Where a forward pass is taken up again: a layer, and the residual stream that enters it."""

    layer: int
    resid_pre: Float[Tensor, "batch pos d_model"]


@torch.no_grad()
def logits_with(
    model: LanguageModel,
    tokens: Int[Tensor, "batch pos"],
    edits: Mapping[Site, Edit],
    resume: Resume | None = None,
    watch: Mapping[str, Callable[[Tensor], None]] | None = None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """The model's logits while each site in ``edits`` is replaced by what its function returns.

    With ``resume``, taken from a pass over the same tokens, the layers before it are not run again; the
    logits are those of a whole pass. A model in which that cannot be done gets the whole pass. ``watch``
    gives raw hooks, such as patterns, and what is to be shown their values, as edited.

    Raises:
        ConfigError: a site to edit lies before the layer at which the pass resumes.
    """

    def hook_for(site: Site, edit: Edit) -> Callable[..., Tensor]:
        def replace(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - the hook protocol passes both
            return write_site(value, site, edit(read_site(value, site)))

        return replace

    def showing(see: Callable[[Tensor], None]) -> Callable[..., None]:
        def show(value: Tensor, hook: Any) -> None:  # noqa: ARG001 - the hook protocol passes both
            see(value)

        return show

    hooks: list[tuple[str, Callable[..., Any]]] = [
        (site.hook_name, hook_for(site, edit)) for site, edit in edits.items()
    ]
    hooks += [(name, showing(see)) for name, see in (watch or {}).items()]
    if resume is None:
        return _logits(model, tokens, fwd_hooks=hooks)
    early = [site for site in edits if site.layer < resume.layer]
    if early:
        raise ConfigError(
            f"site {early[0].name} cannot be edited in a pass from layer {resume.layer}; "
            f"allowed: layer {resume.layer} and later"
        )
    if not _can_resume(model):
        return _logits(model, tokens, fwd_hooks=hooks)
    return _resumed(model, resume, fwd_hooks=hooks)


def _logits(model: LanguageModel, start: Tensor, **how: Any) -> Float[Tensor, "batch pos d_vocab"]:
    logits: Tensor = model.bridge.run_with_hooks(start, return_type="logits", **how)
    return logits


def _resumed(model: LanguageModel, resume: Resume, **how: Any) -> Float[Tensor, "batch pos d_vocab"]:
    with _skipping(list(model.bridge.blocks[: resume.layer])):
        return _logits(model, resume.resid_pre, start_at_layer=resume.layer, **how)


@contextmanager
def _skipping(blocks: Sequence[Any]) -> Iterator[None]:
    """While inside, these blocks hand on what they are given.

    The bridge's ``start_at_layer`` puts the residual in at its layer, with positions and masks as in a
    whole pass, but runs the earlier layers all the same and throws away what they computed.
    """

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    # Into __dict__, because the bridge passes ordinary attributes on to the module that it wraps.
    for block in blocks:
        block.__dict__["forward"] = hand_on
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


@lru_cache(maxsize=1)
@torch.no_grad()
def _can_resume(model: LanguageModel) -> bool:
    """Whether a resumed pass gives the logits of a whole one, tried on a few tokens."""
    layer = model.shape.n_layers - 1
    n = min(5, model.shape.n_ctx)
    tokens = torch.arange(2 * n, device=model.device).reshape(2, n) % model.shape.d_vocab
    site = Site("resid_pre", layer)
    resid_pre = capture(model, tokens, [site])[0][site]
    try:
        found = _resumed(model, Resume(layer, resid_pre))
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
        return False
    return torch.allclose(found, _logits(model, tokens), rtol=1e-4, atol=1e-4)
