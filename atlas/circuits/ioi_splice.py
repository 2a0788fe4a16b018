"""Do SAEs keep what a model needs for IOI? Each spliced in, and groups of layers one after another.

Source: seed 004, rows E1 and E2. The comparison is with attn_out of the same layers replaced by its mean over
ABC prompts (same template and position).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from atlas.circuits.ioi_prompts import Words
from atlas.circuits.ioi_runs import Runs, abc_means, always, kl_at_end, logit_difference, mean_of
from atlas.circuits.splice import run_spliced
from atlas.sae.model import SAE
from atlas.sites import Site

GROUPS = {
    "duplicate token": (0, 3),
    "previous token": (2, 4),
    "induction": (5, 6),
    "S-inhibition": (7, 8),
    "name mover": (9, 10, 11),
}
"""Layers of GPT-2 small's head classes in this task; the groups that are spliced together by default."""


def splice_rows(
    runs: Runs, words: Words, saes: Mapping[int, SAE], groups: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """Rows of ``ioi_splice``: each SAE alone, then each group whose layers all have one; by order and all."""
    parts: dict[str, tuple[int, ...]] = {sae.info.name: (layer,) for layer, sae in sorted(saes.items())}
    parts |= {name: tuple(layers) for name, layers in groups.items() if set(layers) <= set(saes)}
    means = abc_means(runs, words, [Site("attn_out", layer) for layer in sorted(saes)])
    out = []
    for name, layers in parts.items():
        with torch.no_grad():
            spliced, _ = run_spliced(runs.model, runs.batch.tokens, [saes[n] for n in layers], error=False)
        ablated = runs.changed({site: always(means[site]) for site in (Site("attn_out", n) for n in layers)})
        for order, rows in runs.batch.rows.items():
            out.append({
                "part": name, "layers": list(layers), "prompts": order, "n": len(rows),
                "logit_diff_clean": mean_of(runs.clean, rows),
                "logit_diff_spliced": mean_of(logit_difference(spliced, runs.batch), rows),
                "logit_diff_mean": mean_of(logit_difference(ablated, runs.batch), rows),
                "kl_spliced": mean_of(kl_at_end(runs.logits, spliced, runs.batch), rows),
                "kl_mean": mean_of(kl_at_end(runs.logits, ablated, runs.batch), rows),
            })  # fmt: skip
    return out
