"""The summarised text, looked up by token occurrence (block * context + position)."""

from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
_AT_ONCE = 4096


@runtime_checkable
class Blocks(Protocol):
    """Token blocks: a token store, or an array that acts like one."""

    def blocks(self, index: npt.ArrayLike) -> Ints:
        """Token ids [len(index), context]."""
        ...

    def at(self, block: Ints, position: Ints) -> Ints:
        """Token ids of single occurrences."""
        ...


class ArrayBlocks:
    """Token blocks held in an array [n_blocks, context].

    >>> ArrayBlocks(np.array([[0, 5], [0, 7]])).at(np.array([1]), np.array([1])).tolist()
    [7]
    """

    def __init__(self, tokens: npt.NDArray[np.integer]) -> None:
        self.tokens = tokens

    def blocks(self, index: npt.ArrayLike) -> Ints:
        """Token ids [len(index), context]."""
        return self.tokens[np.asarray(index)].astype(np.int64)

    def at(self, block: Ints, position: Ints) -> Ints:
        """Token ids of single occurrences."""
        return self.tokens[block, position].astype(np.int64)


class Text:
    """The first ``n_blocks`` blocks of a token store, and the size of the vocabulary."""

    def __init__(self, store: Blocks, n_blocks: int, context: int, d_vocab: int) -> None:
        self.store, self.n_blocks, self.context, self.d_vocab = store, n_blocks, context, d_vocab

    @property
    def n_tokens(self) -> int:
        """Evaluated tokens: all but position 0."""
        return self.n_blocks * (self.context - 1)

    def token(self, occurrence: Ints) -> Ints:
        """Token ids at occurrences."""
        block = occurrence // self.context
        return self.store.at(block, occurrence - block * self.context)

    def occurrences(self, first: int) -> Ints:
        """How often each token id stands at position ``first`` (1 or 2) or later, [d_vocab]."""
        return self._counts[first - 1]

    @cached_property
    def _counts(self) -> tuple[Ints, Ints]:
        later, second = np.zeros(self.d_vocab, np.int64), np.zeros(self.d_vocab, np.int64)
        for start in range(0, self.n_blocks, _AT_ONCE):
            tokens = self.store.blocks(np.arange(start, min(start + _AT_ONCE, self.n_blocks)))
            later += np.bincount(tokens[:, 2:].ravel(), minlength=self.d_vocab)
            second += np.bincount(tokens[:, 1:2].ravel(), minlength=self.d_vocab)
        return later + second, later
