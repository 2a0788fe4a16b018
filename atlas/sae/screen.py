"""Which of many products are the largest, or above a threshold, without computing the others.

Of 3,072 pre-activations of a token a TopK SAE keeps 32. A processor with matrix units for bfloat16 computes
all of them in a fifth of the time that float32 takes, too roughly to be used, and well enough to rule out
nearly all. What is computed is an upper bound. With x^ and w^ the bfloat16 of a token x and of a feature's
direction w, seen from a centre c,

    x . w + b  =  (x - c) . w + (b + c . w)
              <=  x^ . w^ + (b + c . w) + |x - c - x^| |w| + |x^| |w - w^|         (Cauchy-Schwarz)

plus what float32 may lose in adding up. Bias and bounds are five more columns of the product, so that it
gives the bound itself. What a bound does not rule out is computed in float32 (``atlas.kernels.screen``).
Nothing is estimated: it is the same selection as from all products, ties included, and each is x . w + b,
added up in one order whatever the batch.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.kernels.screen import (
    MEMBERS,
    Bits,
    Floats,
    Ints,
    Keys,
    choose_largest,
    compute,
    find_largest,
    find_reaching,
    floors,
    round_rows,
)
from atlas.sae.model import SAE, Active
from atlas.sae.precision import fast_bfloat16

_COLUMNS, _TILE = 5, 32
_ROOM = 64
"""Products that may be computed per row on average, before a batch is looked at in several parts."""
_UP, _TINY = 1 + 2**-7, 1e-20
"""What makes up for rounding a bound to bfloat16, and for numbers that matrix units take for zero."""
_LARGEST_NORM, _TINY_NORM = 1e15, 2e-19
"""Of rows and directions that are looked at: nothing may overflow. Squares of tiny numbers are lost."""


class Seen(NamedTuple):
    """Some rows, and the keys of upper bounds of their products."""

    x: Floats
    keys: Keys
    """[n, width]; bits of bfloat16 until the products were looked for."""
    slack: Floats
    """How far below its bound a product of each row may be."""


class Screen:
    """Finds products of rows x with directions w, x . w + b, on a CPU.

    >>> screen = Screen(torch.eye(64))
    >>> seen = screen.look(torch.arange(64.0).flip(0)[None])
    >>> index, value = screen.largest(seen, 2)
    >>> index.tolist(), value.tolist()
    ([[0, 1]], [[63.0, 62.0]])
    """

    def __init__(
        self,
        directions: Float[Tensor, "width d"],
        bias: Float[Tensor, " width"] | None = None,
        centre: Float[Tensor, " d"] | None = None,
    ) -> None:
        W = directions.float().contiguous()
        b = W.new_zeros(len(W)) if bias is None else bias.float().contiguous()
        self._centre = W.new_zeros(W.shape[1]) if centre is None else centre.float()
        self.weights: Floats = W.numpy()
        self.bias: Floats = b.numpy()
        # What float32 may lose twice, in the product and in the numbers themselves, and then some.
        self._loss = (W.shape[1] + _TILE) * 2.0**-21
        wide, size, _, off = _rounded(W)
        whole = b + W @ self._centre
        high = whole.bfloat16().float()
        low = (whole - high).bfloat16().float()
        lost = (whole - high - low).abs() + self._loss * (b.abs() + size * self._centre.norm()) + _TINY
        bounds = [column * _UP for column in (size, off, lost)]
        self._table = _with_columns(wide, W.shape[1], [high, low, *bounds]).T
        self._largest = torch.stack([column.max() for column in bounds])

    @staticmethod
    def suits(width: int, k: int) -> bool:
        """Whether the k largest of so many products can be found: a small part of them."""
        return 2 * k <= width // MEMBERS and width >= MEMBERS * MEMBERS

    def look(self, x: Float[Tensor, "n d"]) -> Seen | None:
        """Upper bounds for some rows; None if one is not finite or too large to be looked at."""
        x = x.contiguous()
        wide, size, near, off = _rounded(x - self._centre)
        if not bool(size.max() < _LARGEST_NORM):
            return None
        one = torch.ones_like(size)
        bounds = [(off + self._loss * size) * _UP, near * _UP, one]
        rows = _with_columns(wide, x.shape[1], [one, one, *bounds])
        keys = (rows @ self._table).view(torch.int16).numpy()
        # The bound of a bound: it is rounded up twice, and what it holds may be as far off as that again.
        slack = 2 * _UP**2 * (torch.stack(bounds, 1) @ self._largest)
        return Seen(x.numpy(), keys, slack.numpy())

    def largest(self, seen: Seen, k: int) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
        """Indices of the k largest products of each row, ascending, and values; ties: the lower index."""
        maxima = np.empty(len(self.weights) // MEMBERS, np.int16)

        def find(rows: slice, at: Ints, found: Bits) -> int:
            return int(find_largest(seen.keys[rows], k, seen.slack[rows], maxima, at, found))

        index, value = np.empty((len(seen.x), k), np.int64), np.empty((len(seen.x), k), np.float32)
        for rows, at, found, exact in self._computed(seen, find):
            choose_largest(at, found, exact, index[rows], value[rows])
        return torch.from_numpy(index), torch.from_numpy(value)

    def above(self, seen: Seen, threshold: Floats, least: Keys) -> tuple[Ints, Ints, Floats]:
        """Row, index and value of the products above their own threshold; ``least``: ``floors`` of these."""

        def find(rows: slice, at: Ints, found: Bits) -> int:
            return int(find_reaching(seen.keys[rows], least, at, found))

        parts = []
        for rows, at, found, exact in self._computed(seen, find):
            fires = exact > threshold[found]
            row = np.repeat(np.arange(rows.start, rows.stop), np.diff(at))
            parts.append((row[fires], found[fires].astype(np.int64), exact[fires]))
        row, index, value = (np.concatenate(column) for column in zip(*parts, strict=True))
        return row, index, value

    def _computed(
        self, seen: Seen, find: Callable[[slice, Ints, Bits], int]
    ) -> Iterator[tuple[slice, Ints, Bits, Floats]]:
        """Runs of rows, where each row's products begin, which of them ``find`` found, and their values."""
        n, done = len(seen.x), 0
        at = np.zeros(n + 1, np.int64)
        found = np.empty(_ROOM * n + 2 * len(self.weights), np.int32)
        place, exact = np.empty_like(found), np.empty(len(found), np.float32)
        while done < n:
            looked = find(slice(done, n), at, found)
            rows, edges = slice(done, done + looked), at[: looked + 1]
            compute(edges, found, seen.x[rows], self.weights, self.bias, place, exact)
            yield rows, edges, found[: edges[-1]], exact[: edges[-1]]
            done += looked


