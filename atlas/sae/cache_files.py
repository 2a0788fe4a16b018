"""Shards of the activation cache: one file of some blocks at some sites, checked by digest.

    "ATLASACT" | length of the header | SHA-256 of the header | header: JSON
    SHA-256 of every piece [site, block] | pieces [site, block], each [pos, d_in] in the cache's dtype

A piece is what is read and checked at a time, so a reader pays for the sites and blocks that it wants and
for no others. Reads go through pread: a file that somebody cut short gives an error, where a memory map
would kill the process.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atlas.errors import StoreError
from atlas.sites import Site

MAGIC = b"ATLASACT"
DIGEST = 32
_LENGTH = 8
_MOST_HEADER = 1 << 28
SUFFIX = ".acts"


class DamagedShardError(StoreError):
    """A shard is not what was written; it is dropped and made anew."""


def raw(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to be read or written in place.

    >>> raw(torch.tensor([1.0], dtype=torch.bfloat16)).hex()
    '803f'
    """
    return values.reshape(-1).view(torch.uint8).numpy().data


def header_of(blocks: Sequence[int], widths: Mapping[Site, int], context: int, dtype: str) -> bytes:
    """The JSON that says what a shard holds."""
    plain = {
        "blocks": [int(block) for block in blocks],
        "sites": [site.name for site in widths],
        "d_in": [int(d_in) for d_in in widths.values()],
        "context": context,
        "dtype": dtype,
    }
    return json.dumps(plain, separators=(",", ":")).encode("ascii")


def shard_name(header: bytes) -> str:
    """The file name of what a header describes: two writers of the same make the same file."""
    return hashlib.sha256(header).hexdigest()[:40] + SUFFIX


def shard_bytes(header: bytes, n_blocks: int, d_in: int, n_sites: int, context: int, itemsize: int) -> int:
    """The size of a shard's file; ``d_in`` is the sum over its sites."""
    start = len(MAGIC) + _LENGTH + DIGEST + len(header)
    return start + n_blocks * (n_sites * DIGEST + context * d_in * itemsize)


def write_shard(descriptor: int, header: bytes, values: Sequence[Tensor]) -> None:
    """Write a shard; ``values`` are [blocks, pos, d_in] of each site, on the CPU and in the cache's dtype."""
    start = MAGIC + len(header).to_bytes(_LENGTH, "little") + hashlib.sha256(header).digest() + header
    digests: list[bytes] = []
    at = len(start) + len(values) * len(values[0]) * DIGEST
    for x in values:
        data = raw(x)
        piece = len(data) // len(x)
        digests += [hashlib.sha256(data[i : i + piece]).digest() for i in range(0, len(data), piece)]
        _write(descriptor, data, at)
        at += len(data)
    _write(descriptor, memoryview(start + b"".join(digests)), 0)


def _write(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, at)
        data, at = data[done:], at + done


class Shard:
    """One shard on disk, opened by its header.

    Raises:
        DamagedShardError: it is cut short, changed, or holds something else than the cache.
        OSError: it cannot be opened or read.
    """

    def __init__(self, path: Path, d_in: Callable[[Site], int], context: int, dtype: str) -> None:
        self.path = path
        self._itemsize: int = getattr(torch, dtype).itemsize
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = self._read_header(file.read(len(MAGIC) + _LENGTH + DIGEST), file)
        plain = json.loads(header)
        self.blocks: list[int] = plain["blocks"]
        self.sites = tuple(Site.parse(name) for name in plain["sites"])
        if [plain["context"], plain["dtype"], plain["d_in"]] != [context, dtype, [*map(d_in, self.sites)]]:
            raise DamagedShardError(f"{path} holds activations of another model or dtype")
        n, total = len(self.blocks), sum(plain["d_in"])
        expected = shard_bytes(header, n, total, len(self.sites), context, self._itemsize)
        if size != expected:
            raise DamagedShardError(f"{path} has {size} bytes, not {expected}")
        self._digests = len(MAGIC) + _LENGTH + DIGEST + len(header)
        pieces = [context * d * self._itemsize for d in plain["d_in"]]
        data = self._digests + n * len(pieces) * DIGEST
        starts = data + n * np.concatenate([[0], np.cumsum(pieces)])
        self._places = {s: (i, int(starts[i]), pieces[i]) for i, s in enumerate(self.sites)}
        self._checked = np.zeros((len(pieces), n), dtype=bool)

    def _read_header(self, start: bytes, file: Any) -> bytes:
        length = int.from_bytes(start[len(MAGIC) : -DIGEST], "little")
        if not start.startswith(MAGIC) or length > _MOST_HEADER:
            raise DamagedShardError(f"{self.path} does not begin like a shard")
        header: bytes = file.read(length)
        if hashlib.sha256(header).digest() != start[-DIGEST:]:
            raise DamagedShardError(f"{self.path} has a damaged header")
        return header

    def read(self, rows: np.ndarray, at: np.ndarray, out: Mapping[Site, memoryview]) -> None:
        """Read the blocks ``rows`` of the shard into the places ``at`` of each site's buffer.

        A piece is checked the first time that this object reads it.
        """
        edges = np.flatnonzero((np.diff(rows) != 1) | (np.diff(at) != 1)) + 1
        runs = [(int(r[0]), int(a[0]), len(r)) for r, a in _pairs(rows, at, edges)]
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for site, buffer in out.items():
                for row, place, n in runs:
                    self._read_run(descriptor, site, row, n, buffer, place)
        finally:
            os.close(descriptor)

    def _read_run(self, fd: int, site: Site, row: int, n: int, buffer: memoryview, place: int) -> None:
        index, start, piece = self._places[site]
        target = buffer[place * piece : (place + n) * piece]
        self._fill(fd, target, start + row * piece)
        if self._checked[index, row : row + n].all():
            return
        digests = bytearray(n * DIGEST)
        self._fill(fd, memoryview(digests), self._digests + (index * len(self.blocks) + row) * DIGEST)
        for i in range(n):
            found = hashlib.sha256(target[i * piece : (i + 1) * piece]).digest()
            if found != digests[i * DIGEST : (i + 1) * DIGEST]:
                block = self.blocks[row + i]
                raise DamagedShardError(f"{self.path} is damaged at {site.name} of block {block}")
        self._checked[index, row : row + n] = True

    def _fill(self, fd: int, target: memoryview, at: int) -> None:
        while target:
            done = os.preadv(fd, [target], at)
            if done == 0:
                raise DamagedShardError(f"{self.path} was cut short")
            target, at = target[done:], at + done


def _pairs(rows: np.ndarray, at: np.ndarray, edges: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(np.split(rows, edges), np.split(at, edges), strict=True))
