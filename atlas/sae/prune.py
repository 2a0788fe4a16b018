"""Which features are worth keeping? Seed 003's three criteria, measured, counted and applied.

    weak    its strongest activation is below a limit
    short   its decoder row is shorter than a limit
    rare    it fires on a smaller share of tokens than a limit

The criteria overlap; a feature is pruned where any of them holds (mission row D2). A pruned feature keeps
its number and its decoder row but can never fire again: its column of W_enc is 0 and its bias -1, which is
below every threshold in every architecture and in every file format. (In a TopK SAE the place that it took
among the k goes to the next feature.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from atlas.configs import PruneConfig
from atlas.progress import Progress
from atlas.sae.harvest import Source, Stream
from atlas.sae.model import SAE, Active
from atlas.sae.normalise import normalise

WEAK, SHORT, RARE = 1, 2, 4
ROWS = 4096
"""Tokens whose pre-activations are held at once."""


@dataclass
class Firing:
    """Mergeable sums over tokens: each feature's strongest activation and firings, and the inputs' size."""

    max_activation: Float[Tensor, " d_sae"]
    n_active: Int[Tensor, " d_sae"]
    n_tokens: int = 0
    square: float = 0.0
    """Summed squared norm of the inputs as the SAE reads them (normalised, where it normalises)."""

    @classmethod
    def empty(cls, d_sae: int, device: torch.device | None = None) -> "Firing":
        """No token yet."""
        zeros = torch.zeros(d_sae, device=device)
        return cls(zeros, zeros.to(torch.int64))

    def update(self, x: Float[Tensor, "n d_in"], active: Active) -> None:
        """Add tokens: the inputs as the SAE reads them, and which features fire on them.

        >>> firing = Firing.empty(3)
        >>> where = torch.tensor([0, 0, 1]), torch.tensor([0, 2, 2])
        >>> firing.update(torch.ones(2, 4), Active(*where, torch.tensor([0.5, 2.0, 3.0])))
        >>> firing.max_activation.tolist(), firing.n_active.tolist(), firing.input_scale(4)
        ([0.5, 0.0, 3.0], [1, 0, 2], 1.0)
        """
        self.max_activation.scatter_reduce_(0, active.feature, active.value, "amax")
        self.n_active += torch.bincount(active.feature, minlength=len(self.n_active))
        self.n_tokens += len(x)
        self.square += x.double().square().sum().item()

    def merge(self, other: "Firing") -> "Firing":
        """The sums of both texts together."""
        return Firing(
            torch.maximum(self.max_activation, other.max_activation),
            self.n_active + other.n_active,
            self.n_tokens + other.n_tokens,
            self.square + other.square,
        )

    def input_scale(self, d_in: int) -> float:
        """sqrt(mean ||x||^2 / d_in): how much larger the inputs are than where limits of activation hold."""
        return (self.square / max(self.n_tokens, 1) / d_in) ** 0.5


@torch.no_grad()
def measure_firing(
    source: Source, stream: Stream, saes: Sequence[SAE], tokens: int, progress: Progress
) -> list[Firing]:
    """How strongly and how often does each feature fire in the training text?

    Reads the training blocks in the stream's order, each once, without position 0: ``tokens`` tokens, or
    all that there are.
    """
    per_block = stream.store.meta.context - 1
    wanted = min(tokens, stream.n_train * per_block)
    found = [Firing.empty(sae.d_sae, sae.W_enc.device) for sae in saes]
    for number in range(-(-wanted // (stream.chunk_blocks * per_block))):
        chunk = source.chunk(number)
        for sae, firing in zip(saes, found, strict=True):
            rows = chunk.rows(sae.info.site)[: wanted - number * stream.chunk_blocks * per_block]
            for x in torch.split(rows, ROWS):
                firing.update(normalise(x, sae.scale(x)), sae.active(x))
        progress.update(found[0].n_tokens if found else wanted, wanted, "measuring features")
    return found


def pruned_bits(
    decoder_norm: Float[Tensor, " d_sae"], firing: Firing, d_in: int, config: PruneConfig
) -> UInt8[Tensor, " d_sae"]:
    """Why is each feature pruned? The sum of 1 (weak), 2 (short) and 4 (rare); 0 for features that stay.

    The limit of weak holds at inputs of mean squared norm d_in, the scale at which SAEs are trained, so it
    is multiplied by sqrt(mean ||x||^2 / d_in). Source: seed 003, feature pruning (row D2).

    >>> firing = Firing(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([5, 5, 0]), n_tokens=10, square=120.0)
    >>> norms = torch.tensor([1.0, 1.0, 0.5])  # and inputs twice as large, so that the limit is 2
    >>> pruned_bits(norms, firing, 3, PruneConfig()).tolist()
    [0, 1, 7]
    """
    rate = firing.n_active.double() / max(firing.n_tokens, 1)
    limit = config.max_activation * firing.input_scale(d_in)
    found = (
        WEAK * (firing.max_activation.double() < limit)
        + SHORT * (decoder_norm.double() < config.decoder_norm)
        + RARE * (rate < config.firing_rate)
    )
    return found.to(torch.uint8)


def pruned(sae: SAE, bits: UInt8[Tensor, " d_sae"]) -> SAE:
    """The SAE in which features with any bit set never fire; the others are as they were (see above)."""
    gone = bits.to(sae.W_enc.device) > 0
    changed = {"W_enc": sae.W_enc.masked_fill(gone, 0.0), "b_enc": sae.b_enc.masked_fill(gone, -1.0)}
    if sae.b_gate is not None:
        changed["b_gate"] = sae.b_gate.masked_fill(gone, -1.0)
    if sae.threshold is not None:
        changed["threshold"] = torch.where(gone, sae.threshold.clamp_min(0.0), sae.threshold)
    return sae.with_tensors(changed)


def pruning_row(sae: str, bits: np.ndarray, n_tokens: int, config: PruneConfig) -> dict[str, Any]:
    """One row of ``pruning``: how many features meet each criterion, and each set of them.

    >>> row = pruning_row("s", np.array([0, 1, 7, 5, 2], np.uint8), 100, PruneConfig())
    >>> [row[f"n_{name}"] for name in ("weak", "short", "rare", "weak_rare", "all_three", "pruned")]
    [3, 2, 2, 2, 1, 4]
    """

    def having(mask: int) -> int:
        return int(((bits & mask) == mask).sum())

    return {
        "sae": sae,
        "n_features": len(bits),
        "n_weak": having(WEAK),
        "n_short": having(SHORT),
        "n_rare": having(RARE),
        "n_weak_short": having(WEAK | SHORT),
        "n_weak_rare": having(WEAK | RARE),
        "n_short_rare": having(SHORT | RARE),
        "n_all_three": having(WEAK | SHORT | RARE),
        "n_pruned": int((bits > 0).sum()),
        "max_activation_limit": config.max_activation,
        "decoder_norm_limit": config.decoder_norm,
        "firing_rate_limit": config.firing_rate,
        "n_tokens": n_tokens,
    }
