"""QK circuits through features: attention feature -> OV of one head -> QK of a later head x residual feature.

One path of a mover head's attention score from the end to a name, all scales and patterns held fixed:

    q[end] = norm(pattern[end, S2] * norm(x_attn[S2]) W_V W_O) W_Q     W_V, W_O, pattern of a via head
    score  = q[end] . k[name] / sqrt(d_head)                           W_Q, k of the mover head

x_attn (a layer's attention output) and the stream at the name are written as features, decoder bias and error
term; each pair of parts is an entry, and the entries sum to the path's score. Source: seed 004, rows E8 and
E9.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from atlas.circuits.ioi_features import at_s2
from atlas.circuits.ioi_runs import Runs
from atlas.circuits.passes import Reads, reads_of
from atlas.errors import ConfigError
from atlas.sae.model import SAE
from atlas.sites import Site

BIAS, ERROR = -2, -1
"""What stands for the constants (decoder bias, b_O or b_K) and for the error term beside features'
numbers."""


class Route(NamedTuple):
    """The heads of a path, as (layer, head): what S2's signal goes through, and whose score it changes."""

    via: tuple[int, int]
    mover: tuple[int, int]


class Scores(NamedTuple):
    """The entries of one route: parts of the query side x parts of the key side, for each prompt."""

    entries: Float[Tensor, "n query key"]
    query: list[int]
    """Features of the attention SAE that fire at S2 in any prompt, then ERROR and BIAS."""
    key: list[int]
    """Features of the residual SAE that fire at the name in any prompt, then ERROR and BIAS."""


def _parts(x: Tensor, acts: Tensor, back: Tensor, sae: SAE) -> tuple[list[int], Tensor]:
    """Vectors [n, part, d_in] that sum to x: live features, the error term, and what is constant."""
    live = (acts.sum(0) > 0).nonzero()[:, 0].tolist()
    features = back[:, :, None] * acts[:, live, None] * sae.decoder_directions.double()[live]
    rebuilt = sae.decode(acts.float(), sae.scale(x.float())).double()
    constant = rebuilt - features.sum(1)
    stacked = torch.cat([features, (x - rebuilt)[:, None], constant[:, None]], 1)
    return [*live, ERROR, BIAS], stacked


@torch.no_grad()
def scores(runs: Runs, attention: SAE, residual: SAE, route: Route, name: str = "name2") -> Scores:
    """Entries of the path through ``route``; the key stands at a named position (the second name).

    Raises:
        ConfigError: the layers are not in order: attention SAE, via head, mover head; or the residual SAE
        does
            not stand before the mover head's layer.
    """
    (via_layer, via), (layer, mover) = route
    own = attention.info.site.layer
    if runs.model.W_pos() is None:
        raise ConfigError(
            f"scores of {runs.model.name!r} depend on rotary positions; QK paths need absolute ones"
        )
    if not own < via_layer < layer or residual.info.site != Site("resid_pre", layer):
        raise ConfigError(
            f"L{own} -> L{via_layer}H{via} -> L{layer}H{mover} with {residual.info.site.name} is not a path; "
            f"layers must rise, and the residual SAE must be of {Site('resid_pre', layer).name}"
        )
    query, q = _query_side(runs, attention, route)
    key, k = _key_side(runs, residual, layer, mover, name)
    entries = torch.einsum("nqd,nkd->nqk", q, k) / runs.model.shape.d_head**0.5
    return Scores(entries, query, key)


def _query_side(runs: Runs, sae: SAE, route: Route) -> tuple[list[int], Float[Tensor, "n part d_head"]]:
    (via_layer, via), (layer, mover) = route
    model, row, at = runs.model, runs.row(), runs.batch.at
    seen = at_s2(runs, sae)
    names, parts = _parts(seen.x.double(), seen.acts.double(), seen.back.double(), sae)
    if sae.info.site.kind != "attn_out":
        parts = parts @ model.W_O(sae.info.site.layer).double().flatten(0, 1)
        parts[:, -1] += model.b_O(sae.info.site.layer).double()
    reads = reads_of(model, via_layer)
    moved = _normed(reads, parts, _scale(runs, via_layer, "S2")) @ reads.W_V[via]
    moved = moved @ model.W_O(via_layer)[via].double()
    pattern = runs.raw[f"blocks.{via_layer}.attn.hook_pattern"][row, via, at["end"], at["S2"]].double()
    moved = pattern[:, None, None] * moved
    q = _normed(reads_of(model, layer), moved, _scale(runs, layer, "end"))
    return names, q @ _head_weights(model.W_Q(layer), model.shape.n_heads)[mover].double()


