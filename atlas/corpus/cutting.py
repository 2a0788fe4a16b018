"""Documents to token blocks: one long stream, cut into runs of equal length, written as it goes.

Nothing but the unfinished run and a number per block stays in memory, however long the text.
"""

from array import array
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

_AT_ONCE = 1 << 10


class Cutter:
    """Cuts the joined stream of documents into blocks and writes those from ``skip`` to ``skip + limit``.

    Documents are joined by BOS, and BOS is put before each run of ``context - 1`` tokens. Where a block ends
    does not depend on ``skip`` or ``limit``, so two cutters that share the text can share its blocks.

    >>> import io
    >>> whole, rest = io.BytesIO(), io.BytesIO()
    >>> for out, skip in ((whole, 0), (rest, 1)):
    ...     cutter = Cutter(out, np.dtype("uint8"), context=3, bos=0, skip=skip, limit=9)
    ...     cutter.add("a", 9, [1, 2, 3])
    ...     cutter.add("b", 9, [4, 5])
    >>> list(whole.getvalue()), list(rest.getvalue()), cutter.names
    ([0, 1, 2, 0, 3, 0, 0, 4, 5], [0, 3, 0, 0, 4, 5], ['a', 'b'])
    """

    def __init__(
        self, out: BinaryIO, dtype: npt.DTypeLike, *, context: int, bos: int, skip: int, limit: int
    ) -> None:
        self.context, self.bos, self.skip, self.limit = context, bos, skip, limit
        self.names: list[str] = []
        """The documents in which written blocks begin."""
        self.block_document = array("q")
        """The number of that document, for each written block."""
        self.n_cut = self.documents = self.characters = self.read = 0
        self._out, self._run = out, np.empty(0, dtype)
        self._run_owner = (0, "")
        self._seen, self._named = 0, -1

    @property
    def n_blocks(self) -> int:
        """Blocks written."""
        return len(self.block_document)

    @property
    def n_tokens(self) -> int:
        """Tokens since the last skipped block; 0 if the text ended before it."""
        return max(0, (self.n_cut - self.skip) * (self.context - 1) + len(self._run))

    @property
    def full(self) -> bool:
        """Whether every block that was asked for is written."""
        return self.n_blocks >= self.limit

    def add(self, source: str, characters: int, ids: list[int]) -> None:
        """Cut one document. ``documents`` and ``characters`` count those that reach behind ``skip``."""
        self.read += characters
        if not ids:
            return  # an empty document would leave nothing but a BOS
        owner, opening = (self._seen, source), [self.bos] if self._seen else []
        self._seen += 1
        begun, width = len(self._run) > 0, self.context - 1
        stream = np.concatenate([self._run, np.array([*opening, *ids], self._run.dtype)])
        n = min(len(stream) // width, self.skip + self.limit - self.n_cut)
        self._write(stream[: n * width].reshape(n, width), self._run_owner if begun else owner, owner)
        if n > 0 or not begun:
            self._run_owner = owner
        self._run = stream[n * width :].copy()
        if self.n_tokens > 0:
            self.documents += 1
            self.characters += characters

    def _write(self, runs: npt.NDArray[np.integer], first: tuple[int, str], owner: tuple[int, str]) -> None:
        """Write the runs that are not skipped; the first one begins in ``first``, the others in ``owner``."""
        drop = min(max(self.skip - self.n_cut, 0), len(runs))
        self.n_cut += len(runs)
        for number in range(drop, len(runs)):
            self.block_document.append(self._number(owner if number else first))
        with_bos = np.full((len(runs) - drop, self.context), self.bos, runs.dtype)
        with_bos[:, 1:] = runs[drop:]
        self._out.write(with_bos.tobytes())

    def _number(self, owner: tuple[int, str]) -> int:
        if owner[0] != self._named:
            self._named = owner[0]
            self.names.append(owner[1])
        return len(self.names) - 1


def write_in_order(
    out: BinaryIO, blocks: npt.NDArray[np.integer], order: npt.NDArray[np.integer], at_once: int = _AT_ONCE
) -> None:
    """Write the blocks in another order, some at a time: they may be a file larger than the memory.

    >>> import io
    >>> out = io.BytesIO()
    >>> write_in_order(out, np.array([[1, 2], [3, 4], [5, 6]], np.uint8), np.array([2, 0, 1]), at_once=2)
    >>> list(out.getvalue())
    [5, 6, 1, 2, 3, 4]
    """
    starts = range(0, len(order), at_once)
    out.writelines(blocks[order[start : start + at_once]].tobytes() for start in starts)