class Firing:
    """Tells which features of an SAE that ``suits`` fire on some tokens."""

    def __init__(self, sae: SAE) -> None:
        self.k = min(sae.info.k or sae.d_sae, sae.d_sae) if sae.activation == "topk" else None
        self.screen = Screen(sae.encoder_directions.T, sae.bias_term, sae.b_dec)
        threshold = torch.zeros(sae.d_sae) if sae.threshold is None else sae.threshold.float().clamp_min(0)
        self._threshold: Floats = threshold.numpy()
        self._least = floors(self._threshold)

    @staticmethod
    def suits(sae: SAE) -> bool:
        """Whether it is on a CPU fast in bfloat16, not gated, and no TopK that keeps many features."""
        device = sae.W_enc.device
        if sae.activation == "gated" or device.type != "cpu" or not fast_bfloat16(device):
            return False
        k = sae.info.k or sae.d_sae
        few = Screen.suits(sae.d_sae, k if sae.activation == "topk" else 1)
        tensors = (sae.encoder_directions, sae.bias_term, sae.b_dec)
        return few and all(float(t.norm()) < _LARGEST_NORM for t in tensors)

    def of(self, seen: Seen) -> Active:
        """The features that fire, by row and then feature; afterwards ``seen`` has keys."""
        if self.k is None:
            row, feature, value = self.screen.above(seen, self._threshold, self._least)
            return Active(torch.from_numpy(row), torch.from_numpy(feature), torch.from_numpy(value))
        return Active.largest(*self.screen.largest(seen, self.k))


def _rounded(rows: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In bfloat16, as wide as matrix units like it; norms of rows, of the rounded, of the difference."""
    n, d = rows.shape
    wide = torch.zeros(n, -(-(d + _COLUMNS) // _TILE) * _TILE, dtype=torch.bfloat16)
    norms = [torch.empty(n) for _ in range(3)]
    round_rows(rows.contiguous().numpy(), wide.view(torch.int16).numpy(), *(norm.numpy() for norm in norms))
    return wide, *(norm + _TINY_NORM * d**0.5 for norm in norms)


def _with_columns(wide: Tensor, at: int, columns: list[Tensor]) -> Tensor:
    wide[:, at : at + _COLUMNS] = torch.stack(columns, 1)
    return wide
