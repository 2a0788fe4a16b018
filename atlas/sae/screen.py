"""The features that fire, found without computing what all others would be.

Of 3,072 pre-activations of a token a TopK SAE keeps 32. A processor with matrix units for bfloat16 computes
all of them in a fifth of the time that float32 takes, too roughly to be used, and well enough to rule out
nearly all. What is computed is an upper bound. With x^ and w^ the bfloat16 of a token x and of a feature's
direction w, seen from a centre c (b_dec),

    x . w + b  =  (x - c) . w + (b + c . w)
              <=  x^ . w^ + (b + c . w) + |x - c - x^| |w| + |x^| |w - w^|         (Cauchy-Schwarz)

plus what float32 may lose in adding up. Bias and bounds are five more columns of the product, so that it
gives the bound itself. Features whose bound says that they may fire are then computed in float32
(``atlas.kernels.screen``). Nothing is estimated: it is the same selection as from all pre-activations, ties
included, and each is x . w + b, added up in one order whatever the batch.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
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

_COLUMNS, _TILE = 5, 32
_ROOM = 64
"""Features that may be found per row on average, before a batch is looked at in several parts."""
_UP, _TINY = 1 + 2**-7, 1e-20
"""What makes up for rounding a bound to bfloat16, and for numbers that matrix units take for zero."""
_LARGEST_NORM = 1e15
"""Of tokens and directions that are looked at: nothing may overflow."""


@lru_cache(maxsize=1)
def is_fast() -> bool:
    """Whether this machine's processor has matrix units for bfloat16 (AMX)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False)) and torch.backends.mkldnn.is_available()


def suits(sae: SAE) -> bool:
    """Whether an SAE can be screened: on a CPU, not gated, no TopK that keeps a good part of its features."""
    if sae.W_enc.device.type != "cpu" or sae.activation == "gated" or sae.d_sae < MEMBERS * MEMBERS:
        return False
    if sae.activation == "topk" and 2 * (sae.info.k or sae.d_sae) > sae.d_sae // MEMBERS:
        return False
    return all(float(t.norm()) < _LARGEST_NORM for t in (sae.encoder_directions, sae.bias_term, sae.b_dec))


class Seen(NamedTuple):
    """Some tokens as the SAE reads them, and the keys of upper bounds of their pre-activations."""

    x: Floats
    keys: Keys
    """[n, d_sae]; bits of bfloat16 until ``Screen.firing`` has read them."""
    slack: Floats
    """How far below its bound a pre-activation of each token may be."""


class Screen:
    """Tells which features of an SAE that ``suits`` fire on some tokens."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.weights: Floats = sae.encoder_directions.T.float().contiguous().numpy()
        self.bias: Floats = sae.bias_term.float().contiguous().numpy()
        self._centre = sae.b_dec.float()
        # What float32 may lose twice, in the product and in the numbers themselves, and then some.
        self._loss = (sae.d_in + _TILE) * 2.0**-21
        self._table, self._largest = self._make_table()
        threshold = torch.zeros(sae.d_sae) if sae.threshold is None else sae.threshold.float().clamp_min(0)
        self._threshold: Floats = threshold.numpy()
        self._least = floors(self._threshold)

    def _make_table(self) -> tuple[Float[Tensor, "columns d_sae"], list[float]]:
        """Directions, bias in two parts, and what a token's bounds are multiplied by; the largest of these."""
        W, b = torch.from_numpy(self.weights), torch.from_numpy(self.bias)
        wide, size, _, off = _rounded(W)
        whole = b + W @ self._centre
        high = whole.bfloat16().float()
        low = (whole - high).bfloat16().float()
        lost = (whole - high - low).abs() + self._loss * (b.abs() + size * self._centre.norm()) + _TINY
        bounds = [column * _UP for column in (size, off, lost)]
        return _with_columns(wide, self.sae.d_in, [high, low, *bounds]).T, [float(c.max()) for c in bounds]

    def look(self, x: Float[Tensor, "n d_in"]) -> Seen | None:
        """Upper bounds for tokens as the SAE reads them; None if one is not finite or too large to be looked at."""
        x = x.contiguous()
        wide, size, near, off = _rounded(x - self._centre)
        if not bool(size.max() < _LARGEST_NORM):
            return None
        one = torch.ones_like(size)
        bounds = [(off + self._loss * size) * _UP, near * _UP, one]
        tokens = _with_columns(wide, self.sae.d_in, [one, one, *bounds])
        keys = (tokens @ self._table).view(torch.int16).numpy()
        # The bound of a bound: it is rounded up twice, and what it holds may be as far off as that again.
        slack = 2 * _UP**2 * sum(b * largest for b, largest in zip(bounds, self._largest, strict=True))
        return Seen(x.numpy(), keys, slack.numpy())

    def firing(self, seen: Seen) -> Active:
        """The features that fire, by row and then feature; afterwards ``seen`` has keys."""
        parts, done, n = [], 0, len(seen.x)
        at = np.zeros(n + 1, np.int64)
        feature = np.empty(_ROOM * n + 2 * self.sae.d_sae, np.int32)
        place, exact = np.empty_like(feature), np.empty(len(feature), np.float32)
        maxima = np.empty(self.sae.d_sae // MEMBERS, np.int16)
        while done < n:
            if self.sae.activation == "topk":
                k = min(self.sae.info.k or self.sae.d_sae, self.sae.d_sae)
                looked = find_largest(seen.keys[done:], k, seen.slack[done:], maxima, at, feature)
            else:
                looked = find_reaching(seen.keys[done:], self._least, at, feature)
            x = seen.x[done : done + looked]
            compute(at, feature, x, self.weights, self.bias, place, exact)
            row, of, value = self._chosen(at[: looked + 1], feature, exact)
            parts.append((row + done, of, value))
            done += looked
        return Active(*(torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)))

    def _chosen(self, at: Ints, feature: Bits, exact: Floats) -> tuple[Ints, Ints, Floats]:
        """Row, feature and activation of what fires, of the features that were found."""
        if self.sae.activation == "topk":
            shape = len(at) - 1, min(self.sae.info.k or self.sae.d_sae, self.sae.d_sae)
            index, value = np.empty(shape, np.int64), np.empty(shape, np.float32)
            choose_largest(at, feature, exact, index, value)
            if (value > 0).all():
                return np.repeat(np.arange(shape[0]), shape[1]), index.ravel(), value.ravel()
            row, slot = np.nonzero(value > 0)
            return row, index[row, slot], value[row, slot]
        feature, exact = feature[: at[-1]], exact[: at[-1]]
        fires = exact > self._threshold[feature]
        row = np.repeat(np.arange(len(at) - 1), np.diff(at))
        return row[fires], feature[fires].astype(np.int64), exact[fires]


def _rounded(rows: Float[Tensor, "n d_in"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In bfloat16 and as wide as matrix units like it; norms of the rows, of the rounded, of the difference."""
    n, d_in = rows.shape
    width = -(-(d_in + _COLUMNS) // _TILE) * _TILE
    wide = torch.zeros(n, width, dtype=torch.bfloat16)
    norms = [torch.empty(n) for _ in range(3)]
    round_rows(rows.contiguous().numpy(), wide.view(torch.int16).numpy(), *(norm.numpy() for norm in norms))
    return wide, *norms


def _with_columns(wide: Tensor, at: int, columns: list[Tensor]) -> Tensor:
    wide[:, at : at + _COLUMNS] = torch.stack(columns, 1)
    return wide
