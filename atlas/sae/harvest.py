"""Activations for training: one forward pass per batch of blocks feeds the SAEs of all sites.

The text is read in chunks. Chunk c takes its blocks from a seeded permutation of the training blocks
(a new one for each time through), drops position 0, and puts its tokens in an order that depends on the
seed and c alone. So the state of the stream is one number, and a resumed run reads what an undisturbed
run would have read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atlas.corpus.tokens import TokenStore
from atlas.errors import CorpusError
from atlas.lm.hooks import capture
from atlas.lm.load import LanguageModel
from atlas.sites import Site

BATCH_BLOCKS = 16


class Stream(NamedTuple):
    """What decides the training data: text, its held-out first blocks, sizes and seed."""

    store: TokenStore
    held_out: int
    chunk_tokens: int
    seed: int

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


def harvest_chunk(
    model: LanguageModel, stream: Stream, sites: Sequence[Site], chunk: int
) -> dict[Site, Float[Tensor, "chunk_tokens d_in"]]:
    """The shuffled activations of one chunk at every site."""
    numbers = stream.block_numbers(chunk)
    n = len(numbers) * (stream.store.meta.context - 1)
    order = torch.from_numpy(stream.token_order(chunk)).to(model.device)
    whole: dict[Site, Tensor] = {}
    done = 0
    for start in range(0, len(numbers), BATCH_BLOCKS):
        tokens = torch.from_numpy(stream.store.blocks(numbers[start : start + BATCH_BLOCKS])).to(model.device)
        activations, _ = capture(model, tokens, sites)
        for site, values in activations.items():
            rows = values[:, 1:].reshape(-1, values.shape[-1]).float()
            whole.setdefault(site, rows.new_empty(n, rows.shape[1]))[done : done + len(rows)] = rows
        done += tokens.numel() - len(tokens)
    return {site: values[order] for site, values in whole.items()}
