"""What carries the positional signal of IOI? Attention outputs at S2 taken from prompts that differ in
known ways.

attn_out of some layers at S2 is replaced by what other prompts have at their S2: with other names, filler in
front and filler between (only the order of the names about " and" is kept), or with " and" replaced by
another word. With D the mean logit difference, kept = (D_noised - D_zero) / (D_clean - D_zero), where
attn_out of these layers is zero at S2, or at every position. Source: seed 004, rows E6 and E7.
"""

from collections.abc import Sequence
from typing import Any

import torch

from atlas.circuits.ioi_prompts import Prompt, Words, disguised, rejoined, tokenised
from atlas.circuits.ioi_runs import Runs, mean_of
from atlas.lm.hooks import capture
from atlas.sites import Site

CONJUNCTIONS = ("alongside", "besides", "plus", "with", "without", "including")


def kept(noised: float, zero: float, clean: float) -> float | None:
    """The share of what zero ablation takes that is still there; None where it takes nothing.

    >>> kept(3.0, 1.0, 5.0), kept(1.0, 2.0, 2.0)
    (0.5, None)
    """
    return None if clean == zero else (noised - zero) / (clean - zero)


@torch.no_grad()
def noise_rows(runs: Runs, words: Words, layers: Sequence[int], seed: int = 1) -> list[dict[str, Any]]:
    """Rows of ``ioi_noise``: each experiment, for ABBA, BABA and all prompts."""
    prompts = runs.batch.prompts
    others = {"names and filler": disguised(prompts, words, seed)}
    others |= {f"and -> {word}": rejoined(prompts, word) for word in CONJUNCTIONS}
    sites = [Site("attn_out", layer) for layer in layers]
    nothing = torch.zeros_like(runs.x[sites[0]][:, 0])
    zero = {
        "position": runs.difference(dict.fromkeys(sites, runs.put("S2", nothing))),
        "all": runs.difference(dict.fromkeys(sites, torch.zeros_like)),
    }
    out = []
    for name, other in others.items():
        noised = _noised(runs, other, sites)
        for order, rows in runs.batch.rows.items():
            clean, changed = mean_of(runs.clean, rows), mean_of(noised, rows)
            row = {
                "experiment": name, "layers": list(layers), "prompts": order, "n": len(rows),
                "logit_diff_clean": clean, "logit_diff_noised": changed,
            }  # fmt: skip
            for baseline, values in zero.items():
                row[f"logit_diff_zero_{baseline}"] = mean_of(values, rows)
                row[f"kept_{baseline}"] = kept(changed, mean_of(values, rows), clean)
            out.append(row)
    return out


def _noised(runs: Runs, other: Sequence[Prompt], sites: Sequence[Site]) -> torch.Tensor:
    """The logit difference with the sites at S2 taken from the other prompts' S2."""
    batch = tokenised(runs.model, other)
    found, row = capture(runs.model, batch.tokens, sites)[0], runs.row()
    return runs.difference({site: runs.put("S2", x[row, batch.at["S2"]]) for site, x in found.items()})
