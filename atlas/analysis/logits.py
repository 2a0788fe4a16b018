"""Which tokens does a feature promote and suppress, and through which of its heads?

A feature's effects are its decoder direction, through W_O of its heads, times the unembedding with the
final LayerNorm's weight folded in, centred over d_model and over the vocabulary; no bias, no division by
the LayerNorm's scale. q and k write nothing into the residual stream and have no effects.

The matrix of effects, features by vocabulary, is made and forgotten a few features at a time. Ties go to
the smaller token. Nothing is asked of torch that differs between a CPU and CUDA but the rounding.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.analysis.weights import Columns, decoder_share, has_heads, lists, residual_directions
from atlas.errors import SAEError
from atlas.lm.load import LanguageModel
from atlas.lm.runtime import in_lanes
from atlas.sae.model import SAE
from atlas.sae.topk import top_k

N_LOGITS, N_SHOWN_HEADS, N_HEAD_LOGITS, N_BINS = 20, 2, 5, 40
MOMENTS = ("logit_mean", "logit_std", "logit_skew", "logit_kurtosis")
_ENTRIES = 1 << 21
_VOCAB_CHUNK, _SHARE_CHUNK = 4096, 1024


class LogitEffects(NamedTuple):
    """Columns of the tables about logit effects, by the table's name, and columns of ``features``."""

    tables: dict[str, Columns]
    moments: Columns


class _Seen(NamedTuple):
    """What is kept of a few features' effects: ends [n, 2, k], moments [n, 4], counts of bins [n, 40]."""

    tokens: Int[Tensor, "n 2 k"]
    values: Float[Tensor, "n 2 k"]
    moments: Float[Tensor, "n 4"]
    counts: Int[Tensor, "n n_bins"]


def logit_effects(model: LanguageModel, sae: SAE) -> LogitEffects:
    """Tables logit_effects, logit_histogram and (z of a whole layer) head_logit_effects, and moments.

    Moments are population moments over the vocabulary; kurtosis is 3 for a normal. Skewness and kurtosis
    are NaN where all effects are equal, and all four for q and k, which have no tables.
    """
    directions = residual_directions(model, sae)
    if directions is None:
        return LogitEffects({}, {name: np.full(sae.d_sae, np.nan) for name in MOMENTS})
    unembed, covariance = model.logit_directions(), logit_covariance(model)
    mean = unembed.mean(1, dtype=torch.float64)
    chunks = torch.split(directions, _rows_at_once(unembed))
    parts = in_lanes(lambda chunk: _look(chunk, unembed, mean, covariance), chunks, unembed.device)
    seen = _Seen(*(torch.cat(found) for found in zip(*parts, strict=True)))
    feature, moments = np.arange(sae.d_sae), seen.moments.cpu().numpy()
    histogram = {
        "feature": feature,
        "low": seen.values[:, 0, 0].cpu().numpy(),
        "high": seen.values[:, 1, 0].cpu().numpy(),
        "n": lists(seen.counts.int().cpu().numpy()),
    }
    tables = {
        "logit_effects": _ranked(seen.tokens, seen.values, feature=feature),
        "logit_histogram": histogram,
    }
    if has_heads(sae):
        tables["head_logit_effects"] = _head_effects(model, sae, unembed)
    return LogitEffects(tables, {name: moments[:, i] for i, name in enumerate(MOMENTS)})


def logit_share(model: LanguageModel, sae: SAE) -> np.ndarray:
    """Through which heads does a feature act on the logits? Cov(l_h, l) / Var(l), [d_sae, n_heads].

    l are the feature's logit effects over the vocabulary and l_h the part that goes through head h, so in
    closed form (r_h C r) / (r C r) with r_h = W_dec[f, h] W_O[h], r their sum and C the covariance of the
    unembedding over the vocabulary (``logit_covariance``), all in float64. It sums to 1 over heads and may
    leave [0, 1]; NaN where l does not vary. It is to direct logit attribution by head (seed 001) what FVE
    is to DFA.

    Raises:
        SAEError: the SAE is not on z of a whole layer.
    """
    if not has_heads(sae):
        raise SAEError(f"SAE {sae.info.name!r} has no heads to share; it must be on z of a whole layer")
    W_O, covariance = model.W_O(sae.info.site.layer).double(), logit_covariance(model)
    slices = sae.decoder_directions.reshape(sae.d_sae, len(W_O), -1)
    shares = [
        covariance_share(torch.einsum("nhi,him->nhm", part.double(), W_O), covariance)
        for part in torch.split(slices, _SHARE_CHUNK)
    ]
    return torch.cat(shares).cpu().numpy()


def covariance_share(
    parts: Float[Tensor, "n n_parts d"], covariance: Float[Tensor, "d d"]
) -> Float[Tensor, "n n_parts"]:
    """Shares of directions r_h in the variance along their sum r: (r_h C r) / (r C r); NaN without any.

    >>> covariance_share(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    tensor([[0.7500, 0.2500]])
    """
    along = (parts * (parts.sum(1) @ covariance)[:, None]).sum(2)
    variance = along.sum(1, keepdim=True)
    return torch.where(variance > 0, along / variance, torch.nan)


