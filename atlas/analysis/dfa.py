"""Direct feature attribution: which head, looking where, made a feature fire?

With the attention pattern frozen, z[position, h] = sum over sources of pattern[h, position, source] *
v[source, h], so the linear part of a z feature's pre-activation splits exactly:

    dfa[h, source] = pattern[h, position, source] * (v[source, h] . W_enc[h, f])

Summed over heads and sources this is x . W_enc[:, f], and with the bias term the pre-activation. W_enc are
the directions as used: of a gated SAE the magnitude path. An SAE that normalises its input has every
contribution divided by the token's own size, with a LayerNorm's mean taken out of W_enc[:, f]. The SAE of a
single head's z is read through that head alone. attn_out = sum over h of z[h] W_O[h] + b_O, so an SAE on it
is read through W_O[h] W_enc, and b_O . W_enc joins its bias term.
Sources: seed 001; seed 002 (the paper), row C4.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.analysis.acts import Ints, first_of_runs
from atlas.analysis.dfa_rows import DFARows, Sources, Split
from atlas.analysis.dfa_sums import DFASums, matched_prefix
from atlas.analysis.examples import TOP
from atlas.analysis.weights import attribution_directions
from atlas.corpus.tokens import TokenStore
from atlas.kernels.sources import MOST_SOURCES, keep_largest
from atlas.lm.hooks import capture
from atlas.lm.load import LanguageModel
from atlas.lm.runtime import batch_of, lanes
from atlas.progress import Progress
from atlas.sae.model import SAE
from atlas.sites import Site

BATCH_BLOCKS = 16
_TOGETHER = 8
"""Blocks whose examples are worked on together: each call then has enough to do."""


class Kept(NamedTuple):
    """Kept examples of one SAE on which it fires: which they are, and where."""

    feature: Ints
    code: Ints
    """Group of the example (``examples.GROUPS``)."""
    rank: Ints
    block: Ints
    position: Ints

    @property
    def is_top(self) -> npt.NDArray[np.bool_]:
        """Which of them are top examples."""
        return self.code == TOP

    def at(self, rows: npt.NDArray | slice) -> "Kept":
        """Some of the examples."""
        return Kept(*(column[rows] for column in self))


class Seen(NamedTuple):
    """What a batch of blocks showed at one SAE's layer."""

    pattern: Float[Tensor, "blocks heads query key"]
    v: Float[Tensor, "blocks key heads d_head"]
    x: Float[Tensor, "blocks pos d_in"]
    tokens: Ints


class Reading(NamedTuple):
    """How an SAE's pre-activation reads the z of each head."""

    heads: tuple[int, ...]
    directions: Float[Tensor, "d_sae heads d_head"]
    offset: Float[Tensor, " d_sae"]
    """What the linear part holds beside z: b_O . W_enc of an SAE on attn_out."""
    W_enc: Float[Tensor, "d_sae d_in"] | None
    """The directions in the SAE's own space, where that is not z."""


def reads_heads(sae: SAE) -> bool:
    """Whether DFA has a meaning for the SAE: it reads z, or attn_out."""
    return sae.info.site.kind in ("z", "attn_out")


def reading_of(model: LanguageModel, sae: SAE) -> Reading:
    """The directions in z space through which an SAE on z or attn_out reads each head."""
    site, W = sae.info.site, attribution_directions(sae)
    heads, d_head = tuple(range(model.shape.n_heads)), model.shape.d_head
    offset, own = W.new_zeros(sae.d_sae), None
    if site.kind == "attn_out":
        own = W.T.contiguous()
        offset = model.b_O(site.layer) @ W
        W = model.W_O(site.layer).flatten(0, 1) @ W
    elif site.head is not None:
        heads = (site.head,)
    return Reading(heads, W.T.reshape(sae.d_sae, len(heads), d_head).contiguous(), offset, own)


def contributions(
    pattern: Float[Tensor, "heads query key"],
    v: Float[Tensor, "key heads d_head"],
    directions: Float[Tensor, "n heads d_head"],
    position: Int[Tensor, " n"],
    out: Float[Tensor, "n heads key"] | None = None,
) -> Float[Tensor, "n heads key"]:
    """The dense DFA of n examples in one block: example i reads directions[i] at position[i].

    >>> pattern = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    >>> v = torch.tensor([[[2.0]], [[4.0]]])
    >>> contributions(pattern, v, torch.tensor([[[1.0]]]), torch.tensor([1])).tolist()
    [[[0.5, 3.0]]]
    """
    per_source = directions.transpose(0, 1) @ v.permute(1, 2, 0)
    # Written example by example: everything that follows reads one example's heads and sources together.
    dense = per_source.new_empty(len(position), *pattern.shape[::2]) if out is None else out
    return torch.mul(pattern[:, position].transpose(0, 1), per_source.transpose(0, 1), out=dense)


def _dense(
    directions: Float[Tensor, "n heads d_head"], position: Int[Tensor, " n"], block: Ints, seen: Seen
) -> Float[Tensor, "n heads key"]:
    """The dense DFA of examples in several blocks, which come one block after the other."""
    dense = directions.new_empty(*directions.shape[:2], seen.pattern.shape[3])
    edges = [*first_of_runs(block).tolist(), len(block)]
    for low, high in pairwise(edges):
        j, rows = int(block[low]), slice(low, high)
        pattern, v = seen.pattern[j].float(), seen.v[j].float()
        contributions(pattern, v, directions[rows], position[rows], dense[rows])
    return dense


class Largest(NamedTuple):
    """Places in head x source and values [n, 32] of the largest contributions, and how many are kept."""

    place: Ints
    value: npt.NDArray[np.float32]
    n: Ints
    best: Ints
    """The place of the largest positive contribution; -1 where there is none."""


