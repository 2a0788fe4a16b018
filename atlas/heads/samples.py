"""Where heads look, in whole: statistics of every attention pattern, and a few patterns kept for each head.

A pass over the text holds one layer's pattern of a few blocks at a time. Of each head it keeps the blocks of
largest attention and a draw from all, sparsely: the strongest sources of each destination. The draw keeps
the smallest of a seeded hash of (layer, head, block) and ties go to the smaller block, so neither depends on
how the blocks were batched.
"""

from bisect import insort
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.heads.scores import after_earlier_copies

FINE = 1000
"""Bins of a block's largest attention, from which intervals are made."""


class Kept(NamedTuple):
    """One pattern of a head, sparsely: ``values`` at ``indices`` = destination * length + source."""

    block: int
    max_attention: float
    indices: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


class Sampling(NamedTuple):
    """How many patterns are kept of each head, and how much of each."""

    n_top: int = 10
    n_drawn: int = 40
    sources: int = 8
    threshold: float = 0.005
    seed: int = 0


@dataclass
class HeadSamples:
    """Of one head: the blocks of largest attention (strongest first) and a draw, each with its order."""

    top: list[tuple[tuple[float, int], Kept]] = field(default_factory=list)
    drawn: list[tuple[int, Kept]] = field(default_factory=list)


@dataclass
class PatternStatistics:
    """Sums over all (block, destination >= 1) of every head, float64 [layer, head], and what was counted."""

    n_layers: int
    n_heads: int
    sums: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    n_destinations: int = 0
    n_copies: int = 0
    max_attention: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.max_attention = np.zeros((self.n_layers, self.n_heads, FINE), np.int64)

    def add(self, name: str, layer: int, value: Float[Tensor, " head"]) -> None:
        """Add to a sum of a layer's heads."""
        if name not in self.sums:
            self.sums[name] = np.zeros((self.n_layers, self.n_heads))
        self.sums[name][layer] += value.cpu().double().numpy()

    def means(self) -> dict[str, npt.NDArray[np.float64]]:
        """Every statistic, [layer, head]; NaN where nothing was counted.

        self_attention and previous_token: mean attention to the destination itself, to the token before.
        entropy: of the sources of a destination, in nats. distance: mean of destination - source weighted
        by attention; distance_variance: its variance. induction: mean attention to the tokens after earlier
        copies of the destination's token, over destinations that have one.
        """
        found = {}
        for name, total in self.sums.items():
            n = self.n_copies if name == "induction" else self.n_destinations
            found[name] = total / n if n else np.full_like(total, np.nan)
        if "distance_square" in found:
            found["distance_variance"] = found.pop("distance_square") - found["distance"] ** 2
        return found