@lru_cache(maxsize=1)
def logit_covariance(model: LanguageModel) -> Float[Tensor, "d_model d_model"]:
    """U U^T / d_vocab in float64, U the centred unembedding: r^T C s is the covariance of two effects.

    Rows of U have mean zero over the vocabulary, so no mean is subtracted. Kept for the next SAE of the
    model: of GPT-2 it costs two seconds.
    """
    unembed = model.logit_directions()
    d_model, d_vocab = unembed.shape
    total = unembed.new_zeros((d_model, d_model), dtype=torch.float64)
    for part in torch.split(unembed, _VOCAB_CHUNK, dim=1):
        wide = part.double()
        total += wide @ wide.T
    return total / d_vocab


def histogram(effects: Float[Tensor, "n width"], n_bins: int = N_BINS) -> Int[Tensor, "n n_bins"]:
    """How many entries of each row lie in each of ``n_bins`` equal bins from its smallest to its largest?

    A bin holds its lower edge and not its upper one; the last holds both. A row of equal entries has all
    of them in the first bin.

    >>> histogram(torch.tensor([[0.0, 1.0, 3.5, 4.0], [7.0, 7.0, 7.0, 7.0]]), 4).tolist()
    [[1, 1, 0, 2], [4, 0, 0, 0]]
    """
    low, high = effects.aminmax(dim=1, keepdim=True)
    per_unit = torch.where(high > low, n_bins / (high - low), 0)
    place = (effects - low).mul_(per_unit).int().clamp_(max=n_bins - 1)
    place += n_bins * torch.arange(len(effects), dtype=torch.int32, device=effects.device)[:, None]
    return place.flatten().bincount(minlength=len(effects) * n_bins).reshape(len(effects), n_bins)


def _look(
    directions: Float[Tensor, "n d_model"],
    unembed: Float[Tensor, "d_model d_vocab"],
    mean: Float[Tensor, " d_model"],
    covariance: Float[Tensor, "d_model d_model"],
) -> _Seen:
    """A few features' effects, made and forgotten.

    Mean and variance follow in float64 from the unembedding's. The effects themselves are divided by their
    standard deviation first, so that the powers of a weak feature's are no smaller than another's.
    """
    wide = directions.double()
    std = ((wide @ covariance) * wide).sum(1).clamp_min(0).sqrt()
    varies = std > 0
    unit = torch.where(varies, std, 1)
    effects = (wide / unit[:, None]).float() @ unembed
    tokens, values = _ends(effects, N_LOGITS)
    counts = histogram(effects)
    squares = effects.square()
    skew = effects.mul_(squares).mean(1, dtype=torch.float64)
    kurtosis = squares.square_().mean(1, dtype=torch.float64)
    higher = torch.where(varies[:, None], torch.stack([skew, kurtosis], 1), torch.nan)
    moments = torch.cat([torch.stack([wide @ mean, std], 1), higher], 1)
    return _Seen(tokens, values * unit[:, None, None], moments, counts)


def _ends(effects: Float[Tensor, "n width"], k: int) -> tuple[Int[Tensor, "n 2 k"], Float[Tensor, "n 2 k"]]:
    """Each row's ``k`` smallest entries, smallest first, and its ``k`` largest, largest first."""
    tokens, values = [], []
    for signed in (-effects, effects):
        found, index = top_k(signed, min(k, effects.shape[1]))
        # top_k gives the order of the index, which a stable sort keeps where values tie.
        index = index.gather(1, found.sort(dim=1, descending=True, stable=True).indices)
        tokens.append(index)
        values.append(effects.gather(1, index))
    return torch.stack(tokens, 1), torch.stack(values, 1)


def _head_effects(model: LanguageModel, sae: SAE, unembed: Float[Tensor, "d_model d_vocab"]) -> Columns:
    """Table ``head_logit_effects``: the ends of the effects of a feature's two most important slices.

    The two heads of largest decoder share, ties to the lower head, in the order of their numbers.
    """
    W_O = model.W_O(sae.info.site.layer)
    share = decoder_share(sae.decoder_directions, len(W_O))
    heads = top_k(share, min(N_SHOWN_HEADS, len(W_O)))[1]
    slices = sae.decoder_directions.reshape(sae.d_sae, len(W_O), -1)
    k = min(N_HEAD_LOGITS, unembed.shape[1])
    tokens = heads.new_zeros((*heads.shape, 2, k))
    values = slices.new_zeros((*heads.shape, 2, k))

    def look(head: int) -> None:
        through = W_O[head] @ unembed
        found = (heads == head).nonzero(as_tuple=True)
        for feature, slot in zip(*(torch.split(t, _rows_at_once(through)) for t in found), strict=True):
            tokens[feature, slot], values[feature, slot] = _ends(slices[feature, head] @ through, k)

    in_lanes(look, range(len(W_O)), unembed.device)
    keys = {"feature": np.arange(sae.d_sae).repeat(heads.shape[1]), "head": heads.flatten().cpu().numpy()}
    return _ranked(tokens.flatten(0, 1), values.flatten(0, 1), **keys)


def _ranked(tokens: Int[Tensor, "n 2 k"], values: Float[Tensor, "n 2 k"], **keys: np.ndarray) -> Columns:
    """Rows for both signs and every rank, behind keys that have an entry for each of the n."""
    n, _, k = tokens.shape
    return {name: key.repeat(2 * k) for name, key in keys.items()} | {
        "sign": np.tile(np.repeat([-1, 1], k), n),
        "rank": np.tile(np.arange(k), 2 * n),
        "token": tokens.flatten().cpu().numpy(),
        "value": values.flatten().cpu().numpy(),
    }


def _rows_at_once(wide: Float[Tensor, "d width"]) -> int:
    return max(1, _ENTRIES // wide.shape[1])
