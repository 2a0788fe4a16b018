"""Activations on disk: the model runs once over a text, and every later training run reads.

The first run that needs a block runs the model, rounds to the stream's dtype, trains, and writes the
blocks it read as one shard. Other seeds, other orders, any number of epochs and other processes, at the
same time too, find them by block and site; what is not there comes from the model. Training from a cache
and from the stream is the same bit for bit: batches of the model always have one shape (see ``Harvest``),
and a cache is named by everything that decides its values, the kind of processor included.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from atlas.corpus.tokens import TokenStore
from atlas.lm.load import LanguageModel
from atlas.progress import Progress
from atlas.sae.cache_store import ActivationStore, values_of
from atlas.sae.harvest import BATCH_BLOCKS, Chunk, Harvest, Stream
from atlas.sites import Site

FILL_BLOCKS = 8 * BATCH_BLOCKS


class CachedHarvest:
    """Chunks from the cache in ``folder``, which it fills up to ``limit_bytes`` of all caches there.

    It stops growing when the bound is reached or the disk refuses; training goes on from the model.

    Raises:
        StoreError: the folder cannot be made.
        SAEError: an activation does not fit into float16.
    """

    def __init__(
        self, model: LanguageModel, stream: Stream, sites: Sequence[Site], folder: Path, limit_bytes: int
    ) -> None:
        self.model, self.stream, self.sites = model, stream, tuple(dict.fromkeys(sites))
        self.forward_blocks = 0
        self._harvests: dict[frozenset[Site], Harvest] = {}
        d_in = partial(Site.d_in, shape=model.shape)
        self.on_disk = ActivationStore(folder, identity(model, stream), self.sites, d_in, limit_bytes)

    @property
    def folder(self) -> Path:
        """Where this cache's shards lie."""
        return self.on_disk.folder.folder

    @property
    def growing(self) -> bool:
        """Whether it still writes what it lacks."""
        return self.on_disk.growing

    def chunk(self, number: int) -> Chunk:
        """The chunk of that number."""
        return self.blocks(self.stream.block_numbers(number), self.stream.block_numbers(number + 1))

    def missing(self, numbers: Sequence[int] | np.ndarray) -> list[int]:
        """Which of the blocks are not in the cache with all sites."""
        return list(self.on_disk.missing(_unique(numbers)))

    def blocks(self, numbers: np.ndarray, later: Sequence[int] | np.ndarray = ()) -> Chunk:
        """The blocks of these numbers; ``later`` are asked for next, and may fill up a batch of the model."""
        unique = _unique(numbers)
        stored, missing = self.on_disk.read(unique)
        if missing:
            self._make(unique, stored, missing, later)
        place = {block: i for i, block in enumerate(unique)}
        again = [place[int(block)] for block in numbers] if len(unique) < len(numbers) else None
        activations = {}
        for site, values in stored.items():
            chosen = values if again is None else values[again]
            activations[site] = chosen.to(self.model.device).float()
        tokens = torch.from_numpy(self.stream.store.blocks(numbers)).to(self.model.device)
        return Chunk(tokens, activations)

    def _make(
        self,
        unique: list[int],
        stored: dict[Site, Tensor],
        missing: dict[int, frozenset[Site]],
        later: Sequence[int] | np.ndarray,
    ) -> None:
        """Run the model for what is missing, put it into its place, and write it."""
        place = {block: i for i, block in enumerate(unique)}
        next_missing = self.on_disk.missing(_unique(later))
        kinds = dict.fromkeys(missing.values())
        self._harvests = {sites: self._harvests.get(sites) or self._harvest(sites) for sites in kinds}
        for sites, harvest in self._harvests.items():
            mine = [block for block, lacking in missing.items() if lacking == sites]
            soon = [block for block, lacking in next_missing.items() if lacking == sites]
            chunk = harvest.blocks(np.array(mine), soon)
            self.forward_blocks += len(mine)
            made = {s: x.to(self.on_disk.dtype).cpu().contiguous() for s, x in chunk.activations.items()}
            rows = torch.tensor([place[block] for block in mine])
            for site, values in made.items():
                stored[site][rows] = values
            self.on_disk.write(mine, made)

    def _harvest(self, sites: frozenset[Site]) -> Harvest:
        return Harvest(self.model, self.stream, [site for site in self.sites if site in sites])


def fill(cache: CachedHarvest, blocks: Sequence[int] | np.ndarray, progress: Progress) -> int:
    """Write the blocks that the cache lacks, as far as its bound allows; how many of them it has then.

    ``progress`` counts blocks, and may stop the work by raising ``Cancelled``.
    """
    wanted = _unique(blocks)
    todo = cache.missing(wanted)
    done = len(wanted) - len(todo)
    progress.update(done, len(wanted), "cached activations")
    for start in range(0, len(todo), FILL_BLOCKS):
        cache.blocks(np.array(todo[start : start + FILL_BLOCKS]))
        if not cache.growing:
            break
        progress.update(done + min(start + FILL_BLOCKS, len(todo)), len(wanted), "cached activations")
    return len(wanted) - len(cache.missing(wanted))


def identity(model: LanguageModel, stream: Stream) -> dict[str, object]:
    """Everything that decides a cached value; caches are named by a digest of it."""
    store = stream.store
    values = values_of(model, store.meta.context, stream.dtype, BATCH_BLOCKS)
    return values | {"tokens": _tokens_digest(store)}


def _tokens_digest(store: TokenStore) -> str:
    total = hashlib.sha256()
    for start in range(0, len(store), 4096):
        total.update(store.blocks(np.arange(start, min(start + 4096, len(store)))).tobytes())
    return total.hexdigest()


def _unique(numbers: Sequence[int] | np.ndarray) -> list[int]:
    return list(dict.fromkeys(map(int, numbers)))
