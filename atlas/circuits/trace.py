"""Recursive direct feature attribution: what made a feature fire, and what made that.

With attention patterns, LayerNorm scales and an SAE's own scale frozen, every step is a sum:

    feature   pre-activation       = sum over sources s (and heads) of its weight from s + bias
    source    weight from s        = sum over residual features there + decoder bias + error + constant
    residual  pre-activation       = embedding + position + attention and MLP outputs of earlier layers + bias
    attn      a layer's output there = sum over its attention features + decoder bias + error + b_O

and an attention feature is split like the first. Where a layer has no residual SAE, a source is split by
components at once. MLPs are leaves. Source: seed 004, rows E10 and E11.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.circuits.growth import Growth
from atlas.circuits.nodes import Bounds, Trace
from atlas.circuits.parts import Sparse, Wide, sparse_of, widen
from atlas.circuits.passes import Pass, run_pass, tokenise
from atlas.errors import ConfigError, SAEError
from atlas.lm.load import LanguageModel
from atlas.sae.model import SAE

ATTENTION = ("z", "attn_out")


class Tracer:
    """Traces features of a model's SAEs: one on z or attn_out per layer, and perhaps one on resid_pre."""

    def __init__(self, model: LanguageModel, saes: Sequence[SAE]) -> None:
        self.model = model
        self.attention = _by_layer(model, (s for s in saes if _is_attention(s)))
        self.residual = _by_layer(model, (s for s in saes if s.info.site.kind == "resid_pre"))
        if not self.attention:
            raise SAEError("tracing needs an SAE on z or attn_out of a whole layer; none was given")

    def wide(self, name: str) -> Wide:
        """The attention SAE of that name."""
        known = {wide.sae.info.name: wide for wide in self.attention.values()}
        if name not in known:
            raise SAEError(f"SAE {name!r} is not among those to trace through; allowed: {', '.join(known)}")
        return known[name]

    def look(self, tokens: Int[Tensor, " pos"]) -> "Look":
        """Run the model over one prompt."""
        return Look(self, run_pass(self.model, tokens))

    def trace(
        self,
        prompt: str | Int[Tensor, " pos"],
        sae: str,
        feature: int,
        position: int = -1,
        bounds: Bounds | None = None,
    ) -> Trace:
        """What made ``feature`` fire at ``position`` (negative: from the end); see ``Bounds``."""
        tokens = tokenise(self.model, prompt) if isinstance(prompt, str) else prompt
        wide, n = self.wide(sae), len(tokens)
        if not -n <= position < n:
            raise ConfigError(f"position {position} does not exist; the prompt has positions 0 to {n - 1}")
        if not 0 <= feature < wide.sae.d_sae:
            raise SAEError(
                f"feature {feature} does not exist; SAE {sae!r} has features 0 to {wide.sae.d_sae - 1}"
            )
        return self.look(tokens).trace(wide, feature, position % n, bounds or Bounds())

    def strongest(self, tokens: Int[Tensor, " pos"], sae: str, n: int = 10) -> list[tuple[int, int, float]]:
        """The features of an SAE that fire most strongly on a prompt: (feature, position, activation).

        BOS is left out; a feature stands at its strongest position; ties go to the lower feature.
        """
        acts = self.look(tokens).attention(self.wide(sae).sae.info.site.layer).acts[1:]
        value, position = acts.max(0)
        order = torch.argsort(-value, stable=True)[:n].tolist()
        return [(f, int(position[f]) + 1, float(value[f])) for f in order if value[f] > 0]


def _is_attention(sae: SAE) -> bool:
    return sae.info.site.kind in ATTENTION and sae.info.site.head is None


def _by_layer(model: LanguageModel, saes: Iterable[SAE]) -> dict[int, Wide]:
    out: dict[int, Wide] = {}
    for sae in saes:
        layer = sae.info.site.layer
        if layer in out:
            other = out[layer].sae.info.name
            raise SAEError(f"{sae.info.name!r} and {other!r} are both for layer {layer}; allowed: one")
        if sae.info.processing != model.processing:
            raise SAEError(f"SAE {sae.info.name!r} is for {sae.info.processing} weights, not the model's")
        out[layer] = widen(model, sae)
    return out


class Look:
    """One prompt: activations of every layer, and of every SAE as soon as they are asked for."""

    def __init__(self, tracer: Tracer, one: Pass) -> None:
        self.tracer, self.one = tracer, one
        self._sparse: dict[tuple[str, int], Sparse] = {}

    def attention(self, layer: int) -> Sparse:
        """What the layer's attention SAE makes of the prompt."""
        wide = self.tracer.attention[layer]
        site = self.one.z if wide.sae.info.site.kind == "z" else self.one.attn_out
        return self._kept("attention", layer, wide, site[layer])

    def residual(self, layer: int) -> Sparse:
        """What the SAE of the stream before the layer makes of the prompt."""
        return self._kept("residual", layer, self.tracer.residual[layer], self.one.resid_pre[layer])

    def _kept(self, kind: str, layer: int, wide: Wide, x: Float[Tensor, "pos d_in"]) -> Sparse:
        if (kind, layer) not in self._sparse:
            self._sparse[kind, layer] = sparse_of(wide, x)
        return self._sparse[kind, layer]

    def trace(self, wide: Wide, feature: int, position: int, bounds: Bounds) -> Trace:
        """The feature's node and what it is made of, the largest shares first."""
        return Growth(self, bounds).grow(wide, feature, position)
