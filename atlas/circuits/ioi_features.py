"""Which features of an attention SAE does IOI need at S2, and through whose values do they act?

Each feature that fires at S2 in any prompt is set to zero there, and so is the error term; the drop of the
logit difference is its effect. Where it does not fire nothing changes, so only the other prompts are run.
Path effect: the same change reaches nothing but the values that receiver heads read at S2 (their LayerNorm
is run again, all else there stays), and goes on from there. Source: seed 004, rows E3 to E5; path patching:
Wang et al. 2022.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.circuits.ioi_runs import Runs
from atlas.circuits.parts import Wide, widen
from atlas.circuits.passes import reads_of
from atlas.errors import ConfigError
from atlas.progress import Progress
from atlas.sae.model import SAE
from atlas.sites import Site

ERROR = -1
"""Stands for the error term where a feature's number is expected."""


class AtS2(NamedTuple):
    """What an SAE makes of S2 in every prompt."""

    sae: SAE
    wide: Wide
    x: Float[Tensor, "n d_in"]
    acts: Float[Tensor, "n d_sae"]
    size: Float[Tensor, "n 1"]
    back: Float[Tensor, "n 1"]
    error: Float[Tensor, "n d_in"]

    def part(self, feature: int) -> Float[Tensor, "n d_in"]:
        """What the feature (or the error term) adds to the site, by prompt."""
        if feature == ERROR:
            return self.error
        return self.back * self.acts[:, feature, None] * self.sae.decoder_directions[feature]


@torch.no_grad()
def at_s2(runs: Runs, sae: SAE) -> AtS2:
    """Encode the site at S2."""
    x = runs.take(sae.info.site, "S2")
    acts, scale = sae.encode(x), sae.scale(x)
    one = x.new_ones(len(x), 1)
    size, back = (one, one) if scale is None else (scale.size, scale.back)
    return AtS2(sae, widen(runs.model, sae), x, acts, size, back, x - sae.decode(acts, scale))


def ablation_effect(runs: Runs, seen: AtS2, feature: int) -> Float[Tensor, " n"]:
    """The drop of the logit difference where the feature is taken out at S2; 0 where it does not fire."""
    part = seen.part(feature)
    rows = part.abs().sum(1).nonzero()[:, 0]
    effect = torch.zeros_like(runs.clean)
    if len(rows):
        site = seen.sae.info.site
        edit = runs.put("S2", (seen.x - part)[rows], rows)
        effect[rows] = runs.clean[rows] - runs.difference({site: edit}, rows)
    return effect


def written(runs: Runs, sae: SAE, part: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_model"]:
    """What a change of the SAE's site changes in the residual stream."""
    site = sae.info.site
    return part if site.kind == "attn_out" else part @ runs.model.W_O(site.layer).flatten(0, 1)


@torch.no_grad()
def path_effect(
    runs: Runs, seen: AtS2, feature: int, receivers: Sequence[tuple[int, int]]
) -> Float[Tensor, " n"]:
    """The drop of the logit difference where only the receivers' values at S2 miss the part; as above."""
    layer = seen.sae.info.site.layer
    early = [f"L{n}H{h}" for n, h in receivers if n <= layer]
    if early:
        raise ConfigError(f"receiver {early[0]} cannot read layer {layer}; allowed: heads of later layers")
    part = seen.part(feature)
    rows = part.abs().sum(1).nonzero()[:, 0]
    effect = torch.zeros_like(runs.clean)
    if not len(rows):
        return effect
    missing, at, edits = written(runs, seen.sae, part[rows]), runs.batch.at["S2"][rows], {}
    for n, head in receivers:
        reads = reads_of(runs.model, n)
        x = runs.take(Site("resid_pre", n), "S2")[rows]
        change = (_normed(x - missing, runs, n) - _normed(x, runs, n)).double() @ reads.W_V[head]
        v = runs.raw[f"blocks.{n}.attn.hook_v"][rows, at, head]
        edits[Site("v", n, head)] = runs.put("S2", v + change.to(v.dtype), rows)
    effect[rows] = runs.clean[rows] - runs.difference(edits, rows)
    return effect


def _normed(x: Float[Tensor, "n d_model"], runs: Runs, layer: int) -> Float[Tensor, "n d_model"]:
    """The norm before a layer's attention, as the model has it."""
    out: Tensor = runs.model.bridge.blocks[layer].ln1(x[:, None])
    return out[:, 0]


def by_head(runs: Runs, seen: AtS2, feature: int) -> Float[Tensor, "n heads"]:
    """The feature's pre-activation at S2 by head (DFA, all sources together), of each prompt."""
    if seen.wide.heads is None:
        raise ConfigError(f"SAE {seen.sae.info.name!r} does not read heads; allowed: z, attn_out")
    z = runs.take(Site("z", seen.sae.info.site.layer), "S2").double()
    W = seen.wide.heads[feature].double()
    return torch.einsum("nhd,hd->nh", z.reshape(len(z), *W.shape), W) / seen.size.double()


def feature_rows(
    runs: Runs, sae: SAE, receivers: Sequence[tuple[int, int]], progress: Progress, most: int = 10_000
) -> list[dict[str, Any]]:
    """Rows of ``ioi_features``: the error term and every feature live at S2, for ABBA, BABA and all.

    Features come in their order; with ``most``, those of the largest mean activation alone.
    """
    seen = at_s2(runs, sae)
    total = seen.acts.sum(0)
    live = [f for f in torch.argsort(-total, stable=True)[:most].tolist() if total[f] > 0]
    later = [head for head in receivers if head[0] > sae.info.site.layer]
    out: list[dict[str, Any]] = []
    for done, feature in enumerate([ERROR, *sorted(live)]):
        effect = ablation_effect(runs, seen, feature)
        path = path_effect(runs, seen, feature, later) if later else None
        heads = None if feature == ERROR else by_head(runs, seen, feature)
        for order, rows in runs.batch.rows.items():
            out.append(_row(seen, feature, order, rows, effect, path, heads))
        progress.update(done + 1, len(live) + 1, sae.info.name)
    return out


def _row(
    seen: AtS2,
    feature: int,
    order: str,
    rows: Int[Tensor, " m"],
    effect: Tensor,
    path: Tensor | None,
    heads: Tensor | None,
) -> dict[str, Any]:
    rows = rows.to(effect.device)
    acts = None if feature == ERROR else seen.acts[rows, feature].double()
    fires = rows if acts is None else rows[acts > 0]
    mean = heads[fires].mean(0) if heads is not None and len(fires) else None
    share = None
    if mean is not None:
        positive = mean.clamp_min(0)
        share = float(positive.max() / positive.sum().clamp_min(1e-30))
    return {
        "sae": seen.sae.info.name, "feature": feature, "prompts": order,
        "n": len(rows), "n_active": len(fires),
        "activation": None if acts is None else float(acts.mean()),
        "effect": float(effect[rows].mean()),
        "path_effect": None if path is None else float(path[rows].mean()),
        "top_head": None if mean is None else int(mean.argmax()),
        "top_head_share": share,
    }  # fmt: skip
