"""Several token stores read as one, so that text can be added without moving what is there.

The store of a build holds the first ``corpus.blocks`` blocks of the text in a seeded order, so it changes
throughout when that number grows. Text beyond it lies in extensions that cover fixed ranges of blocks, each
shuffled within itself: more of them leave the earlier ones, and all that was made of them, as they were.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from atlas.corpus.tokens import TokenStore
from atlas.errors import CorpusError

_SHARED = ("corpus", "context", "bos", "dtype")


def extension_ranges(first: int, wanted: int) -> list[range]:
    """Which blocks of the text go in which extension? Doubling ranges until ``wanted`` blocks are covered.

    [n, 2n), [2n, 4n), [4n, 8n) ... with n = ``first``, the blocks of the first store. Each range is whole
    whatever ``wanted`` is, so that its blocks keep their places when ``wanted`` grows.

    Raises:
        CorpusError: the first store would hold no block.

    >>> extension_ranges(80, 80)
    []
    >>> extension_ranges(80, 200)
    [range(80, 160), range(160, 320)]
    """
    if first < 1:
        raise CorpusError(f"a first store of {first} blocks cannot be extended; it needs at least 1")
    found: list[range] = []
    while (covered := first << len(found)) < wanted:
        found.append(range(covered, 2 * covered))
    return found


class TextStores(TokenStore):
    """The blocks of several token stores, one store after the other, as one read-only store.

    ``meta`` adds up blocks, documents and characters; a document cut in two by the end of a store counts
    in both. An extension may be empty (the text ended before it).

    Raises:
        CorpusError: there is no store, or they differ in corpus, context, BOS or token type.
    """

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        if not stores:
            raise CorpusError("a text needs at least one token store; 0 given")
        first = stores[0].meta
        for number, store in enumerate(stores):
            for name in _SHARED:
                found, asked = getattr(store.meta, name), getattr(first, name)
                if found != asked:
                    raise CorpusError(
                        f"token stores of one text must agree in {name}: "
                        f"the first has {asked!r}, number {number} has {found!r}"
                    )
        self._stores = tuple(stores)
        self._ends = np.cumsum([len(store) for store in stores])
        self.meta = replace(
            first,
            n_blocks=int(self._ends[-1]),
            documents=sum(store.meta.documents for store in stores),
            characters=sum(store.meta.characters for store in stores),
        )

    def blocks(self, index: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Token ids [len(index), context] of the blocks asked for."""
        block = np.asarray(index, np.int64)
        out = np.empty((*block.shape, self.meta.context), np.int64)
        where, local = self._place(block)
        for number in np.unique(where):
            mine = where == number
            out[mine] = self._stores[number].blocks(local[mine])
        return out

    def at(self, block: npt.NDArray[np.int64], position: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Token ids of single occurrences."""
        block, position = np.broadcast_arrays(np.asarray(block, np.int64), position)
        out = np.empty(block.shape, np.int64)
        where, local = self._place(block)
        for number in np.unique(where):
            mine = where == number
            out[mine] = self._stores[number].at(local[mine], position[mine])
        return out

    def source(self, block: int) -> str:
        """The document in which the block begins."""
        where, local = self._place(np.asarray(block))
        return self._stores[int(where)].source(int(local))

    def _place(self, block: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Each block's store, and its number there."""
        outside = block[(block < 0) | (block >= self.meta.n_blocks)]
        if outside.size:
            raise IndexError(f"block {outside.flat[0]} is outside of the {self.meta.n_blocks} of the text")
        where = np.searchsorted(self._ends, block, side="right")
        begins = np.concatenate([[0], self._ends[:-1]])
        return where, block - begins[where]
