"""Activations on disk: the model runs once over a text, and every later training run reads.

The first run that needs a block runs the model, rounds to the stream's dtype, trains, and writes the
blocks it read as one shard. Other seeds, other orders, any number of epochs and other processes, at the
same time too, find them by block and site; what is not there comes from the model. Training from a cache
and from the stream is the same bit for bit: batches of the model always have one shape (see ``Harvest``),
and a cache is named by everything that decides its values, the kind of processor included.
"""

import hashlib
import logging
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from atlas.corpus.tokens import TokenStore
from atlas.errors import StoreError
from atlas.lm.load import LanguageModel
from atlas.progress import Progress
from atlas.sae.cache_files import DamagedShardError, header_of, raw, shard_bytes, shard_name, write_shard
from atlas.sae.cache_folder import CacheFolder, Room
from atlas.sae.harvest import BATCH_BLOCKS, Chunk, Harvest, Stream
from atlas.sites import Site
from atlas.store.atomic import discard

FORMAT = 1
FILL_BLOCKS = 8 * BATCH_BLOCKS
log = logging.getLogger(__name__)


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
        self.limit_bytes, self.growing = limit_bytes, True
        self.forward_blocks = 0
        self._dtype: torch.dtype = getattr(torch, stream.dtype)
        self._harvests: dict[frozenset[Site], Harvest] = {}
        d_in = partial(Site.d_in, shape=model.shape)
        self._folder = CacheFolder(folder, identity(model, stream), self.sites, d_in)

    @property
    def folder(self) -> Path:
        """Where this cache's shards lie."""
        return self._folder.folder

    def _d_in(self, site: Site) -> int:
        return site.d_in(self.model.shape)

    def chunk(self, number: int) -> Chunk:
        """The chunk of that number."""
        return self.blocks(self.stream.block_numbers(number), self.stream.block_numbers(number + 1))

    def missing(self, numbers: Sequence[int] | np.ndarray) -> list[int]:
        """Which of the blocks are not in the cache with all sites."""
        return list(self._folder.find(_unique(numbers))[1])

    def blocks(self, numbers: np.ndarray, later: Sequence[int] | np.ndarray = ()) -> Chunk:
        """The blocks of these numbers; ``later`` are asked for next, and may fill up a batch of the model."""
        unique = _unique(numbers)
        stored, missing = self._read(unique)
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

    def _read(self, unique: list[int]) -> tuple[dict[Site, Tensor], dict[int, frozenset[Site]]]:
        """What the cache has of the blocks, and which sites of which blocks it lacks."""
        context = self.stream.store.meta.context
        stored = {s: torch.empty(len(unique), context, self._d_in(s), dtype=self._dtype) for s in self.sites}
        buffers = {site: raw(values) for site, values in stored.items()}
        while True:
            readings, missing = self._folder.find(unique)
            dropped = False
            for reading in readings:
                wanted = {s: buffers[s] for s in reading.shard.sites if s in buffers}
                try:
                    reading.shard.read(reading.rows, reading.at, wanted)
                except (DamagedShardError, OSError) as error:
                    self._folder.drop(reading.shard, error)
                    dropped = True
            self._warn_of_damage()
            if not dropped:
                return stored, missing

    def _warn_of_damage(self) -> None:
        for message in self._folder.dropped:
            log.warning("activation cache: %s; it is made anew", message)
        self._folder.dropped.clear()

    def _make(
        self,
        unique: list[int],
        stored: dict[Site, Tensor],
        missing: dict[int, frozenset[Site]],
        later: Sequence[int] | np.ndarray,
    ) -> None:
        """Run the model for what is missing, put it into its place, and write it."""
        place = {block: i for i, block in enumerate(unique)}
        next_missing = self._folder.find(_unique(later))[1]
        kinds = dict.fromkeys(missing.values())
        self._harvests = {sites: self._harvests.get(sites) or self._harvest(sites) for sites in kinds}
        for sites, harvest in self._harvests.items():
            mine = [block for block, lacking in missing.items() if lacking == sites]
            soon = [block for block, lacking in next_missing.items() if lacking == sites]
            chunk = harvest.blocks(np.array(mine), soon)
            self.forward_blocks += len(mine)
            made = {s: x.to(self._dtype).cpu().contiguous() for s, x in chunk.activations.items()}
            rows = torch.tensor([place[block] for block in mine])
            for site, values in made.items():
                stored[site][rows] = values
            self._write(mine, made)

    def _harvest(self, sites: frozenset[Site]) -> Harvest:
        return Harvest(self.model, self.stream, [site for site in self.sites if site in sites])

    def _write(self, blocks: list[int], made: dict[Site, Tensor]) -> None:
        """Write a shard, unless the bound is reached or the disk refuses; then this was the last try."""
        if not self.growing:
            return
        context, widths = self.stream.store.meta.context, {site: self._d_in(site) for site in made}
        header = header_of(blocks, widths, context, self.stream.dtype)
        total = sum(widths.values())
        size = shard_bytes(header, len(blocks), total, len(made), context, self._dtype.itemsize)
        try:
            room = self._folder.reserve(shard_name(header), size, self.limit_bytes)
            if room is not None:
                self._fill(room, header, made)
                return
            reason = f"the bound of {self.limit_bytes / 1e9:g} GB is reached"
            log.info("activation cache stops growing: %s; other blocks come from the model", reason)
        except (StoreError, OSError) as error:
            reason = (os.strerror(error.errno) if error.errno else "") if isinstance(error, OSError) else ""
            log.warning("activation cache stops growing: %s; training goes on", reason or error)
        self.growing = False

    def _fill(self, room: Room, header: bytes, made: dict[Site, Tensor]) -> None:
        try:
            write_shard(room.descriptor, header, list(made.values()))
            self._folder.publish(room, shard_name(header))
        finally:
            discard(room.path)
            with suppress(OSError):
                os.close(room.descriptor)


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
    return {
        "format": FORMAT,
        "model": model.files.digest,
        "processing": model.processing,
        "tokens": _tokens_digest(stream.store),
        "context": stream.store.meta.context,
        "dtype": stream.dtype,
        "batch_blocks": BATCH_BLOCKS,
        "machine": _machine(model.device),
        "torch": torch.__version__,
        "transformer_lens": version("transformer_lens"),
    }


def _machine(device: torch.device) -> str:
    """The kind of processor: another may add in another order, and differ in the last bit."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type} {torch.backends.cpu.get_cpu_capability()}"


def _tokens_digest(store: TokenStore) -> str:
    total = hashlib.sha256()
    for start in range(0, len(store), 4096):
        total.update(store.blocks(np.arange(start, min(start + 4096, len(store)))).tobytes())
    return total.hexdigest()


def _unique(numbers: Sequence[int] | np.ndarray) -> list[int]:
    return list(dict.fromkeys(map(int, numbers)))
