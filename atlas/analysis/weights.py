"""What an SAE's weights alone say about a feature: shares of heads, norms, where it writes."""

from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from atlas.lm.load import LanguageModel
from atlas.sae.model import SAE
from atlas.sites import STREAM_KINDS

Columns = dict[str, Any]


def lists(rows: np.ndarray) -> pa.ListArray:
    """A matrix as a column of lists, one for each row.

    >>> lists(np.array([[1, 2], [3, 4]])).to_pylist()
    [[1, 2], [3, 4]]
    """
    n, width = rows.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1) * width, pa.int32()), pa.array(rows.ravel()))


def has_heads(sae: SAE) -> bool:
    """Whether the SAE's input is the z of a whole layer, whose slices are its heads'."""
    return sae.info.site.kind == "z" and sae.info.site.head is None


def decoder_share(W_dec: Float[Tensor, "d_sae d_in"], n_heads: int) -> Float[Tensor, "d_sae n_heads"]:
    """How much of a feature does each head write? ||W_dec[f, h]|| over the sum of these norms.

    Source: seed 001, "decoder weight attribution by head" (row B1).

    >>> import torch
    >>> decoder_share(torch.tensor([[3.0, 4.0, 0.0, 5.0]]), n_heads=2).tolist()
    [[0.5, 0.5]]
    """
    norms = W_dec.double().reshape(len(W_dec), n_heads, -1).norm(dim=2)
    return norms / norms.sum(1, keepdim=True).clamp_min(1e-30)


def weight_statistics(sae: SAE) -> Columns:
    """Norms of encoder and decoder direction, the cosine between them, and the encoder's bias, as used.

    As used: with a gated SAE's exp(r_mag), and with the decoder's norm where the SAE rescales by it.
    """
    W_enc, W_dec = sae.encoder_directions.double().T, sae.decoder_directions.double()
    encoder_norm, decoder_norm = W_enc.norm(dim=1), W_dec.norm(dim=1)
    norms = sae.W_dec.double().norm(dim=1)
    cosine = (W_enc * W_dec).sum(1) / (encoder_norm * decoder_norm).clamp_min(1e-30)
    return {
        "encoder_norm": encoder_norm.cpu().numpy(),
        "decoder_norm": decoder_norm.cpu().numpy(),
        "encoder_decoder_cosine": cosine.cpu().numpy(),
        "bias": (sae.b_enc.double() * (norms if sae.info.rescale_acts_by_decoder_norm else 1)).cpu().numpy(),
    }


def attribution_directions(sae: SAE) -> Float[Tensor, "d_in d_sae"]:
    """W so that the pre-activation is (x W) / size + ``sae.bias_term``, size the token's own (1 where none).

    A LayerNorm's mean is taken out of the directions instead of the token: (x - mean(x)) . w equals
    x . (w - mean(w)), which splits over the heads of x.
    """
    W = sae.encoder_directions
    return W - W.mean(0) if sae.info.normalize_activations == "layer_norm" else W


def residual_directions(model: LanguageModel, sae: SAE) -> Float[Tensor, "d_sae d_model"] | None:
    """What one unit of each feature writes into the residual stream; None where a site does not (q, k).

    z and v go through W_O of their heads (v as if attended to in full); sites in the stream are already
    there.
    """
    site = sae.info.site
    if site.kind in STREAM_KINDS:
        return sae.decoder_directions
    if site.kind in ("q", "k"):
        return None
    W_O = model.W_O(site.layer)
    return sae.decoder_directions @ (W_O.flatten(0, 1) if site.head is None else W_O[site.head])
