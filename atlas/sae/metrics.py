"""Quality of a reconstruction, each number defined once, as sums that can be added up over batches.

x: activations at the evaluated tokens, x^: their reconstructions, f: feature activations.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


@dataclass
class ReconstructionSums:
    """Float64 sums from which l0, mse, variance explained, cosine and L2 ratio follow."""

    d_in: int
    d_sae: int
    n: int = 0
    n_active: int = 0
    error: float = 0.0
    norm: float = 0.0
    cosine: float = 0.0
    l2_ratio: float = 0.0
    total: Float[Tensor, " d_in"] = field(init=False)
    fired: Bool[Tensor, " d_sae"] = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.d_in, dtype=torch.float64)
        self.fired = torch.zeros(self.d_sae, dtype=torch.bool)

    def update(
        self,
        x: Float[Tensor, "n d_in"],
        x_hat: Float[Tensor, "n d_in"],
        active_features: Int[Tensor, " n_active"],
    ) -> None:
        """Add a batch: activations, reconstructions, and the feature number of every activation > 0."""
        x, x_hat = x.double(), x_hat.double()
        norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
        self.n += len(x)
        self.n_active += len(active_features)
        self.error += (x - x_hat).square().sum().item()
        self.norm += x.square().sum().item()
        self.cosine += ((x * x_hat).sum(1) / (norm * norm_hat).clamp_min(1e-12)).sum().item()
        self.l2_ratio += (norm_hat / norm.clamp_min(1e-12)).sum().item()
        self.total += x.sum(0).cpu()
        self.fired[torch.unique(active_features).cpu()] = True

    def merge(self, other: "ReconstructionSums") -> "ReconstructionSums":
        """The sums of both samples together."""
        merged = ReconstructionSums(self.d_in, self.d_sae)
        for name in ("n", "n_active", "error", "norm", "cosine", "l2_ratio", "total"):
            setattr(merged, name, getattr(self, name) + getattr(other, name))
        merged.fired = self.fired | other.fired
        return merged

    def metrics(self) -> dict[str, float]:
        """The metrics of everything added so far.

        >>> sums = ReconstructionSums(d_in=2, d_sae=4)
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> sums.update(x, x / 2, torch.tensor([0, 3]))
        >>> m = sums.metrics()
        >>> m["l0"], m["mse"], m["variance_explained"], m["cosine"], m["l2_ratio"], m["alive"], m["dead"]
        (1.0, 0.125, 0.75, 1.0, 0.5, 2, 2)
        """
        n = max(self.n, 1)
        variance = self.norm - self.total.square().sum().item() / n
        alive = int(self.fired.sum())
        return {
            "l0": self.n_active / n,
            "mse": self.error / n / self.d_in,
            "variance_explained": 1 - self.error / variance if variance > 0 else math.nan,
            "cosine": self.cosine / n,
            "l2_ratio": self.l2_ratio / n,
            "alive": alive,
            "dead": self.d_sae - alive,
        }


def predictions(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch next d_vocab"]:
    """Log probabilities of the ``pos - 1`` predictions of each row that have a next token to meet."""
    return logits[:, :-1].float().log_softmax(-1)


def cross_entropy_sum(log_p: Float[Tensor, "batch next d_vocab"], tokens: Int[Tensor, "batch pos"]) -> float:
    """Summed next-token cross-entropy in nats of ``predictions``.

    >>> log_p = torch.tensor([[[0.25, 0.75]]]).log()
    >>> round(cross_entropy_sum(log_p, torch.tensor([[1, 0]])), 6), round(math.log(4), 6)
    (1.386294, 1.386294)
    """
    return -log_p.gather(2, tokens[:, 1:, None]).double().sum().item()


def kl_sum(log_p: Float[Tensor, "batch next d_vocab"], log_q: Float[Tensor, "batch next d_vocab"]) -> float:
    """Summed KL(p || q) in nats over ``predictions``.

    >>> p, q = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    >>> round(kl_sum(p, q), 6), round(0.5 * math.log(2) + 0.5 * math.log(2 / 3), 6)
    (0.143841, 0.143841)
    """
    terms = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    return terms.sum(-1).double().sum().item()


def recovered(clean: float, spliced: float, ablated: float) -> float:
    """(ce_ablated - ce_spliced) / (ce_ablated - ce_clean): 1 is perfect, 0 no better than ablation.

    >>> recovered(clean=2.0, spliced=2.5, ablated=4.0)
    0.75
    """
    gap = ablated - clean
    return (ablated - spliced) / gap if gap != 0 else math.nan
