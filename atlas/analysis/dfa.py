"""Direct feature attribution: which head, looking where, made a feature fire?

With the attention pattern frozen, z[position, h] = sum over sources of pattern[h, position, source] *
v[source, h], so the linear part of a z feature's pre-activation splits exactly:

    dfa[h, source] = pattern[h, position, source] * (v[source, h] . W_enc[h, f])

Summed over heads and sources this is x . W_enc[:, f], and with the bias term the pre-activation. W_enc are
the directions as used: of a gated SAE the magnitude path. An SAE that normalises its input has every
contribution divided by the token's own size, with a LayerNorm's mean taken out of W_enc[:, f].
Sources: seed 001; seed 002 (the paper), row C4.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.analysis.weights import attribution_directions
from atlas.corpus.tokens import TokenStore
from atlas.lm.hooks import capture
from atlas.lm.load import LanguageModel
from atlas.progress import Progress
from atlas.sae.model import SAE
from atlas.tables import SOURCES

MOST_SOURCES, COVERED = 32, 0.95
BATCH_BLOCKS = 8
Ints = npt.NDArray[np.int64]


class Kept(NamedTuple):
    """The kept examples of one SAE: where each one fires."""

    feature: Ints
    block: Ints
    position: Ints


class Attributions(NamedTuple):
    """DFA of each kept example: sums by head, the pre-activation from z itself, and the largest sources."""

    by_head: npt.NDArray[np.float32]
    pre_activation: npt.NDArray[np.float32]
    head: npt.NDArray[np.int16]
    source: npt.NDArray[np.int16]
    contribution: npt.NDArray[np.float32]
    n_sources: npt.NDArray[np.int16]


def contributions(
    pattern: Float[Tensor, "n_heads query key"],
    v: Float[Tensor, "key n_heads d_head"],
    W_enc: Float[Tensor, "n_heads d_head n"],
    position: Int[Tensor, " n"],
) -> Float[Tensor, "n n_heads key"]:
    """The dense DFA of n examples in one block: example i is feature column i of W_enc at position[i].

    >>> pattern = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    >>> v = torch.tensor([[[2.0]], [[4.0]]])
    >>> contributions(pattern, v, torch.tensor([[[1.0]]]), torch.tensor([1])).tolist()
    [[[0.5, 3.0]]]
    """
    per_source = W_enc.transpose(1, 2) @ v.permute(1, 2, 0)
    # Written example by example: everything that follows reads one example's heads and sources together.
    dense = per_source.new_empty(len(position), *pattern.shape[::2])
    return torch.mul(pattern[:, position].transpose(0, 1), per_source.transpose(0, 1), out=dense)


def largest(
    dense: Float[Tensor, "n n_heads key"],
) -> tuple[Int[Tensor, "n kept"], Float[Tensor, "n kept"], Int[Tensor, " n"]]:
    """Flat indices and values of the largest contributions by magnitude, and how many of them count.

    As many as reach 95 % of the absolute sum, at most 32; exact zeros never count.
    """
    flat = dense.flatten(1)
    size = flat.abs()
    found = size.topk(min(MOST_SOURCES, flat.shape[1]), dim=1)
    needed = (found.values.cumsum(1) < COVERED * size.sum(1, keepdim=True)).sum(1) + 1
    count = torch.minimum(needed, (found.values > 0).sum(1))
    return found.indices, flat.gather(1, found.indices), count


class DFAPass:
    """Looks again at the kept examples of z SAEs; each block with an example is read once."""

    def __init__(self, model: LanguageModel, saes: Sequence[SAE], kept: Sequence[Kept]) -> None:
        self.model, self.saes, self.kept = model, saes, kept
        self.order = [np.argsort(k.block, kind="stable") for k in kept]
        self.sorted_blocks = [k.block[order] for k, order in zip(kept, self.order, strict=True)]
        self.directions = [attribution_directions(sae) for sae in saes]
        self.out = [self._empty(len(k.feature)) for k in kept]

    def _empty(self, n: int) -> Attributions:
        heads, width = self.model.shape.n_heads, MOST_SOURCES
        return Attributions(
            np.zeros((n, heads), np.float32),
            np.zeros(n, np.float32),
            np.zeros((n, width), np.int16),
            np.zeros((n, width), np.int16),
            np.zeros((n, width), np.float32),
            np.zeros(n, np.int16),
        )

    def run(self, store: TokenStore, progress: Progress) -> list[Attributions]:
        """Attribute every kept example."""
        blocks = (
            np.unique(np.concatenate([k.block for k in self.kept])) if self.kept else np.empty(0, np.int64)
        )
        for start in range(0, len(blocks), BATCH_BLOCKS):
            self._batch(store, blocks[start : start + BATCH_BLOCKS])
            progress.update(min(start + BATCH_BLOCKS, len(blocks)), len(blocks))
        return self.out

    @torch.no_grad()
    def _batch(self, store: TokenStore, blocks: Ints) -> None:
        tokens = torch.from_numpy(store.blocks(blocks)).to(self.model.device)
        layers = sorted({sae.info.site.layer for sae in self.saes})
        hooks = [f"blocks.{layer}.attn.hook_{what}" for layer in layers for what in ("pattern", "v")]
        activations, raw = capture(self.model, tokens, [sae.info.site for sae in self.saes], hooks)
        for i, sae in enumerate(self.saes):
            layer = sae.info.site.layer
            pattern, v = (raw[f"blocks.{layer}.attn.hook_{what}"].float() for what in ("pattern", "v"))
            z = activations[sae.info.site].float()
            for j, block in enumerate(blocks):
                low, high = np.searchsorted(self.sorted_blocks[i], [block, block + 1])
                if low < high:
                    self._examples(i, self.order[i][low:high], pattern[j], v[j], z[j])

    def _examples(self, i: int, rows: Ints, pattern: Tensor, v: Tensor, z: Tensor) -> None:
        sae, kept, out = self.saes[i], self.kept[i], self.out[i]
        feature = torch.from_numpy(kept.feature[rows]).to(z.device)
        position = torch.from_numpy(kept.position[rows]).to(z.device)
        columns, scale = self.directions[i][:, feature], sae.scale(z[position])
        if scale is not None:
            columns = columns / scale.size.T
        dense = contributions(pattern, v, columns.reshape(self.model.shape.n_heads, -1, len(rows)), position)
        index, value, count = largest(dense)
        linear = (z[position].double() * columns.T.double()).sum(1)
        key, width = dense.shape[2], index.shape[1]
        out.by_head[rows] = dense.sum(2).cpu().numpy()
        out.pre_activation[rows] = (linear + sae.bias_term[feature]).float().cpu().numpy()
        out.head[rows, :width] = (index // key).cpu().numpy()
        out.source[rows, :width] = (index % key).cpu().numpy()
        out.contribution[rows, :width] = value.cpu().numpy()
        out.n_sources[rows] = count.cpu().numpy()


def columns_of(a: Attributions, bias_term: npt.NDArray[np.float32]) -> dict[str, Any]:
    """The value columns of the ``dfa`` table, in the order of the kept examples."""
    offsets = np.concatenate([[0], np.cumsum(a.n_sources, dtype=np.int64)]).astype(np.int32)
    used = np.arange(a.head.shape[1]) < a.n_sources[:, None]
    parts = [pa.array(a.head[used]), pa.array(a.source[used]), pa.array(a.contribution[used])]
    fields = [SOURCES.value_type.field(i) for i in range(3)]
    heads = a.by_head.shape[1]
    by_head_offsets = pa.array(np.arange(0, a.by_head.size + 1, heads, dtype=np.int32))
    return {
        "by_head": pa.ListArray.from_arrays(by_head_offsets, pa.array(a.by_head.ravel())),
        "bias_term": bias_term,
        "pre_activation": a.pre_activation,
        "sources": pa.ListArray.from_arrays(
            pa.array(offsets), pa.StructArray.from_arrays(parts, fields=fields)
        ),
    }


def dfa_share(
    a: Attributions, feature: Ints, is_top: npt.NDArray[np.bool_], d_sae: int
) -> npt.NDArray[np.float64]:
    """Mean over a feature's top examples of d_h / p, [d_sae, n_heads]; NaN where it has none."""
    p = a.by_head.astype(np.float64).sum(1)
    usable = is_top & (p != 0)
    ratio = a.by_head[usable] / p[usable, None]
    total = np.zeros((d_sae, a.by_head.shape[1]))
    np.add.at(total, feature[usable], ratio)
    n = np.bincount(feature[usable], minlength=d_sae)[:, None]
    return np.divide(total, n, out=np.full_like(total, np.nan), where=n > 0)
