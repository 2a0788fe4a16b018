"""Does a head look at the previous token, at an earlier copy, or at what followed it?

Question
    Three patterns of attention have names: a *previous-token head* looks one position back; a
    *duplicate-token head* looks at the earlier occurrence of the token it stands on; an *induction head*
    looks at the token that came after that occurrence, and so can predict that it comes again.

Formula
    Let ``A[b, h, i, j]`` be the attention of head h in block b from destination i to source j, and
    ``S(i)`` the sources in question. The score of a head is the mean over all destinations that have such
    a source, pooled over blocks, of the attention that goes there::

        score[h] = sum over (b, i) with S(i) nonempty of sum over j in S(i) of A[b, h, i, j]
                   / number of (b, i) with S(i) nonempty

    ==================  ========================================  ====================================
    score               tokens                                    S(i)
    ==================  ========================================  ====================================
    ``previous_token``  any text                                  {i - 1}, for i >= 1
    ``duplicate``       T random tokens twice, second copy        {i - T}
    ``induction``       T random tokens twice, second copy        {i - T + 1}
    ``*_text``          any text                                  earlier copies j of token i; for
                                                                  induction j + 1, where j + 1 < i
    ==================  ========================================  ====================================

    Position 0 (BOS) counts as a source like any other, nothing is renormalised, and so every score lies
    in [0, 1] (attention to all the earlier copies together is at most 1).

Source
    Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022,
    "In-context Learning and Induction Heads" (prefix matching on repeated random tokens); Wang et al.
    2022, "Interpretability in the Wild" (duplicate-token heads).

Axes: batch, head, query (destination i), key (source j), position; layer.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atlas.errors import ConfigError, one_of

TEXT_SCORES = ("previous_token", "duplicate_text", "induction_text")
REPEAT_SCORES = ("duplicate", "induction")


class PooledScore(NamedTuple):
    """Attention to the sources in question, summed over destinations: ``sum / n`` is the score."""

    sum: Float[Tensor, " head"]
    n: int

    def mean(self) -> Float[Tensor, " head"]:
        """Return the score of each head, NaN if no destination counts."""
        return self.sum / self.n if self.n else torch.full_like(self.sum, float("nan"))


# --------------------------------------------------------------------------- scores of one batch


def previous_token_score(pattern: Float[Tensor, "batch head query key"]) -> PooledScore:
    """Return the attention from each position to the one before it.

    Two positions back to back: position 1 gives position 0 three quarters, position 2 gives position 1 all.

    >>> pattern = torch.tensor([[[[1, 0, 0], [0.75, 0.25, 0], [0, 1, 0]]]])
    >>> previous_token_score(pattern).mean().round(decimals=4).tolist()
    [0.875]
    """
    _check_square(pattern)
    return _pooled(pattern.diagonal(-1, 2, 3))


def duplicate_token_score(pattern: Float[Tensor, "batch head query key"], length: int) -> PooledScore:
    """Return the attention from each token of the second copy to the same token in the first.

    BOS and two tokens twice: destinations 3 and 4 look 2 back.

    >>> pattern = torch.zeros(1, 1, 5, 5)
    >>> pattern[0, 0, 3, 1] = 0.5
    >>> duplicate_token_score(pattern, 2).mean().round(decimals=4).tolist()
    [0.25]
    """
    return _second_copy(pattern, length, back=length)


def induction_score(pattern: Float[Tensor, "batch head query key"], length: int) -> PooledScore:
    """Return the attention from each token of the second copy to what followed it in the first.

    BOS and two tokens twice: destinations 3 and 4 look 1 back (the last one at the second copy's start).

    >>> pattern = torch.zeros(1, 1, 5, 5)
    >>> pattern[0, 0, 3, 2] = 0.5
    >>> pattern[0, 0, 4, 3] = 1.0
    >>> induction_score(pattern, 2).mean().round(decimals=4).tolist()
    [0.75]
    """
    return _second_copy(pattern, length, back=length - 1)


def earlier_copies(tokens: Int[Tensor, "batch position"]) -> Bool[Tensor, "batch query key"]:
    """Return where the key is an earlier occurrence of the query's token.

    >>> earlier_copies(torch.tensor([[5, 6, 5]])).int()[0].tolist()
    [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
    """
    return (tokens[:, :, None] == tokens[:, None, :]).tril(-1)


def after_earlier_copies(tokens: Int[Tensor, "batch position"]) -> Bool[Tensor, "batch query key"]:
    """Return where the key follows an earlier occurrence of the query's token, and is not the query itself.

    >>> after_earlier_copies(torch.tensor([[5, 6, 5, 5]])).int()[0].tolist()
    [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    """
    return torch.nn.functional.pad(earlier_copies(tokens)[:, :, :-1], (1, 0)).tril(-1)


def masked_score(
    pattern: Float[Tensor, "batch head query key"], sources: Bool[Tensor, "batch query key"]
) -> PooledScore:
    """Return the attention to the marked sources, over the destinations that have one.

    >>> pattern = torch.tensor([[[[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]]])
    >>> masked_score(pattern, earlier_copies(torch.tensor([[5, 6, 5]]))).mean().round(decimals=4).tolist()
    [0.2]
    """
    _check_square(pattern)
    total = torch.einsum("bhqk,bqk->h", pattern.double(), sources.to(torch.float64))
    return PooledScore(total, int(sources.any(dim=2).sum()))


def _second_copy(pattern: Float[Tensor, "batch head query key"], length: int, back: int) -> PooledScore:
    _check_square(pattern)
    if length < 2 or pattern.shape[2] != 2 * length + 1:
        raise ConfigError(
            f"repeat length {length} with a pattern over {pattern.shape[2]} positions; "
            "allowed: at least 2, and BOS plus twice the length positions"
        )
    return _pooled(pattern.diagonal(-back, 2, 3)[..., -length:])


def _pooled(attention: Float[Tensor, "batch head destination"]) -> PooledScore:
    batch, _, destinations = attention.shape
    # float64: a mean over millions of destinations must not depend on how they were batched.
    return PooledScore(attention.double().sum(dim=(0, 2)), batch * destinations)


def _check_square(pattern: Float[Tensor, "batch head query key"]) -> None:
    if pattern.shape[2] != pattern.shape[3]:
        raise ConfigError(
            f"attention pattern of shape {tuple(pattern.shape)}; allowed: as many queries as keys"
        )


# --------------------------------------------------------------------------- all heads, many batches


class HeadScore(NamedTuple):
    """One row of ``head_scores`` (without the model's name)."""

    layer: int
    head: int
    score: str
    value: float
    n: int
    how: str


@dataclass
class HeadScores:
    """The scores of every head of a model, summed batch by batch; sums of parts can be merged.

    >>> scores = HeadScores(n_layers=1, n_heads=2)
    >>> scores.update_text(0, torch.ones(1, 2, 3, 3).tril() / torch.tensor([1, 2, 3])[:, None])
    >>> scores.table("previous_token").round(decimals=3).tolist()
    [[0.417, 0.417]]
    """

    n_layers: int
    n_heads: int
    sums: dict[str, Float[Tensor, "layer head"]] = field(default_factory=dict)
    counts: dict[str, Int[Tensor, " layer"]] = field(default_factory=dict)

    def update_text(
        self,
        layer: int,
        pattern: Float[Tensor, "batch head query key"],
        tokens: Int[Tensor, "batch position"] | None = None,
    ) -> None:
        """Add a layer's patterns on text; with its tokens also the scores that need them."""
        self.add("previous_token", layer, previous_token_score(pattern))
        if tokens is not None:
            self.add("duplicate_text", layer, masked_score(pattern, earlier_copies(tokens)))
            self.add("induction_text", layer, masked_score(pattern, after_earlier_copies(tokens)))

    def update_repeats(self, layer: int, pattern: Float[Tensor, "batch head query key"], length: int) -> None:
        """Add a layer's patterns on blocks of :func:`random_repeats`."""
        self.add("duplicate", layer, duplicate_token_score(pattern, length))
        self.add("induction", layer, induction_score(pattern, length))

    def merge(self, other: "HeadScores") -> "HeadScores":
        """Return the scores over both parts, as if one had seen everything."""
        if (self.n_layers, self.n_heads) != (other.n_layers, other.n_heads):
            raise ConfigError(
                f"head scores of {other.n_layers} x {other.n_heads} heads cannot be merged; "
                f"allowed: {self.n_layers} x {self.n_heads}"
            )
        merged = HeadScores(self.n_layers, self.n_heads)
        for part in (self, other):
            for name, total in part.sums.items():
                merged._room(name)
                merged.sums[name] += total
                merged.counts[name] += part.counts[name]
        return merged

    def table(self, score: str) -> Float[Tensor, "layer head"]:
        """Return a score for every head, NaN where nothing was counted."""
        one_of("head score", score, self.sums)
        return self.sums[score] / self.counts[score][:, None]

    def finish(self) -> list[HeadScore]:
        """Return a row per layer, head and score that has been counted."""
        return [
            HeadScore(
                layer,
                head,
                name,
                float(self.table(name)[layer, head]),
                int(self.counts[name][layer]),
                _how(name),
            )
            for name in (*TEXT_SCORES, *REPEAT_SCORES)
            if name in self.sums
            for layer in range(self.n_layers)
            for head in range(self.n_heads)
            if self.counts[name][layer] > 0
        ]

    def _room(self, name: str) -> None:
        if name not in self.sums:
            self.sums[name] = torch.zeros(self.n_layers, self.n_heads, dtype=torch.float64)
            self.counts[name] = torch.zeros(self.n_layers, dtype=torch.int64)

    def add(self, name: str, layer: int, score: PooledScore) -> None:
        """Add a layer's part of a sum under a name."""
        one_of("layer", layer, range(self.n_layers))
        if len(score.sum) != self.n_heads:
            raise ConfigError(f"attention pattern with {len(score.sum)} heads; allowed: {self.n_heads}")
        self._room(name)
        self.sums[name][layer] += score.sum.cpu().double()
        self.counts[name][layer] += score.n


def _how(score: str) -> str:
    return "random repeats" if score in REPEAT_SCORES else "text"
