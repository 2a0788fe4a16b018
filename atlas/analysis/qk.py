"""What do features of queries look for in features of keys, and in positions?

A head's attention scores are dot products of queries and keys, so the dot product of two features'
decoder rows says how much a unit of both adds to the score (before the division by sqrt(d_head)).
Products are unscaled and without biases.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atlas.analysis.weights import Columns, lists
from atlas.errors import SAEError
from atlas.lm.load import LanguageModel
from atlas.sae.model import SAE
from atlas.sae.topk import top_k
from atlas.sites import partner

N_PARTNERS = 10
MOST_PRODUCTS = 4_194_304
_ENTRIES = 1 << 22


def qk_partners(sae: SAE, other: SAE) -> Columns:
    """Table ``qk_partners``: which features of the head's other side does each feature like best?

    The 10 largest dot products of decoder rows, largest first; ties go to the smaller feature of the other
    side. ``sae`` may be either side. Source: seed 000, "Non-Positional Features" (row A6).

    Raises:
        SAEError: the two are not the query and the key side of one head.
    """
    _check(sae, other)
    k, theirs = min(N_PARTNERS, other.d_sae), other.decoder_directions
    chunks = torch.split(sae.decoder_directions, max(1, _ENTRIES // other.d_sae))
    found = [_best(chunk @ theirs.T, k) for chunk in chunks]
    product, partners = (torch.cat(column).flatten().cpu().numpy() for column in zip(*found, strict=True))
    return {
        "feature": np.arange(sae.d_sae).repeat(k),
        "rank": np.tile(np.arange(k), sae.d_sae),
        "other": partners,
        "product": product,
    }


def _best(products: Float[Tensor, "n width"], k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row, largest first, and their columns."""
    found, column = top_k(products, k)
    found, order = found.sort(dim=1, descending=True, stable=True)
    return found, column.gather(1, order)


def qk_products(q_sae: SAE, k_sae: SAE) -> Columns:
    """Table ``qk_products``: the dot product of every query feature with every key feature, a list each.

    No rows where there are more than 4,194,304 products. Source: seed 000, "Dot Product of Features sorted
    by Position" (row A7).

    Raises:
        SAEError: the two are not the query and the key side of one head, in this order.
    """
    if q_sae.info.site.kind != "q":
        raise SAEError(f"SAE {q_sae.info.name!r} is not on q; the rows of qk_products are query features")
    _check(q_sae, k_sae)
    n = q_sae.d_sae if q_sae.d_sae * k_sae.d_sae <= MOST_PRODUCTS else 0
    products = q_sae.decoder_directions[:n] @ k_sae.decoder_directions.T
    return {"feature": np.arange(n), "products": lists(products.cpu().numpy())}


def position_products(model: LanguageModel, sae: SAE, context: int) -> Columns:
    """Table ``position_products``: does a feature of q or k point along the embeddings of positions?

    The decoder row . (W_pos W_Q[head]) (of a k SAE, W_K) at positions 0 to ``context`` - 1, and the same with
    the mean over these positions taken out of W_pos. The embeddings go into the head as they are: no
    LayerNorm is applied, though one stands between the two in the model (folded weights hold its scale, raw
    ones do not). {} for a model without absolute positions. Source: seed 000, "Dot Product of Features with
    Positional Embeddings" (row A8).

    Raises:
        SAEError: the SAE is not on q or k, or the model has fewer positions.
    """
    site = sae.info.site
    if site.kind not in ("q", "k"):
        raise SAEError(f"SAE {sae.info.name!r} is on {site.kind}; products with positions are for q and k")
    W_pos = model.W_pos()
    if W_pos is None:
        return {}
    if not 1 <= context <= len(W_pos):
        raise SAEError(f"context {context} is not allowed; {model.name} has positions for 1 to {len(W_pos)}")
    W = (model.W_Q if site.kind == "q" else model.W_K)(site.layer)[site.head]
    embedded = W_pos[:context].double() @ W.double()
    products = sae.decoder_directions.double() @ embedded.T
    # The same as to centre W_pos: the product is linear in it.
    centred = products - products.mean(1, keepdim=True)
    return {
        "feature": np.arange(sae.d_sae),
        "products": lists(products.float().cpu().numpy()),
        "centred": lists(centred.float().cpu().numpy()),
    }


def _check(sae: SAE, other: SAE) -> None:
    site = sae.info.site
    if site.kind not in ("q", "k") or other.info.site != partner(site):
        raise SAEError(
            f"SAEs {sae.info.name!r} and {other.info.name!r} are on {site.name} and {other.info.site.name}; "
            "they must be the q and the k of one head"
        )