def _key_side(
    runs: Runs, sae: SAE, layer: int, mover: int, name: str
) -> tuple[list[int], Float[Tensor, "n part d_head"]]:
    x = runs.take(Site("resid_pre", layer), name)
    acts, scale = sae.encode(x), sae.scale(x)
    back = x.new_ones(len(x), 1) if scale is None else scale.back
    names, parts = _parts(x.double(), acts.double(), back.double(), sae)
    reads, model = reads_of(runs.model, layer), runs.model
    W_K = _head_weights(model.W_K(layer), model.shape.n_heads)[mover].double()
    k = _normed(reads, parts, _scale(runs, layer, name)) @ W_K
    # What does not depend on x is the rest of the key that the model has, so that the parts sum to it.
    whole = runs.raw[f"blocks.{layer}.attn.hook_k"]
    whole = _head_weights(whole.movedim(2, 0), model.shape.n_heads)[mover]
    k[:, -1] += whole[runs.row(), runs.batch.at[name]].double() - k.sum(1)
    return names, k


def _head_weights(weights: Tensor, n_heads: int) -> Tensor:
    """The first dimension brought to one entry per query head, where key-value heads are shared."""
    return weights.repeat_interleave(n_heads // weights.shape[0], 0)


def _scale(runs: Runs, layer: int, where: str) -> Float[Tensor, "n 1 1"]:
    return runs.raw[f"blocks.{layer}.ln1.hook_scale"][runs.row(), runs.batch.at[where]].double()[:, None]


def _normed(reads: Reads, parts: Tensor, scale: Tensor) -> Tensor:
    """The norm's linear part with its scale held fixed."""
    centred = parts - parts.mean(-1, keepdim=True) if reads.centred else parts
    return centred / scale * reads.weight


def explained(total: Float[Tensor, " n"], part: Float[Tensor, " n"]) -> float | None:
    """1 - Var(total - part) / Var(total) over prompts; None where the total does not vary.

    >>> explained(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.75
    """
    variance = float(total.var(correction=0))
    return None if variance == 0 else 1 - float((total - part).var(correction=0)) / variance


def pair_rows(found: Scores, rows: Tensor, n_pairs: int) -> list[dict[str, Any]]:
    """The pairs with the largest mean |entry| over some prompts; ties go to the lower query, then key
    part."""
    entries = found.entries[rows.to(found.entries.device)]
    size, mean = entries.abs().mean(0).flatten(), entries.mean(0).flatten()
    order = torch.argsort(-size, stable=True)[:n_pairs].tolist()
    width = len(found.key)
    return [
        {
            "rank": rank, "feature": found.query[at // width], "key_feature": found.key[at % width],
            "mean": float(mean[at]), "mean_abs": float(size[at]),
        }
        for rank, at in enumerate(order)
    ]  # fmt: skip


def explained_row(found: Scores, rows: Tensor, n_pairs: int = 8) -> dict[str, Any]:
    """How much of the score's variance the strongest feature pairs explain, and every entry with an error
    term.

    Decoder biases and constants are left out of the score, as in the seed.
    """
    entries = found.entries[rows.to(found.entries.device)]
    query = [i for i, name in enumerate(found.query) if name != BIAS]
    key = [i for i, name in enumerate(found.key) if name != BIAS]
    own = entries[:, query][:, :, key]
    features, errors = own.clone(), torch.zeros_like(own)
    errors[:, -1], errors[:, :, -1] = own[:, -1], own[:, :, -1]
    features -= errors
    strongest = torch.argsort(-features.abs().mean(0).flatten(), stable=True)[:n_pairs]
    total, pairs = own.sum((1, 2)), features.flatten(1)[:, strongest].sum(1)
    return {
        "n": len(entries), "score": float(entries.sum((1, 2)).mean()), "score_features": float(total.mean()),
        "n_pairs": len(strongest), "pairs_explain": explained(total, pairs),
        "errors_explain": explained(total, errors.sum((1, 2))),
    }  # fmt: skip
