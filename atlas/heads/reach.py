"""How far back, and how evenly, does a head look?

Question
    Where does attention go when it goes nowhere in particular (BOS), how many sources share it, and how far
    away are they?

Formula
    Let ``A[b, h, i, j]`` be the attention from destination i to source j. Each score is the mean over all
    (block b, destination i >= 1), with BOS kept as a source and nothing renormalised::

        first_token    A[i, 0]
        self_attention A[i, i]
        entropy        - sum_j A[i, j] log A[i, j]                             nats
        distance       sum_j A[i, j] (i - j)                                   tokens
        distance_std   sqrt(mean of sum_j A[i, j] (i - j)^2  -  distance^2)    tokens
        reach          mean of i - j weighted by A[i, j] over sources j >= 1   tokens

    ``reach`` leaves BOS out: heads rest there, at whatever distance the destination happens to be.

Source
    Vig & Belinkov 2019, "Analyzing the Structure of Attention in a Transformer Language Model" (entropy and
    mean distance by head); Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks"
    (attention to the first token).

Axes: batch, head, query (destination i), key (source j).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from atlas.heads.scores import HeadScore, HeadScores, PooledScore

SCORES = ("first_token", "self_attention", "entropy", "distance", "distance_std", "reach")
Pattern = Float[Tensor, "batch head query key"]


def first_token_score(pattern: Pattern) -> PooledScore:
    """Return the attention to position 0.

    >>> first_token_score(torch.tensor([[[[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.5, 0.25]]]])).mean().tolist()
    [0.375]
    """
    return _pooled(pattern[:, :, 1:, 0])


def self_attention_score(pattern: Pattern) -> PooledScore:
    """Return the attention of each position to itself.

    >>> self_attention_score(torch.tensor([[[[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.5, 0.25]]]])).mean().tolist()
    [0.375]
    """
    return _pooled(pattern.diagonal(0, 2, 3)[..., 1:])


def entropy_score(pattern: Pattern) -> PooledScore:
    """Return the entropy of the sources of each destination, in nats; 0 log 0 is 0.

    >>> entropy_score(torch.tensor([[[[1, 0], [0.5, 0.5]]]])).mean().round(decimals=4).tolist()
    [0.6931]
    """
    late = pattern[:, :, 1:]
    return _pooled(-torch.special.xlogy(late, late).sum(3))


def distance_score(pattern: Pattern, power: int = 1) -> PooledScore:
    """Return the distance to the source (to a power), weighted by attention.

    Position 1 looks one back; position 2 half two back and half at itself.

    >>> distance_score(torch.tensor([[[[1, 0, 0], [1, 0, 0], [0.5, 0, 0.5]]]])).mean().tolist()
    [1.0]
    """
    return _pooled(torch.einsum("bhqk,qk->bhq", pattern[:, :, 1:], _back(pattern, power)[1:]))


def reach_score(pattern: Pattern) -> tuple[PooledScore, PooledScore]:
    """Return the distance weighted by attention with BOS left out, and that attention; divide the sums.

    Position 2 gives BOS 0.5, position 1 0.25 (one back) and itself 0.25: half a token back on average.

    >>> far, weight = reach_score(torch.tensor([[[[1, 0, 0], [1, 0, 0], [0.5, 0.25, 0.25]]]]))
    >>> (far.sum / weight.sum).tolist()
    [0.5]
    """
    late = pattern[:, :, 1:, 1:]
    far = torch.einsum("bhqk,qk->bhq", late, _back(pattern, 1)[1:, 1:])
    return _pooled(far), _pooled(late.sum(3))


def update_reach(scores: HeadScores, layer: int, pattern: Pattern) -> None:
    """Add a layer's patterns on text to the sums that these scores are made from."""
    far, weight = reach_score(pattern)
    for name, part in {
        "first_token": first_token_score(pattern), "self_attention": self_attention_score(pattern),
        "entropy": entropy_score(pattern), "distance": distance_score(pattern),
        "square": distance_score(pattern, 2), "far": far, "weight": weight,
    }.items():  # fmt: skip
        scores.add(name, layer, part)


def reach_rows(scores: HeadScores) -> list[HeadScore]:
    """Return a row per head and score; no reach of a head that looks at nothing but BOS.

    >>> scores = HeadScores(n_layers=1, n_heads=1)
    >>> update_reach(scores, 0, torch.tensor([[[[1, 0, 0], [1, 0, 0], [0.5, 0, 0.5]]]]))
    >>> [round(row.value, 3) for row in reach_rows(scores)]
    [0.75, 0.25, 0.347, 1.0, 0.707, 0.0]
    """
    if "far" not in scores.sums:
        return []
    table = {name: scores.table(name) for name in (*SCORES[:4], "square", "far", "weight")}
    table["distance_std"] = (table["square"] - table["distance"].square()).clamp(min=0).sqrt()
    table["reach"] = table["far"] / table["weight"]
    return [
        HeadScore(
            layer, head, name, float(table[name][layer, head]), int(scores.counts["far"][layer]), "text"
        )
        for name in SCORES
        for layer in range(scores.n_layers)
        for head in range(scores.n_heads)
        if bool(table[name][layer, head].isfinite())
    ]


def _back(pattern: Pattern, power: int) -> Float[Tensor, "query key"]:
    """How many tokens before the query each key lies."""
    position = torch.arange(pattern.shape[2], device=pattern.device, dtype=pattern.dtype)
    return (position[:, None] - position).clamp(min=0) ** power


def _pooled(value: Float[Tensor, "batch head destination"]) -> PooledScore:
    return PooledScore(value.double().sum(dim=(0, 2)), value.shape[0] * value.shape[2])