def largest(dense: Float[Tensor, "n heads key"], position: Ints) -> Largest:
    """The largest contributions by magnitude, largest first; ties go to the lower head, then source.

    As many as reach 95 % of the absolute sum, at most 32; exact zeros never count. Sources after an
    example's position contribute nothing and are not looked at.

    >>> found = largest(torch.tensor([[[3.0, -4.0, 0.25, 0.0]]]), np.array([3]))
    >>> found.place[0, :2].tolist(), found.value[0, :2].tolist(), found.n.tolist(), found.best.tolist()
    ([1, 0], [-4.0, 3.0], [2], [0])
    """
    n = len(dense)
    place, value = np.empty((n, MOST_SOURCES), np.int64), np.empty((n, MOST_SOURCES), np.float32)
    found = Largest(place, value, np.empty(n, np.int64), np.empty(n, np.int64))
    keep_largest(dense.float().cpu().numpy(), position, *found)
    return found


class DFAPass:
    """Looks again at the kept examples of SAEs on z and attn_out; each block with an example is read once."""

    def __init__(self, model: LanguageModel, saes: Sequence[SAE], kept: Sequence[Kept]) -> None:
        self.model, self.saes = model, saes
        self.kept = [one.at(np.argsort(one.block, kind="stable")) for one in kept]
        self.readings = [reading_of(model, sae) for sae in saes]
        self.rows = [DFARows(len(reading.heads)) for reading in self.readings]
        self.sums = [DFASums(sae.d_sae, len(r.heads)) for sae, r in zip(saes, self.readings, strict=True)]

    def run(self, store: TokenStore, progress: Progress) -> None:
        """Attribute every kept example."""
        blocks = (
            np.unique(np.concatenate([k.block for k in self.kept])) if self.kept else np.empty(0, np.int64)
        )
        with lanes() as pool:
            size = batch_of(BATCH_BLOCKS)
            for start in range(0, len(blocks), size):
                self._batch(store, blocks[start : start + size], pool)
                progress.update(min(start + size, len(blocks)), len(blocks))

    def _batch(self, store: TokenStore, blocks: Ints, pool: ThreadPoolExecutor) -> None:
        tokens = torch.from_numpy(store.blocks(blocks)).to(self.model.device)
        layers = sorted({sae.info.site.layer for sae in self.saes})
        hooks = [f"blocks.{layer}.attn.hook_{what}" for layer in layers for what in ("pattern", "v")]
        sites = list(dict.fromkeys(sae.info.site for sae in self.saes))
        activations, raw = capture(self.model, tokens, sites, hooks)
        work = [pool.submit(self._of_sae, n, blocks, tokens, activations, raw) for n in range(len(self.saes))]
        for done in work:
            done.result()

    @torch.no_grad()
    def _of_sae(
        self,
        number: int,
        blocks: Ints,
        tokens: Tensor,
        activations: Mapping[Site, Tensor],
        raw: Mapping[str, Tensor],
    ) -> None:
        site, heads = self.saes[number].info.site, list(self.readings[number].heads)
        pattern = raw[f"blocks.{site.layer}.attn.hook_pattern"]
        v, x = raw[f"blocks.{site.layer}.attn.hook_v"], activations[site]
        if len(heads) < pattern.shape[1]:
            pattern, v = pattern[:, heads], v[:, :, heads]
        seen = Seen(pattern, v, x, tokens.cpu().numpy())
        for start in range(0, len(blocks), _TOGETHER):
            some = blocks[start : start + _TOGETHER]
            low, high = np.searchsorted(self.kept[number].block, [some[0], some[-1] + 1])
            if low < high:
                rows = self.kept[number].at(slice(low, high))
                self._examples(number, rows, np.searchsorted(blocks, rows.block), seen)

    def _examples(self, number: int, kept: Kept, block: Ints, seen: Seen) -> None:
        """Examples of a few blocks, sorted by their place in the batch."""
        sae, reading = self.saes[number], self.readings[number]
        feature, position, at = (
            torch.from_numpy(part).to(seen.x.device) for part in (kept.feature, kept.position, block)
        )
        directions = reading.directions[feature]
        dense = _dense(directions, position, block, seen)
        x = seen.x[at, position].float()
        own = directions.flatten(1) if reading.W_enc is None else reading.W_enc[feature]
        linear, offset = torch.linalg.vecdot(x, own), reading.offset[feature]
        scale, bias = sae.scale(x), sae.bias_term[feature]
        if scale is not None:
            size = scale.size[:, 0]
            dense, linear, offset = dense / size[:, None, None], linear / size, offset / size
        dense = dense.cpu()
        found = _named(largest(dense, kept.position), np.array(reading.heads), dense.shape[2])
        text = seen.tokens[block]
        matched = matched_prefix(text, kept.position, found.top_source)
        self.rows[number].add(kept, Split(dense.sum(2), bias + offset, linear + bias), found, matched)
        top = np.flatnonzero(kept.is_top)
        if len(top):
            chosen = dense[torch.from_numpy(top)].numpy()
            self.sums[number].update(kept.feature[top], kept.position[top], text[top], chosen, matched[top])


def _named(found: Largest, heads: Ints, key: int) -> Sources:
    """The largest contributions by head and source."""
    head, source = np.divmod(found.place, key)
    top_head, top_source = np.divmod(found.best, key)
    some = found.best >= 0
    return Sources(
        heads[head], source, found.value, found.n,
        np.where(some, heads[top_head], -1), np.where(some, top_source, -1),
    )  # fmt: skip
