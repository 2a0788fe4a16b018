"""Activations as sums: of SAE features, error and bias; of upstream components; of values by source.

Every function gives terms whose sum is exactly what is split, because nothing but linear maps with frozen
patterns and frozen norms lies between.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from atlas.analysis.dfa import reading_of
from atlas.analysis.weights import attribution_directions
from atlas.circuits.passes import Pass, reads_of
from atlas.lm.load import LanguageModel
from atlas.sae.model import SAE


class Wide(NamedTuple):
    """An SAE as attributions read it. Its matrices stay float32; what is used of them is made float64."""

    sae: SAE
    encoder: Float[Tensor, "d_in d_sae"]
    decoder: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    bias: Float[Tensor, " d_sae"]
    heads: Float[Tensor, "d_sae heads d_head"] | None
    offset: Float[Tensor, " d_sae"] | None


def widen(model: LanguageModel, sae: SAE) -> Wide:
    """The tensors that attributions need."""
    reading = reading_of(model, sae) if sae.info.site.kind in ("z", "attn_out") else None
    return Wide(
        sae,
        attribution_directions(sae),
        sae.decoder_directions,
        sae.b_dec.double(),
        sae.bias_term.double(),
        None if reading is None else reading.directions,
        None if reading is None else reading.offset.double(),
    )


class Sparse(NamedTuple):
    """An activation at every position as an SAE has it: x = back * (acts W_dec + b_dec) + mean + error."""

    x: Float[Tensor, "pos d_in"]
    acts: Float[Tensor, "pos d_sae"]
    pre: Float[Tensor, "pos d_sae"]
    size: Float[Tensor, "pos 1"]
    back: Float[Tensor, "pos 1"]
    mean: Float[Tensor, "pos 1"]
    error: Float[Tensor, "pos d_in"]


@torch.no_grad()
def sparse_of(wide: Wide, x: Float[Tensor, "pos d_in"]) -> Sparse:
    """Encode once. Which features fire, and how strongly, is decided in float32, as everywhere else.

    Pre-activations are read again in float64, so that what a step leaves over is the model's rounding alone.
    """
    sae, narrow = wide.sae, x.float()
    pre, scale = sae.preactivations(narrow), sae.scale(narrow)
    active = sae.firing(narrow, pre)
    acts = torch.zeros_like(pre).index_put((active.row, active.feature), active.value).double()
    one, zero = x.new_ones(len(x), 1), x.new_zeros(len(x), 1)
    size, back, mean = (
        (one, one, zero) if scale is None else (scale.size.double(), scale.back.double(), scale.mean.double())
    )
    written = active.value.double()[:, None] * wide.decoder[active.feature].double()
    rebuilt = torch.zeros_like(x).index_add(0, active.row, written)
    error = x - (back * (rebuilt + wide.b_dec) + mean)
    wide_pre = x @ wide.encoder.double() / size + wide.bias
    return Sparse(x, acts, wide_pre, size, back, mean, error)


class BySource(NamedTuple):
    """A z feature's pre-activation at one position: by head and source, and what is constant."""

    terms: Float[Tensor, "heads key"]
    bias: float


def by_source(one: Pass, wide: Wide, sparse: Sparse, feature: int, position: int) -> BySource:
    """dfa[h, s] = pattern[h, position, s] v[s, h] . W_enc[h, f] / size, and the bias (seed 004, step 2)."""
    layer, size = wide.sae.info.site.layer, float(sparse.size[position])
    if wide.heads is None or wide.offset is None:
        raise ValueError("an SAE that does not read heads has no sources")
    values = torch.einsum("shd,hd->hs", one.v[layer], wide.heads[feature].double())
    terms = one.pattern[layer][:, position] * values / size
    return BySource(terms, float(wide.bias[feature] + wide.offset[feature] / size))


class Functional(NamedTuple):
    """A linear reading of the residual stream at one position: value = x . direction + constant."""

    direction: Float[Tensor, " d_model"]
    constant: float


def reading_at_source(
    model: LanguageModel, one: Pass, wide: Wide, sparse: Sparse, feature: int, position: int, source: int
) -> Functional:
    """How the feature's contribution from ``source``, all heads together, reads resid_pre there.

    sum over h of pattern[h] (norm(x) W_V[h] + b_V[h]) . W_enc[h, f] / size (seed 004, step 3).
    """
    if wide.heads is None:
        raise ValueError("an SAE that does not read heads has no sources")
    layer = wide.sae.info.site.layer
    reads, W = reads_of(model, layer), wide.heads[feature].double()
    weight = one.pattern[layer][:, position, source] / float(sparse.size[position])
    normed = torch.einsum("h,hmd,hd->m", weight, reads.W_V, W)
    constant = torch.einsum("h,hd,hd->", weight, reads.b_V, W) + reads.bias @ normed
    return Functional(reads.back(normed, one.ln_scale[layer][source]), float(constant))


def reading_of_feature(wide: Wide, sparse: Sparse, feature: int, position: int) -> Functional:
    """How a residual feature's pre-activation reads the stream."""
    return Functional(
        wide.encoder[:, feature].double() / float(sparse.size[position]), float(wide.bias[feature])
    )


class FeatureTerms(NamedTuple):
    """An activation along a direction, as the SAE splits it; the terms sum to x . direction."""

    features: Float[Tensor, " d_sae"]
    bias: float
    error: float


def feature_terms(
    wide: Wide, sparse: Sparse, position: int, direction: Float[Tensor, " d_in"]
) -> FeatureTerms:
    """Activation times decoder row along the direction, the decoder's bias, the error term."""
    back = sparse.back[position]
    bias = back * (wide.b_dec @ direction) + sparse.mean[position] * direction.sum()
    acts = sparse.acts[position]
    live, features = acts.nonzero()[:, 0], torch.zeros_like(acts)
    features[live] = back * acts[live] * (wide.decoder[live].double() @ direction)
    return FeatureTerms(features, float(bias), float(sparse.error[position] @ direction))


def component_terms(
    one: Pass, layer: int, position: int, direction: Float[Tensor, " d_model"]
) -> list[tuple[str, int | None, float]]:
    """resid_pre along a direction by upstream component: (kind, layer, term) (seed 004, step 4)."""
    out: list[tuple[str, int | None, float]] = [("embed", None, float(one.embed[position] @ direction))]
    if one.pos_embed is not None:
        out.append(("pos", None, float(one.pos_embed[position] @ direction)))
    for n in range(layer):
        out.append(("attn", n, float(one.attn_out[n][position] @ direction)))
        out.append(("mlp", n, float(one.mlp_out[n][position] @ direction)))
    return out


def through_W_O(
    model: LanguageModel, layer: int, direction: Float[Tensor, " d_model"]
) -> tuple[Float[Tensor, " heads_d_head"], float]:
    """The direction in z of a layer that attn_out . direction reads, and what b_O adds."""
    W_O = model.W_O(layer).double().flatten(0, 1)
    return W_O @ direction, float(model.b_O(layer).double() @ direction)
