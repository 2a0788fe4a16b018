"""One layer's attention computed again from the residual stream that enters it, without the layers before.

    q, k, v = W_Q, W_K, W_V applied to LayerNorm(resid_pre)
    pattern[h, i, j] = softmax over j <= i of q[i, h] . k[j, h] / sqrt(d_head)
    z[i, h] = sum over j of pattern[h, i, j] v[j, h]

These are the model's own LayerNorm and projections, and the operations that the bridge applies after them, so
the numbers are those of a whole pass bit for bit. Whether they are is tried (``replays``): a model that
rotates its queries, biases its scores or caps them says no.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.lm.hooks import capture
from atlas.lm.load import LanguageModel
from atlas.lm.runtime import in_lanes
from atlas.sites import Site


class QKV(NamedTuple):
    """Queries, keys and values of one layer's heads."""

    q: Float[Tensor, "blocks pos heads d_head"]
    k: Float[Tensor, "blocks pos heads d_head"]
    v: Float[Tensor, "blocks pos heads d_head"]

    def at(self, blocks: slice, heads: list[int] | None = None) -> "QKV":
        """Some blocks, of all heads or some."""
        parts = [part[blocks] if heads is None else part[blocks][:, :, heads] for part in self]
        return QKV(*parts)


@torch.no_grad()
def project(model: LanguageModel, layer: int, resid_pre: Float[Tensor, "blocks pos d_model"]) -> QKV:
    """What a layer's heads see of the residual stream before it."""
    block, d_head = model.bridge.blocks[layer], model.shape.d_head
    x = block.ln1(resid_pre)
    parts = [linear(x) for linear in (block.attn.q, block.attn.k, block.attn.v)]
    return QKV(*(part.reshape(*part.shape[:2], -1, d_head) for part in parts))


@torch.no_grad()
def attend(
    heads: QKV,
) -> tuple[Float[Tensor, "blocks heads query key"], Float[Tensor, "blocks pos heads d_head"]]:
    """Pattern and z.

    >>> one = torch.zeros(1, 2, 1, 1)
    >>> pattern, z = attend(QKV(one, one, torch.tensor([2.0, 4.0]).reshape(1, 2, 1, 1)))
    >>> pattern[0, 0].tolist(), z.flatten().tolist()
    ([[1.0, 0.0], [0.5, 0.5]], [2.0, 3.0])
    """
    q, k, v = (part.transpose(1, 2).contiguous() for part in heads)
    scores = q @ k.transpose(2, 3)
    lowest = torch.finfo(scores.dtype).min
    later = torch.full(scores.shape[2:], lowest, dtype=scores.dtype, device=scores.device).triu_(1)
    pattern = torch.softmax(torch.add(later, scores, alpha=q.shape[3] ** -0.5, out=scores), dim=3)
    return pattern, (pattern @ v).transpose(1, 2)


@lru_cache(maxsize=1)
def replays(model: LanguageModel, blocks: int, context: int) -> bool:
    """Whether ``project`` and ``attend`` give what a whole pass gives, in every bit, tried on tokens.

    In the first, a middle and the last layer; of a batch like the real ones and of a short one, a part of
    their blocks at a time, of all heads and of one, and in one thread against all: sizes of a product and
    threads may decide in which order it is added up.
    """
    n = model.shape.n_layers
    tokens = torch.arange(blocks * context, device=model.device).reshape(blocks, context)
    batches = [tokens % model.shape.d_vocab, tokens[:1] % model.shape.d_vocab]
    try:
        return all(_same(model, layer, batch) for layer in {0, n // 2, n - 1} for batch in batches)
    except (AttributeError, RuntimeError, TypeError, ValueError, LookupError):
        return False


def _same(model: LanguageModel, layer: int, tokens: Int[Tensor, "blocks pos"]) -> bool:
    resid_pre, z = Site("resid_pre", layer), Site("z", layer)
    pattern, v = (f"blocks.{layer}.attn.hook_{what}" for what in ("pattern", "v"))
    seen, raw = capture(model, tokens, [resid_pre, z], [pattern, v])
    last, every = model.shape.n_heads - 1, list(range(model.shape.n_heads))
    whole_z = seen[z].reshape(*tokens.shape, len(every), model.shape.d_head)

    def same(part: tuple[slice, list[int]]) -> bool:
        blocks, some = part
        heads = project(model, layer, seen[resid_pre]).at(blocks, some)
        found, found_z = attend(heads)
        pairs = ((heads.v, raw[v]), (found_z, whole_z))
        return torch.equal(found, raw[pattern][blocks][:, some]) and all(
            torch.equal(one, other[blocks][:, :, some]) for one, other in pairs
        )

    parts = [(slice(0, 8), every), (slice(1, 3), every), (slice(0, 8), [last])]
    return all(in_lanes(same, parts, model.device))
