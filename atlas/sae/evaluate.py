"""How good is each SAE on held-out text, as a reconstruction and inside the model?"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.corpus.tokens import TokenStore
from atlas.lm.hooks import Edit, capture, logits_with
from atlas.lm.load import LanguageModel
from atlas.progress import Progress
from atlas.sae.metrics import ReconstructionSums, cross_entropy_sum, kl_sum, recovered
from atlas.sae.model import SAE
from atlas.sites import Site

BATCH_BLOCKS = 16
SPLITS = ("eval", "eval_with_bos")


@torch.no_grad()
def evaluate(
    model: LanguageModel, saes: Sequence[SAE], store: TokenStore, blocks: int, progress: Progress
) -> list[dict[str, Any]]:
    """Rows of ``sae_metrics``: two per SAE, without and with position 0.

    The cross-entropies run over all predictions and splice every position; they are the same in both
    rows, with the mean of ce_mean taken over the tokens without position 0.
    """
    batches = [
        torch.from_numpy(store.blocks(range(i, min(i + BATCH_BLOCKS, blocks)))).to(model.device)
        for i in range(0, blocks, BATCH_BLOCKS)
    ]
    total = len(batches) * (1 + len(saes))
    sites = tuple(dict.fromkeys(sae.info.site for sae in saes))
    sums = {
        (sae.info.name, split): ReconstructionSums(sae.d_in, sae.d_sae) for sae in saes for split in SPLITS
    }
    for i, tokens in enumerate(batches):
        _reconstruct(model, saes, tokens, sites, sums)
        progress.update(i + 1, total, "reconstruction")
    names = [sae.info.name for sae in saes]
    ce = {name: dict.fromkeys(("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl"), 0.0) for name in names}
    means = {name: sums[name, "eval"].total / max(sums[name, "eval"].n, 1) for name in names}
    for i, tokens in enumerate(batches):
        clean = logits_with(model, tokens, {})
        for j, sae in enumerate(saes):
            _splice(model, sae, tokens, clean, means[sae.info.name], ce[sae.info.name])
            progress.update(len(batches) + i * len(saes) + j + 1, total, f"splicing {sae.info.site.name}")
    n = sum(t.numel() - len(t) for t in batches)
    return [
        _row(sae, split, sums[sae.info.name, split], ce[sae.info.name], n) for sae in saes for split in SPLITS
    ]


def _reconstruct(
    model: LanguageModel,
    saes: Sequence[SAE],
    tokens: Int[Tensor, "batch pos"],
    sites: Sequence[Site],
    sums: Mapping[tuple[str, str], ReconstructionSums],
) -> None:
    activations, _ = capture(model, tokens, sites)
    for sae in saes:
        whole = activations[sae.info.site]
        for split in SPLITS:
            x = (whole if split == "eval_with_bos" else whole[:, 1:]).reshape(-1, sae.d_in)
            active = sae.active(x)
            dense = x.new_zeros(len(x), sae.d_sae).index_put((active.row, active.feature), active.value)
            sums[sae.info.name, split].update(x, sae.decode(dense), active.feature)


def _splice(
    model: LanguageModel,
    sae: SAE,
    tokens: Int[Tensor, "batch pos"],
    clean: Float[Tensor, "batch pos d_vocab"],
    mean: Float[Tensor, " d_in"],
    ce: dict[str, float],
) -> None:
    mean = mean.to(model.device, torch.float32)
    edits: dict[str, Edit] = {
        "ce_spliced": sae.reconstruct,
        "ce_zero": torch.zeros_like,
        "ce_mean": lambda x: mean.expand_as(x),
    }
    ce["ce_clean"] += cross_entropy_sum(clean, tokens)
    for name, edit in edits.items():
        logits = logits_with(model, tokens, {sae.info.site: edit})
        ce[name] += cross_entropy_sum(logits, tokens)
        if name == "ce_spliced":
            ce["kl"] += kl_sum(clean, logits)


def _row(sae: SAE, split: str, sums: ReconstructionSums, ce: Mapping[str, float], n: int) -> dict[str, Any]:
    mean = {name: value / n for name, value in ce.items()}
    return {
        "sae": sae.info.name,
        "split": split,
        **sums.metrics(),
        **mean,
        "ce_recovered": recovered(mean["ce_clean"], mean["ce_spliced"], mean["ce_zero"]),
        "ce_recovered_mean": recovered(mean["ce_clean"], mean["ce_spliced"], mean["ce_mean"]),
        "n_tokens": sums.n,
    }
