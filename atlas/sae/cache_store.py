"""Activations of blocks at some sites, read from a cache on disk and written to it."""

import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from atlas.errors import StoreError
from atlas.lm.load import LanguageModel
from atlas.sae.cache_files import DamagedShardError, header_of, raw, shard_bytes, shard_name, write_shard
from atlas.sae.cache_folder import CacheFolder, Room
from atlas.sites import Site
from atlas.store.atomic import discard

FORMAT = 1
log = logging.getLogger(__name__)


class ActivationStore:
    """What the cache that ``about`` describes holds of ``sites``, and room for more up to a bound.

    It stops growing when the bound of all caches in ``root`` is reached or the disk refuses.

    Raises:
        StoreError: the folder cannot be made.
    """

    def __init__(
        self,
        root: Path,
        about: Mapping[str, object],
        sites: Sequence[Site],
        d_in: Callable[[Site], int],
        limit_bytes: int,
    ) -> None:
        self.sites, self.d_in = tuple(dict.fromkeys(sites)), d_in
        self.context, self.dtype = int(str(about["context"])), getattr(torch, str(about["dtype"]))
        self.limit_bytes, self.growing = limit_bytes, True
        self.folder = CacheFolder(root, about, self.sites, d_in)

    def missing(self, blocks: Sequence[int]) -> dict[int, frozenset[Site]]:
        """The blocks that are not here with all sites, and the sites that each lacks."""
        return self.folder.find(blocks)[1]

    def read(self, blocks: Sequence[int]) -> tuple[dict[Site, Tensor], dict[int, frozenset[Site]]]:
        """What is here of different blocks, and which sites of which blocks are not; those hold anything."""
        n, context = len(blocks), self.context
        stored = {s: torch.empty(n, context, self.d_in(s), dtype=self.dtype) for s in self.sites}
        buffers = {site: raw(values) for site, values in stored.items()}
        while True:
            readings, missing = self.folder.find(blocks)
            dropped = False
            for reading in readings:
                wanted = {s: buffers[s] for s in reading.shard.sites if s in buffers}
                try:
                    reading.shard.read(reading.rows, reading.at, wanted)
                except (DamagedShardError, OSError) as error:
                    self.folder.drop(reading.shard, error)
                    dropped = True
            self._warn_of_damage()
            if not dropped:
                return stored, missing

    def _warn_of_damage(self) -> None:
        for message in self.folder.dropped:
            log.warning("activation cache: %s; it is made anew", message)
        self.folder.dropped.clear()

    def write(self, blocks: Sequence[int], made: Mapping[Site, Tensor]) -> None:
        """Write a shard, unless the bound is reached or the disk refuses; then this was the last try.

        ``made`` are [blocks, pos, d_in] of each site, contiguous, on the CPU and in the cache's dtype.
        """
        if not self.growing:
            return
        widths = {site: self.d_in(site) for site in made}
        header = header_of(blocks, widths, self.context, str(self.dtype).removeprefix("torch."))
        total = sum(widths.values())
        size = shard_bytes(header, len(blocks), total, len(made), self.context, self.dtype.itemsize)
        try:
            room = self.folder.reserve(shard_name(header), size, self.limit_bytes)
            if room is not None:
                self._fill(room, header, made)
                return
            reason = f"the bound of {self.limit_bytes / 1e9:g} GB is reached"
            log.info("activation cache stops growing: %s; other blocks come from the model", reason)
        except (StoreError, OSError) as error:
            reason = (os.strerror(error.errno) if error.errno else "") if isinstance(error, OSError) else ""
            log.warning("activation cache stops growing: %s; the work goes on without it", reason or error)
        self.growing = False

    def _fill(self, room: Room, header: bytes, made: Mapping[Site, Tensor]) -> None:
        try:
            write_shard(room.descriptor, header, list(made.values()))
            self.folder.publish(room, shard_name(header))
        finally:
            discard(room.path)
            with suppress(OSError):
                os.close(room.descriptor)


def values_of(model: LanguageModel, context: int, dtype: str, batch_blocks: int) -> dict[str, object]:
    """What decides a model's activations on a text, the kind of processor included; the text is not in it."""
    return {
        "format": FORMAT,
        "model": model.files.digest,
        "processing": model.processing,
        "context": context,
        "dtype": dtype,
        "batch_blocks": batch_blocks,
        "machine": _machine(model.device),
        "torch": torch.__version__,
        "transformer_lens": version("transformer_lens"),
    }


def _machine(device: torch.device) -> str:
    """The kind of processor: another may add in another order, and differ in the last bit."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type} {torch.backends.cpu.get_cpu_capability()}"
