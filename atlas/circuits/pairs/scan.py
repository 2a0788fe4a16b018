"""Which features make a head look from one token at another?

With q^ and k^ rebuilt from features, q^ = b_q + sum_i a_i d_i and k^ = b_k + sum_j c_j e_j, the score of one
query and one source splits exactly:

    score = q^ . k^ / sqrt(d_head) = (b_q . b_k + sum_i a_i d_i . b_k + sum_j c_j b_q . e_j
                                      + sum_ij a_i c_j d_i . e_j) / sqrt(d_head)

so what a feature does to the score is known without running the model again. a_i d_i is what a feature adds
to the rebuilt vector, in the units of the activations (an SAE that normalises: times the token's size).
Source: seed 000, "Searching for features that impact attention scores" and "Name Mover Head" (rows A10, A17).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.circuits.pairs.pair import Pair, Run
from atlas.sae.model import SAE

N_PAIRS = 20


class Parts(NamedTuple):
    """A rebuilt vector taken apart: the features that fire, their activations and what each adds."""

    feature: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    added: Float[Tensor, "n d_head"]
    rest: Float[Tensor, " d_head"]
    """What is left without any feature: the decoder's bias."""


def parts(sae: SAE, acts: Float[Tensor, " d_sae"], x: Float[Tensor, " d_head"]) -> Parts:
    """Take one rebuilt vector apart, in float64."""
    feature = acts.nonzero()[:, 0]
    scale = sae.scale(x[None])
    rest = sae.decode(torch.zeros_like(acts)[None], scale)[0].double()
    size = 1.0 if scale is None else scale.back.double().reshape(())
    added = acts[feature].double()[:, None] * sae.decoder_directions[feature].double() * size
    return Parts(feature, acts[feature], added, rest)


class Scan(NamedTuple):
    """The score of one query and one source, and what each feature and each pair of features does to it."""

    score: float
    q: Parts
    k: Parts
    without_q: Float[Tensor, " n"]
    """The score without each feature of the query."""
    without_k: Float[Tensor, " m"]
    products: Float[Tensor, "n m"]
    """d_i . e_j of decoder rows as they are, unweighted by activations and not divided by sqrt(d_head)."""
    weighted: Float[Tensor, "n m"]
    """What each pair of features adds to the score."""


def scan(pair: Pair, seen: Run, query: int, source: int, row: int = 0) -> Scan:
    """Take the score of one (query, source) apart, from a pass with the pair spliced in and nothing edited.

    Removing a feature removes all its products: ``score - without_q[i] = added_i . k^ / sqrt(d_head)``.
    """
    if seen.splice is None:
        raise ValueError("a pass of the model as it is shows no features; run it rebuilt")
    one, other = (
        parts(sae, seen.splice.acts[sae.info.name][row, at], seen.splice.x[sae.info.name][row, at])
        for sae, at in ((pair.q, query), (pair.k, source))
    )
    root = math.sqrt(pair.q.d_in)
    q_hat, k_hat = one.rest + one.added.sum(0), other.rest + other.added.sum(0)
    score = q_hat @ k_hat / root
    rows = pair.q.decoder_directions[one.feature].double(), pair.k.decoder_directions[other.feature].double()
    return Scan(
        float(score), one, other, score - one.added @ k_hat / root, score - other.added @ q_hat / root,
        rows[0] @ rows[1].T, one.added @ other.added.T / root,
    )  # fmt: skip


def strongest_pairs(found: Scan, n: int = N_PAIRS) -> list[tuple[int, int]]:
    """Places of the feature pairs that add most to the score, largest first; ties go to lower features."""
    flat = found.weighted.flatten()
    order = torch.argsort(flat, descending=True, stable=True)[:n].tolist()
    return [divmod(place, found.weighted.shape[1]) for place in order]
