"""Induction with rebuilt queries and keys, and without one feature of the keys.

A block is BOS and the same random tokens twice. The model can only know the second half by looking back at
the token that came after the earlier copy of the current one. With one token X put at a fixed place in both
halves, the key feature "I follow X" should matter at that place alone.

Variants of a pass (row numbers of the mission; f is the feature, p the place after the first X):

    original     the model as it is
    rebuilt      q and k from their features                                                        (A12)
    ablated      rebuilt, with f taken out of every key of the first half                           (A14)
    only         rebuilt, with every feature but f taken out of the key at p                        (A13, A15)
    scaled       the same, and f times ``scale``                                                    (A15)
    subtracted   the model as it is, with f's part taken out of every key of the first half

Source: seed 000, "Induction Heads".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.circuits.edits import Edit, ablate, scale
from atlas.circuits.pairs.pair import Pair, entering, run
from atlas.lm.load import LanguageModel
from atlas.lm.repeats import random_repeats
from atlas.progress import Progress

PLACE = 0.6
"""Where X is put, as a fraction of the half: place 30 of 50, as in the seed."""
VARIANTS = ("original", "rebuilt", "ablated", "only", "scaled", "subtracted")
_MOST_LOGITS = 2**23


class Target(NamedTuple):
    """A key feature that follows one token."""

    feature: int
    token: int


@dataclass
class Curve:
    """Of each predicted position: the log-probability of the right token (nats), its probability, attention.

    ``attention`` is that of the head, from the token before to the place that holds what comes next; NaN
    where nothing is repeated yet. Means over blocks, float64; position 0 (BOS) is not predicted.
    """

    log_prob: Float[Tensor, " pos"]
    probability: Float[Tensor, " pos"]
    attention: Float[Tensor, " pos"]
    n: int = 0


@dataclass
class _Sums:
    log_prob: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)

    def curve(self) -> Curve:
        log_prob, attention = torch.cat(self.log_prob), torch.cat(self.attention)
        return Curve(log_prob.mean(0), log_prob.exp().mean(0), attention.mean(0), len(log_prob))


def place_of(half: int) -> int:
    """The position of the first X in blocks of this half.

    >>> place_of(50)
    30
    """
    return max(1, round(PLACE * half))


def blocks_with(
    token: int | None, n: int, half: int, d_vocab: int, *, bos: int, seed: int
) -> Int[Tensor, "n pos"]:
    """BOS and ``half`` random tokens twice, with a token at ``place_of(half)`` of both and nowhere else.

    >>> blocks_with(7, 1, 5, 9, bos=0, seed=1)[0, [3, 8]].tolist()
    [7, 7]
    """
    exclude = () if token is None else (token,)
    blocks = random_repeats(n, half, d_vocab, bos=bos, seed=seed, exclude=exclude)
    if token is not None:
        blocks[:, [place_of(half), place_of(half) + half]] = token
    return blocks


def edits_of(variant: str, pair: Pair, target: Target, half: int, factor: float) -> list[Edit]:
    """What a variant changes in the keys' features."""
    if variant in ("original", "rebuilt"):
        return []
    name, first_half = pair.k.info.name, range(1, half + 1)
    if variant in ("ablated", "subtracted"):
        return [ablate(name, target.feature, list(first_half))]
    after = place_of(half) + 1
    others = [feature for feature in range(pair.k.d_sae) if feature != target.feature]
    kept = [ablate(name, others, after)]
    return [*kept, scale(name, target.feature, factor, after)] if variant == "scaled" else kept


def right_log_probs(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """Log-probability of every token where it is predicted, float64; NaN at position 0."""
    found = torch.full(tokens.shape, torch.nan, dtype=torch.float64, device=tokens.device)
    log_probs = logits[:, :-1].double().log_softmax(-1)
    found[:, 1:] = log_probs.gather(2, tokens[:, 1:, None])[..., 0]
    return found


def copied_attention(pattern: Float[Tensor, "batch query key"], half: int) -> Float[Tensor, "batch pos"]:
    """Attention to what comes next, by predicted position: pattern[t - 1, t - half]; NaN up to half + 1.

    >>> pattern = torch.eye(5).roll(-1, dims=1)[None]  # every query looks one back
    >>> copied_attention(pattern, 2).tolist()
    [[nan, nan, nan, nan, 1.0]]
    """
    found = torch.full(pattern.shape[:2], torch.nan, dtype=torch.float64, device=pattern.device)
    at = torch.arange(half + 2, pattern.shape[1], device=pattern.device)
    found[:, at] = pattern[:, at - 1, at - half].double()
    return found


class Repeats:
    """Runs a pair's variants on blocks of repeated random tokens."""

    def __init__(self, model: LanguageModel, pair: Pair, *, bos: int, n: int, half: int, seed: int) -> None:
        self.model, self.pair, self.bos, self.n, self.seed = model, pair, bos, n, seed
        self.half = min(half, (model.shape.n_ctx - 1) // 2)
        self.batch = max(1, _MOST_LOGITS // ((2 * self.half + 1) * model.shape.d_vocab))

    def variants(self, target: Target | None, factor: float = 1.0) -> dict[str, Curve]:
        """The curve of every variant, on blocks with the target's token; without a target, of two."""
        edits = {variant: [] for variant in VARIANTS[:2]} if target is None else {
            variant: edits_of(variant, self.pair, target, self.half, factor) for variant in VARIANTS
        }  # fmt: skip
        sums = {variant: _Sums() for variant in edits}
        for some in torch.split(self.blocks(target), self.batch):
            # All variants share what comes before the head's layer.
            resume = entering(self.model, some, self.pair)
            for variant, changes in edits.items():
                seen = run(
                    self.model, some, self.pair, changes,
                    rebuilt=variant != "original", error=variant == "subtracted", resume=resume,
                )  # fmt: skip
                sums[variant].log_prob.append(right_log_probs(seen.logits, some).cpu())
                sums[variant].attention.append(copied_attention(seen.pattern, self.half).cpu())
        return {variant: found.curve() for variant, found in sums.items()}

    def blocks(self, target: Target | None) -> Int[Tensor, "n pos"]:
        """The blocks of a target."""
        token = None if target is None else target.token
        blocks = blocks_with(token, self.n, self.half, self.model.shape.d_vocab, bos=self.bos, seed=self.seed)
        return blocks.to(self.model.device)

    def curves(
        self, targets: Sequence[Target], factor: float, progress: Progress
    ) -> dict[tuple[int, str], Curve]:
        """Every variant of every target, by (target, variant); -1: blocks without a token put in."""
        asked: list[Target | None] = [None, *targets]
        found = {}
        for number, target in enumerate(asked, -1):
            for variant, curve in self.variants(target, factor).items():
                found[number, variant] = curve
            progress.update(number + 2, len(asked), "random tokens twice")
        return found
