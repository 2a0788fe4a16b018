"""Rows of the training log: losses and rates, histograms of feature density, watched features."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from atlas.sae.bank import BankLoss

LOWEST, WIDTH, BINS = -7.0, 0.25, 28
Rows = list[dict[str, Any]]


def density_histogram(rates: Float[Tensor, " d_sae"]) -> list[tuple[int, float | None, int]]:
    """(bin, lower edge, features) of log10(firing rate); bin -1 for features that never fired.

    Bins are 0.25 wide from 1e-7; rarer features count in the first, bins without a feature are left out.

    >>> density_histogram(torch.tensor([0.0, 0.011, 0.012, 1.0]))
    [(-1, None, 1), (20, -2.0, 2), (27, -0.25, 1)]
    """
    logs = rates.double().cpu().log10()
    place = ((logs - LOWEST) / WIDTH).floor().clamp(0, BINS - 1)
    place[rates.cpu() == 0] = -1
    counts = torch.bincount(place.long() + 1, minlength=BINS + 1).tolist()
    edges = [None, *(LOWEST + WIDTH * b for b in range(BINS))]
    return [(b - 1, low, n) for b, (low, n) in enumerate(zip(edges, counts, strict=True)) if n]


def log_rows(
    names: Sequence[str],
    loss: BankLoss,
    x: Float[Tensor, "n_saes batch d_in"],
    dead_fraction: Float[Tensor, " n_saes"],
    common: dict[str, Any],
) -> Rows:
    """Rows of ``training_log``: one per SAE, with ``common`` columns (step, tokens, lr, ...)."""
    variance = (x - x.mean(1, keepdim=True)).square().sum(2).mean(1).clamp_min(1e-12)
    columns = {
        "loss": loss.total,
        "mse_loss": loss.mse,
        "sparsity_loss": loss.sparsity,
        "aux_loss": loss.aux,
        "objective_loss": loss.objective,
        "l0": loss.firings.sum(1) / x.shape[1],
        "variance_explained": 1 - loss.mse / variance,
        "dead_fraction": dead_fraction,
    }
    values = {name: column.tolist() for name, column in columns.items()}
    return [
        {"sae": name, **common, **{key: column[i] for key, column in values.items()}}
        for i, name in enumerate(names)
    ]


def density_rows(names: Sequence[str], step: int, rates: Float[Tensor, "n_saes d_sae"]) -> Rows:
    """Rows of ``training_density``."""
    return [
        {"sae": name, "step": step, "low": low, "bin": b, "n": n}
        for name, mine in zip(names, rates, strict=True)
        for b, low, n in density_histogram(mine)
    ]


def watched_rows(
    names: Sequence[str], step: int, watch: Sequence[int], peak: Float[Tensor, "n_saes watched"]
) -> Rows:
    """Rows of ``training_watched``."""
    return [
        {"sae": name, "step": step, "feature": feature, "max_activation": value}
        for name, mine in zip(names, peak.tolist(), strict=True)
        for feature, value in zip(watch, mine, strict=True)
    ]
