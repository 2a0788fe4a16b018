"""Patterns, values and z of some blocks, seen again: by a whole pass, or from what enters each layer."""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from atlas.analysis.acts import Ints
from atlas.lm.attention import QKV, attend, project
from atlas.lm.hooks import capture
from atlas.lm.load import LanguageModel
from atlas.sites import Site


class Attention(NamedTuple):
    """What some blocks showed at a site on z or attn_out, of the heads that it reads."""

    pattern: Float[Tensor, "blocks heads query key"]
    v: Float[Tensor, "blocks key heads d_head"]
    x: Float[Tensor, "blocks pos d_in"]
    """The site's activations."""


@runtime_checkable
class Look(Protocol):
    """A batch of blocks that has been looked at; may be asked from several threads at once."""

    def at(self, site: Site, blocks: slice) -> Attention:
        """What some of its blocks showed at a site."""
        ...


class WholePass:
    """One forward pass, stopped after the last layer that is asked for."""

    def __init__(
        self, model: LanguageModel, tokens: Int[Tensor, "blocks pos"], sites: Sequence[Site]
    ) -> None:
        layers = sorted({site.layer for site in sites})
        hooks = [f"blocks.{layer}.attn.hook_{what}" for layer in layers for what in ("pattern", "v")]
        self.x, self.raw = capture(model, tokens, list(dict.fromkeys(sites)), hooks)

    def at(self, site: Site, blocks: slice) -> Attention:
        """What some of the blocks showed at a site."""
        pattern, v = (self.raw[f"blocks.{site.layer}.attn.hook_{what}"][blocks] for what in ("pattern", "v"))
        if site.head is not None:
            pattern, v = pattern[:, [site.head]], v[:, :, [site.head]]
        return Attention(pattern, v, self.x[site][blocks])


class Replay:
    """One layer's attention by itself, for sites on its z and models that ``attention.replays``.

    What enters the layer is asked for when the first site is.
    """

    def __init__(self, model: LanguageModel, layer: int, enters: Callable[[], Tensor]) -> None:
        self.model, self.layer, self._enters = model, layer, enters
        self._lock = Lock()
        self._heads: QKV | None = None

    def _all_heads(self) -> QKV:
        with self._lock:
            if self._heads is None:
                self._heads = project(self.model, self.layer, self._enters())
            return self._heads

    def at(self, site: Site, blocks: slice) -> Attention:
        """What some of the blocks showed at a site."""
        heads = self._all_heads().at(blocks, None if site.head is None else [site.head])
        pattern, z = attend(heads)
        return Attention(pattern, heads.v, z.flatten(2))


def batches(kept: Ints, within: range | None, size: int) -> list[Ints]:
    """The blocks to look at, ``size`` at a time, when those of ``kept`` are asked for.

    Where at least half of the blocks ``within`` are, batches are those in which the corpus pass reads all of
    them, so that what it kept of them fits; else only the blocks asked for are read.

    >>> [b.tolist() for b in batches(np.array([5, 6, 9]), range(4, 9), 2)]
    [[4, 5], [6, 7]]
    >>> [b.tolist() for b in batches(np.array([5, 8]), range(4, 9), 2)]
    [[5, 8]]
    """
    if within is None or 2 * len(kept) < len(within):
        return [kept[start : start + size] for start in range(0, len(kept), size)]
    all_of_them = (np.arange(start, min(start + size, within.stop)) for start in within[::size])
    return [blocks for blocks in all_of_them if np.isin(blocks, kept).any()]
