"""Splice SAEs into a model's forward pass: read their features, edit them, take gradients to them.

At each SAE's site, with f = encode(x) and error = x - decode(f), the model goes on with

    decode(edited f) + edited error          (without the error term: decode(edited f))

Several SAEs act in one pass, each on what the earlier ones left. With the error term and no edit the site
keeps x bit for bit. Gradients: ``acts`` and ``errors`` are nodes of their own, so that their gradient is that
of what they write, while what lies before still gets the gradient of the whole.
Source: seed 004 (HookedSAETransformer), row E12; error terms as nodes: Marks et al. 2024.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.circuits.edits import Edit, apply, check, mask_of
from atlas.errors import ConfigError, SAEError, one_of
from atlas.lm.hooks import read_site, write_site
from atlas.lm.load import LanguageModel
from atlas.sae.model import SAE
from atlas.sae.normalise import Scale


class Encoded(NamedTuple):
    """An activation as an SAE sees it."""

    acts: Float[Tensor, "batch pos d_sae"]
    scale: Scale | None


def encode(sae: SAE, x: Float[Tensor, "batch pos d_in"]) -> Encoded:
    """Feature activations, differentiable: a feature that does not fire has no gradient."""
    rows = x.reshape(-1, sae.d_in)
    pre = sae.preactivations(rows)
    with torch.no_grad():
        active = sae.firing(rows, pre)
    index = (active.row, active.feature)
    acts = pre.new_zeros(pre.shape).index_put(index, pre[index])
    return Encoded(acts.reshape(*x.shape[:-1], sae.d_sae), sae.scale(rows))


def decode(
    sae: SAE, acts: Float[Tensor, "batch pos d_sae"], scale: Scale | None
) -> Float[Tensor, "batch pos d_in"]:
    """What the activations stand for."""
    return sae.decode(acts.reshape(-1, sae.d_sae), scale).reshape(*acts.shape[:-1], sae.d_in)


class Splice:
    """SAEs in a model's forward pass while the ``with`` block lasts; any call of the model passes through.

    After a call, by the SAE's name: ``x`` (the site before the SAE), ``acts`` (feature activations after
    edits), ``errors`` (x - x^, after edits); with ``gradients``, ``acts[name].grad`` after a backward pass.
    """

    def __init__(
        self,
        model: LanguageModel,
        saes: Sequence[SAE],
        edits: Sequence[Edit] = (),
        error: bool = True,
        gradients: bool = False,
    ) -> None:
        self.model, self.error, self.gradients = model, error, gradients
        self.saes = {sae.info.name: sae for sae in saes}
        self._edits: dict[str, list[Edit]] = {name: [] for name in self.saes}
        self._check(saes)
        for edit in edits:
            one_of("SAE", edit.sae, self.saes, SAEError)
            check(edit, self.saes[edit.sae].d_sae)
            if edit.kind == "drop_error" and not error:
                raise ConfigError(
                    f"SAE {edit.sae!r} is spliced without its error term: there is none to drop"
                )
            self._edits[edit.sae].append(edit)
        self.x: dict[str, Float[Tensor, "batch pos d_in"]] = {}
        self.acts: dict[str, Float[Tensor, "batch pos d_sae"]] = {}
        self.errors: dict[str, Float[Tensor, "batch pos d_in"]] = {}

    def _check(self, saes: Sequence[SAE]) -> None:
        sites = [sae.info.site for sae in saes]
        twice = next((site for n, site in enumerate(sites) if site in sites[:n]), None)
        if twice is not None:
            raise ConfigError(f"two SAEs are to be spliced at {twice.name}; allowed: one at each site")
        for sae in saes:
            site, shape = sae.info.site, self.model.shape
            if site.layer >= shape.n_layers or sae.d_in != site.d_in(shape):
                raise SAEError(
                    f"SAE {sae.info.name!r} reads {sae.d_in} numbers at {site.name}; model "
                    f"{self.model.name!r} does not have that"
                )
            if sae.info.processing != self.model.processing:
                raise SAEError(
                    f"SAE {sae.info.name!r} is for {sae.info.processing} weights; the model is loaded "
                    f"{self.model.processing}"
                )

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        hooks = [(sae.info.site.hook_name, self._hook(sae)) for sae in self.saes.values()]
        with self.model.bridge.hooks(fwd_hooks=hooks):
            yield

    def __enter__(self) -> "Splice":
        self._context = self._hooked()
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a pass through the splice, inside the ``with`` block."""
        with nullcontext() if self.gradients else torch.no_grad():
            out: Tensor = self.model.bridge(tokens, return_type="logits")
        return out

    def _hook(self, sae: SAE) -> Callable[..., Tensor]:
        def replace(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 - the hook protocol passes both
            with torch.enable_grad() if self.gradients else nullcontext():
                return write_site(value, sae.info.site, self.through(sae, read_site(value, sae.info.site)))

        return replace

    def through(self, sae: SAE, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        """What the model goes on with where one of the SAEs saw ``x``; notes what it saw."""
        name = sae.info.name
        found = encode(sae, x)
        edits = self._edits[name]
        # A tensor of its own: the error is made of the activations, too, and its share must not be counted.
        acts = self._node(self._edited(edits, found.acts.clone()))
        self.x[name], self.acts[name] = x, acts
        rebuilt = decode(sae, found.acts, found.scale)
        error = x - rebuilt
        for edit in edits:
            if edit.kind == "drop_error":
                gone = mask_of(edit.where, x.shape[0], x.shape[1], x.device)
                error = error.masked_fill(gone[..., None], 0.0)
        self.errors[name] = error = self._node(error) if self.error else error.detach()
        out = decode(sae, acts, found.scale)
        if not self.error:
            return out
        out = out + error
        if edits:
            return out
        # Its value is x to the last bit, its gradient that of the line above.
        return x.detach() + (out - out.detach())

    @staticmethod
    def _edited(edits: Sequence[Edit], acts: Tensor) -> Tensor:
        for edit in edits:
            if edit.kind != "drop_error":
                acts = apply(edit, acts)
        return acts

    def _node(self, value: Tensor) -> Tensor:
        """The tensor as something a gradient is kept for."""
        if not self.gradients:
            return value
        if not value.requires_grad:
            return value.detach().requires_grad_()
        value.retain_grad()
        return value


def run_spliced(
    model: LanguageModel,
    tokens: Int[Tensor, "batch pos"],
    saes: Sequence[SAE],
    edits: Sequence[Edit] = (),
    error: bool = True,
) -> tuple[Float[Tensor, "batch pos d_vocab"], Splice]:
    """Logits of one pass with SAEs spliced in, and the splice with what it saw."""
    with Splice(model, saes, edits, error) as splice:
        return splice.logits(tokens), splice


@torch.no_grad()
def feature_acts(
    model: LanguageModel, tokens: Int[Tensor, "batch pos"], sae: SAE
) -> Float[Tensor, "batch pos d_sae"]:
    """Activations of every feature on prompts, with the model as it is."""
    return run_spliced(model, tokens, [sae])[1].acts[sae.info.name]
