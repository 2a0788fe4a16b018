"""Activations for training: one forward pass per batch of blocks feeds the SAEs of all sites.

The text is read in chunks. Chunk c takes its blocks from a seeded permutation of the training blocks
(a new one for each time through), drops position 0, and puts its tokens in an order that depends on the
seed and c alone. So the state of the stream is one number, and a resumed run reads what an undisturbed
run would have read. Activations are rounded to the stream's dtype, whether they come from the model or from
a cache, so that both train the same SAE.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.corpus.tokens import TokenStore
from atlas.errors import CorpusError, SAEError
from atlas.lm.layers import read_sites
from atlas.lm.load import LanguageModel
from atlas.sites import Site

BATCH_BLOCKS = 16


class Stream(NamedTuple):
    """What decides the training data: text, its held-out first blocks, sizes and seed."""

    store: TokenStore
    held_out: int
    chunk_tokens: int
    seed: int
    dtype: str = "float32"

    @property
    def n_train(self) -> int:
        """Blocks that may be trained on."""
        n = len(self.store) - self.held_out
        if n < 1:
            raise CorpusError(
                f"corpus {self.store.meta.corpus!r} has {len(self.store)} blocks; "
                f"{self.held_out} are held out and none is left to train on"
            )
        return n

    @property
    def chunk_blocks(self) -> int:
        """Blocks that give ``chunk_tokens`` tokens without their position 0."""
        return -(-self.chunk_tokens // (self.store.meta.context - 1))

    def block_numbers(self, chunk: int) -> np.ndarray:
        """The blocks of a chunk; the permutations of the training blocks follow each other endlessly."""
        at = np.arange(chunk * self.chunk_blocks, (chunk + 1) * self.chunk_blocks)
        epochs = at // self.n_train
        numbers = np.empty_like(at)
        for epoch in np.unique(epochs):
            order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.n_train)
            mine = epochs == epoch
            numbers[mine] = order[at[mine] - epoch * self.n_train]
        return numbers + self.held_out

    def token_order(self, chunk: int) -> np.ndarray:
        """The order in which the chunk's tokens are trained on."""
        n = self.chunk_blocks * (self.store.meta.context - 1)
        return np.random.default_rng([self.seed, 2, chunk]).permutation(n)[: self.chunk_tokens]


class Chunk(NamedTuple):
    """The blocks of one chunk, in the order in which they are read, with their activations."""

    tokens: Int[Tensor, "blocks pos"]
    activations: dict[Site, Float[Tensor, "blocks pos d_in"]]

    def rows(self, site: Site) -> Float[Tensor, "n d_in"]:
        """The activations of a site without position 0, token after token."""
        x = self.activations[site][:, 1:]
        return x.reshape(-1, x.shape[-1])


@runtime_checkable
class Source(Protocol):
    """Where chunks come from: the model, or a cache."""

    def chunk(self, number: int) -> Chunk:
        """The chunk of that number."""
        ...


class Harvest:
    """Chunks made by running the model: one pass per batch of blocks feeds every site.

    The model always sees BATCH_BLOCKS blocks at once, because matrix products of another shape may add in
    another order. So a block's activations are the same bits whatever its companions, in a stream or in a
    cache. A last batch that is not full takes blocks of the next chunk along, whose activations are kept.
    """

    def __init__(self, model: LanguageModel, stream: Stream, sites: Sequence[Site]) -> None:
        self.model, self.stream, self.sites = model, stream, tuple(dict.fromkeys(sites))
        self._ahead: dict[int, dict[Site, Tensor]] = {}

    def chunk(self, number: int) -> Chunk:
        """The chunk of that number."""
        return self.blocks(self.stream.block_numbers(number), self.stream.block_numbers(number + 1))

    def blocks(self, numbers: np.ndarray, later: Sequence[int] | np.ndarray = ()) -> Chunk:
        """The blocks of these numbers; ``later`` are asked for next, and may fill up the last batch."""
        row = {block: i for i, block in enumerate(dict.fromkeys(map(int, numbers)))}
        ahead, self._ahead = self._ahead, {}
        whole: dict[Site, Tensor] = {}
        for block in row.keys() & ahead.keys():
            self._put(whole, len(row), [row[block]], {s: v[None] for s, v in ahead[block].items()})
        new = [block for block in row if block not in ahead]
        spare = [block for block in dict.fromkeys(map(int, later)) if block not in row]
        self._ahead = {block: ahead[block] for block in spare if block in ahead}
        spare = [block for block in spare if block not in ahead]
        for start in range(0, len(new), BATCH_BLOCKS):
            mine = new[start : start + BATCH_BLOCKS]
            full = [*mine, *spare[: BATCH_BLOCKS - len(mine)]]
            values = self._run(full)
            self._put(whole, len(row), [row[block] for block in mine], values)
            for i, block in enumerate(full[len(mine) :], len(mine)):
                self._ahead[block] = {site: v[i].clone() for site, v in values.items()}
        if len(row) < len(numbers):
            at = torch.tensor([row[int(block)] for block in numbers], device=self.model.device)
            whole = {site: values[at] for site, values in whole.items()}
        return Chunk(self.tokens(numbers), whole)

    def tokens(self, numbers: Sequence[int] | np.ndarray) -> Int[Tensor, "blocks pos"]:
        """The tokens of these blocks, on the model's device."""
        return torch.from_numpy(self.stream.store.blocks(numbers)).to(self.model.device)

    def _run(self, blocks: list[int]) -> dict[Site, Tensor]:
        """One forward pass of BATCH_BLOCKS blocks; the first block stands in for those that lack."""
        padded = [*blocks, *blocks[:1] * (BATCH_BLOCKS - len(blocks))]
        return read_sites(self.model, self.tokens(padded), self.sites)

    def _put(self, whole: dict[Site, Tensor], n: int, rows: list[int], values: dict[Site, Tensor]) -> None:
        """Write the first activations of a batch into their rows of the chunk, rounded."""
        at = torch.tensor(rows, device=self.model.device)
        for site, x in values.items():
            if site not in whole:
                whole[site] = torch.empty(n, *x.shape[1:], device=x.device)
            whole[site][at] = rounded(x[: len(rows)], self.stream.dtype)


def rounded(x: Tensor, dtype: str) -> Tensor:
    """The values as float32 after rounding to ``dtype``.

    Raises:
        SAEError: an activation does not fit into float16.

    >>> rounded(torch.tensor([1.0001]), "bfloat16").item()
    1.0
    """
    if dtype == "float32":
        return x.float()
    out = x.to(getattr(torch, dtype)).float()
    if dtype == "float16" and not torch.isfinite(out).all():
        raise SAEError(f"activation {x.abs().max().item():g} does not fit into float16; use bfloat16")
    return out