class PatternPass:
    """Takes the patterns of all layers for one batch of blocks after another.

    >>> work = PatternPass(n_layers=1, n_heads=1)
    >>> work.begin(torch.tensor([[0, 5, 6]]), [0])
    >>> work.update(0, torch.tensor([[[[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.5, 0.25]]]]))
    >>> means = work.statistics.means()
    >>> means["previous_token"].tolist(), means["self_attention"].tolist(), means["distance"].tolist()
    ([[0.5]], [[0.375]], [[0.75]])
    >>> [(kept.block, kept.max_attention, kept.indices.tolist()) for _, kept in work.heads[0][0].top]
    [(0, 0.5, [0, 3, 4, 6, 7, 8])]
    """

    def __init__(self, n_layers: int, n_heads: int, sampling: Sampling | None = None) -> None:
        self.sampling = sampling or Sampling()
        self.statistics = PatternStatistics(n_layers, n_heads)
        self.heads = [[HeadSamples() for _ in range(n_heads)] for _ in range(n_layers)]
        self._blocks: list[int] = []
        self._copies = torch.zeros(0, dtype=torch.bool)

    def begin(self, tokens: Int[Tensor, "batch position"], blocks: list[int]) -> None:
        """The tokens of the batch whose patterns come next, and the numbers of its blocks."""
        self._blocks = blocks
        after = after_earlier_copies(tokens)
        self._copies = after
        self.statistics.n_destinations += tokens.shape[0] * (tokens.shape[1] - 1)
        self.statistics.n_copies += int(after.any(dim=2).sum())

    def update(self, layer: int, pattern: Float[Tensor, "batch head query key"]) -> None:
        """Take in one layer's patterns of the batch."""
        self._add_statistics(layer, pattern)
        # Position 0 is BOS, to which most heads look when they have nothing to say.
        largest = pattern[:, :, 1:, 1:].amax(dim=(2, 3)).cpu().numpy()
        bins = np.minimum((largest * FINE).astype(np.int64), FINE - 1)
        for row, block in enumerate(self._blocks):
            for head, value in enumerate(largest[row].tolist()):
                self.statistics.max_attention[layer, head, bins[row, head]] += 1
                self._keep(layer, head, block, value, pattern[row, head])

    def _add_statistics(self, layer: int, pattern: Float[Tensor, "batch head query key"]) -> None:
        late = pattern[:, :, 1:]
        summed = pattern.sum(0, dtype=torch.float64)
        position = torch.arange(pattern.shape[2], device=pattern.device, dtype=torch.float64)
        distance = (position[:, None] - position[None, :]).abs()
        sums = {
            "self_attention": summed.diagonal(0, 1, 2)[:, 1:].sum(1),
            "previous_token": summed.diagonal(-1, 1, 2).sum(1),
            "entropy": -torch.special.xlogy(late, late).sum((0, 2, 3), dtype=torch.float64),
            "distance": (summed * distance)[:, 1:].sum((1, 2)),
            "distance_square": (summed * distance.square())[:, 1:].sum((1, 2)),
            "induction": (pattern * self._copies[:, None].to(pattern)).sum((0, 2, 3), dtype=torch.float64),
        }
        for name, value in sums.items():
            self.statistics.add(name, layer, value)

    def _keep(
        self, layer: int, head: int, block: int, largest: float, pattern: Float[Tensor, "query key"]
    ) -> None:
        """Keep the block for this head if it is among the largest or among the drawn."""
        mine, sampling = self.heads[layer][head], self.sampling
        strength, draw = (-largest, block), _hash(sampling.seed, layer, head, block)
        is_top = len(mine.top) < sampling.n_top or strength < mine.top[-1][0]
        is_drawn = len(mine.drawn) < sampling.n_drawn or draw < mine.drawn[-1][0]
        if not (is_top or is_drawn):
            return
        kept = Kept(block, largest, *sparse(pattern, sampling.sources, sampling.threshold))
        if is_top:
            insort(mine.top, (strength, kept), key=lambda item: item[0])
            del mine.top[sampling.n_top :]
        if is_drawn:
            insort(mine.drawn, (draw, kept), key=lambda item: item[0])
            del mine.drawn[sampling.n_drawn :]


def sparse(
    pattern: Float[Tensor, "query key"], sources: int, threshold: float
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The ``sources`` largest entries of each row that reach the threshold, in reading order.

    >>> indices, values = sparse(torch.tensor([[1, 0], [0.25, 0.75]]), sources=1, threshold=0.1)
    >>> indices.tolist(), values.tolist()
    ([0, 3], [1.0, 0.75])
    """
    length = pattern.shape[1]
    count = min(sources, length)
    least = torch.topk(pattern, count, dim=1).values[:, -1:]
    # topk leaves open which of equal entries it takes; here the first ones are.
    chosen = pattern > least
    equal = pattern == least
    chosen |= equal & (equal.cumsum(1) <= count - chosen.sum(1, keepdim=True))
    dense = pattern.cpu().numpy()
    indices = np.flatnonzero((chosen & (pattern >= threshold)).cpu().numpy())
    return indices.astype(np.int32), dense.ravel()[indices].astype(np.float32)


def _hash(*numbers: int) -> int:
    """SplitMix64 over some numbers: a fixed, well-spread function."""
    mixed = 0
    for number in numbers:
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed


def intervals(counts: npt.NDArray[np.int64], n_intervals: int) -> npt.NDArray[np.float64]:
    """Edges that cut what was counted into intervals of about equal count: n_intervals - 1 bin edges.

    >>> intervals(np.array([5, 5, 5, 5]), 2).tolist()
    [0.5]
    """
    below = np.concatenate([[0], counts.cumsum()])
    wanted = counts.sum() * np.arange(1, n_intervals) / n_intervals
    edges: npt.NDArray[np.float64] = np.searchsorted(below, wanted, "left") / len(counts)
    return edges
