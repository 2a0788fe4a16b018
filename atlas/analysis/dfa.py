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

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from atlas.analysis.acts import Ints
from atlas.analysis.contributions import Attributed, Places, attributed, linear_parts
from atlas.analysis.dfa_rows import DFARows, Split
from atlas.analysis.dfa_sums import DFASums
from atlas.analysis.examples import TOP
from atlas.analysis.residuals import KeptResiduals
from atlas.analysis.second_look import Attention, Look, Replay, WholePass, batches
from atlas.analysis.weights import attribution_directions
from atlas.corpus.tokens import TokenStore
from atlas.errors import StoreError
from atlas.lm.load import LanguageModel
from atlas.lm.runtime import batch_of, lanes
from atlas.progress import Progress
from atlas.sae.model import SAE

log = logging.getLogger(__name__)

BATCH_BLOCKS = 16
_TOGETHER, _ENTRIES = 8, 1 << 22
"""Blocks whose examples are worked on together, so that each call has enough to do; fewer where their
patterns would have more entries than this."""


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


class Found(NamedTuple):
    """Attributed examples on their way into rows and sums."""

    kept: Kept
    split: Split
    attributed: Attributed
    text: Ints
    """The tokens of each one's block."""


class DFAPass:
    """Looks again at the kept examples of SAEs on z and attn_out; each block with an example is read once.

    With ``residuals`` the model runs only if they are not all there. ``as_kept``: blocks are read in the
    batches in which the corpus pass keeps them, wherever that is not more than twice as many.
    """

    def __init__(
        self,
        model: LanguageModel,
        saes: Sequence[SAE],
        kept: Sequence[Kept],
        residuals: KeptResiduals | None = None,
        *,
        as_kept: bool = False,
    ) -> None:
        self.model, self.saes, self.residuals, self.as_kept = model, saes, residuals, as_kept
        self.kept = [one.at(np.argsort(one.block, kind="stable")) for one in kept]
        self.readings = [reading_of(model, sae) for sae in saes]
        self._begin()

    def _begin(self) -> None:
        self.rows = [DFARows(reading.heads) for reading in self.readings]
        self.sums = [
            DFASums(sae.d_sae, len(r.heads)) for sae, r in zip(self.saes, self.readings, strict=True)
        ]

    def run(self, store: TokenStore, blocks: range, progress: Progress) -> None:
        """Attribute every kept example; all of them lie in ``blocks``."""
        kept = np.unique(np.concatenate([k.block for k in self.kept])) if self.kept else np.empty(0, np.int64)
        todo = batches(kept, blocks if self.as_kept else None, batch_of(BATCH_BLOCKS))
        if self.residuals is not None and self.residuals.hold(todo):
            try:
                self._replay(self.residuals, store, todo, progress)
            except StoreError as error:
                log.warning("%s; the model runs again", error)
                self._begin()
            else:
                return
        self._run_model(store, todo, progress)

    def _replay(
        self, residuals: KeptResiduals, store: TokenStore, todo: Sequence[Ints], progress: Progress
    ) -> None:
        """Batches side by side, all SAEs of one before those of the next; no SAE waits for another."""
        layers = {sae.info.site.layer for sae in self.saes}
        with lanes() as pool:
            last: dict[int, Future[None]] = {}
            rounds = []
            for batch in todo:
                looks = {n: Replay(self.model, n, partial(residuals.read, batch, n)) for n in layers}
                tokens = store.blocks(batch)
                for n, sae in enumerate(self.saes):
                    work = batch, tokens, looks[sae.info.site.layer], last.get(n)
                    last[n] = pool.submit(self._of_sae, n, *work)
                rounds.append(list(last.values()))
            for n, done in enumerate(rounds, 1):
                for one in done:
                    one.result()
                _report(progress, todo, n)

    def _run_model(self, store: TokenStore, todo: Sequence[Ints], progress: Progress) -> None:
        sites = [sae.info.site for sae in self.saes]
        with lanes() as pool:
            for n, batch in enumerate(todo, 1):
                tokens = store.blocks(batch)
                look = WholePass(self.model, torch.from_numpy(tokens).to(self.model.device), sites)
                work = [pool.submit(self._of_sae, i, batch, tokens, look) for i in range(len(sites))]
                for one in work:
                    one.result()
                _report(progress, todo, n)

    @torch.no_grad()
    def _of_sae(
        self, number: int, blocks: Ints, tokens: Ints, look: Look, before: "Future[None] | None" = None
    ) -> None:
        """Attribute a batch; taken down after the one before it, so that sums are added up in one order."""
        found = list(self._found(number, blocks, tokens, look))
        if before is not None:
            before.result()
        for one in found:
            self._take_down(number, *one)

    def _found(self, number: int, blocks: Ints, tokens: Ints, look: Look) -> Iterator[Found]:
        """The examples of a batch, those of a few blocks at a time."""
        per_block = len(self.readings[number].heads) * tokens.shape[1] ** 2
        together = max(1, min(_TOGETHER, _ENTRIES // per_block))
        for start in range(0, len(blocks), together):
            some = slice(start, start + together)
            low, high = np.searchsorted(self.kept[number].block, [blocks[some][0], blocks[some][-1] + 1])
            if low < high:
                rows = self.kept[number].at(slice(low, high))
                block = np.searchsorted(blocks[some], rows.block)
                seen = look.at(self.saes[number].info.site, some)
                split, found = self._examples(number, rows, block, seen)
                yield Found(rows, split, found, tokens[some][block])

    def _examples(self, number: int, kept: Kept, block: Ints, seen: Attention) -> tuple[Split, Attributed]:
        """Examples of a few blocks, sorted by their place among them."""
        sae, reading = self.saes[number], self.readings[number]
        places = Places(kept.feature, block, kept.position, kept.is_top)
        own = reading.directions.flatten(1) if reading.W_enc is None else reading.W_enc
        feature = torch.from_numpy(kept.feature).to(seen.x.device)
        bias, per_unit = sae.bias_term[feature], _per_unit(sae, seen.x, places)
        linear, offset = linear_parts(seen.x, places, own) * per_unit, reading.offset[feature] * per_unit
        found = attributed(places, seen.pattern, seen.v, reading.directions, per_unit)
        return Split(found.by_head, bias + offset, linear + bias), found

    def _take_down(self, number: int, kept: Kept, split: Split, found: Attributed, text: Ints) -> None:
        matched = self.rows[number].add(kept, split, found.largest, text)
        at_top = kept.is_top
        if at_top.any():
            top, by_head = kept.at(at_top), found.by_head.numpy()[at_top]
            rows = text[at_top], found.top, by_head, matched[at_top]
            self.sums[number].update(top.feature, top.position, *rows)


def _per_unit(sae: SAE, x: Float[Tensor, "blocks pos d_in"], places: Places) -> Float[Tensor, " n"]:
    """What contributions to each example are multiplied by: 1 / its token's size, or 1."""
    block, position = (torch.from_numpy(part).to(x.device) for part in (places.block, places.position))
    normalised = sae.info.normalize_activations != "none"
    scale = sae.scale(x[block, position].float()) if normalised else None
    return x.new_ones(len(block), dtype=torch.float32) if scale is None else 1 / scale.size[:, 0]


def _report(progress: Progress, todo: Sequence[Ints], n: int) -> None:
    progress.update(sum(map(len, todo[:n])), sum(map(len, todo)))
