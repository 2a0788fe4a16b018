"""Contributions by head and source of kept examples: all of them, and what is kept of them.

The formula is in ``atlas.analysis.dfa``.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.analysis.acts import Ints, first_of_runs
from atlas.kernels.contributions import attribute, read_rows
from atlas.kernels.sources import MOST_SOURCES, keep_largest


class Places(NamedTuple):
    """Where examples are, one block after the other: feature, block of the batch and position of each."""

    feature: Ints
    block: Ints
    position: Ints
    is_top: npt.NDArray[np.bool_]

    def by_block(self) -> Iterator[tuple[int, slice]]:
        """Each block of the batch that has examples, and which they are."""
        for low, high in pairwise([*first_of_runs(self.block).tolist(), len(self.block)]):
            yield int(self.block[low]), slice(low, high)


def contributions(
    pattern: Float[Tensor, "heads query key"],
    v: Float[Tensor, "key heads d_head"],
    directions: Float[Tensor, "n heads d_head"],
    position: Int[Tensor, " n"],
    out: Float[Tensor, "n heads key"] | None = None,
) -> Float[Tensor, "n heads key"]:
    """The dense DFA of n examples in one block: example i reads directions[i] at position[i].

    >>> pattern = torch.tensor([[[1.0, 0.0], [0.25, 0.75]]])
    >>> v = torch.tensor([[[2.0]], [[4.0]]])
    >>> contributions(pattern, v, torch.tensor([[[1.0]]]), torch.tensor([1])).tolist()
    [[[0.5, 3.0]]]
    """
    per_source = _read(directions, v)
    # Written example by example: everything that follows reads one example's heads and sources together.
    dense = per_source.new_empty(len(position), *pattern.shape[::2]) if out is None else out
    return torch.mul(pattern[:, position].transpose(0, 1), per_source.transpose(0, 1), out=dense)


def linear_parts(
    x: Float[Tensor, "blocks pos d_in"], places: Places, weights: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, " n"]:
    """x . W of each example: its position's activation times its feature's row."""
    if x.device.type == "cpu":
        out = np.empty(len(places.feature), np.float32)
        # Of rows with gaps between their numbers another loop is compiled, which adds up in another order.
        near, rows = x.float().contiguous().numpy(), weights.contiguous().numpy()
        read_rows(near, places.block, places.position, rows, places.feature, out)
        return torch.from_numpy(out)
    feature, block, position = (torch.from_numpy(part).to(x.device) for part in places[:3])
    return torch.linalg.vecdot(x[block, position].float(), weights[feature])


def _read(
    directions: Float[Tensor, "n heads d_head"], v: Float[Tensor, "key heads d_head"]
) -> Float[Tensor, "heads n key"]:
    """v . direction of each head at each source."""
    return directions.transpose(0, 1) @ v.permute(1, 2, 0)


class Largest(NamedTuple):
    """Places in head x source and values [n, 32] of the largest contributions, and how many are kept."""

    place: Ints
    value: npt.NDArray[np.float32]
    n: Ints
    best: Ints
    """The place of the largest positive contribution; -1 where there is none."""

    @classmethod
    def empty(cls, n: int) -> "Largest":
        """Room for n examples."""
        place, value = np.empty((n, MOST_SOURCES), np.int64), np.empty((n, MOST_SOURCES), np.float32)
        return cls(place, value, np.empty(n, np.int64), np.empty(n, np.int64))

    def at(self, rows: slice) -> "Largest":
        """Some of the examples."""
        return Largest(self.place[rows], self.value[rows], self.n[rows], self.best[rows])


def largest(dense: Float[Tensor, "n heads key"], position: Ints) -> Largest:
    """The largest contributions by magnitude, largest first; ties go to the lower head, then source.

    As many as reach 95 % of the absolute sum, at most 32; exact zeros never count. Sources after an
    example's position contribute nothing and are not looked at.

    >>> found = largest(torch.tensor([[[3.0, -4.0, 0.25, 0.0]]]), np.array([3]))
    >>> found.place[0, :2].tolist(), found.value[0, :2].tolist(), found.n.tolist(), found.best.tolist()
    ([1, 0], [-4.0, 3.0], [2], [0])
    """
    found = Largest.empty(len(dense))
    keep_largest(dense.float().cpu().numpy(), position, *found)
    return found


class Attributed(NamedTuple):
    """What is kept of the dense DFA of some examples."""

    largest: Largest
    by_head: Float[Tensor, "n heads"]
    top: Float[np.ndarray, "n_top heads key"]
    """All of it, of top examples alone."""


def attributed(
    places: Places,
    pattern: Float[Tensor, "blocks heads query key"],
    v: Float[Tensor, "blocks key heads d_head"],
    directions: Float[Tensor, "d_sae heads d_head"],
    per_unit: Float[Tensor, " n"],
) -> Attributed:
    """DFA of examples, times ``per_unit`` of each.

    On a CPU an example is made, looked at and forgotten before the next one: all of them written out would go
    to memory and back three times.
    """
    at = by_example if pattern.device.type == "cpu" else by_block
    return at(places, pattern, v, directions, per_unit)


def by_block(places: Places, pattern: Tensor, v: Tensor, directions: Tensor, per_unit: Tensor) -> Attributed:
    """``attributed`` from the dense DFA of all examples, block after block."""
    feature, position = (torch.from_numpy(a).to(v.device) for a in (places.feature, places.position))
    dense = directions.new_empty(len(feature), directions.shape[1], pattern.shape[3])
    for j, rows in places.by_block():
        mine = directions[feature[rows]]
        contributions(pattern[j].float(), v[j].float(), mine, position[rows], dense[rows])
    dense = (dense * per_unit[:, None, None]).cpu()
    top = dense[torch.from_numpy(places.is_top)].numpy()
    return Attributed(largest(dense, places.position), dense.sum(2), top)


def by_example(
    places: Places, pattern: Tensor, v: Tensor, directions: Tensor, per_unit: Tensor
) -> Attributed:
    """``attributed`` on a CPU."""
    n, heads, key = len(places.feature), directions.shape[1], pattern.shape[3]
    found, by_head = Largest.empty(n), np.empty((n, heads), np.float32)
    is_top = places.is_top
    slot = np.where(is_top, is_top.cumsum() - 1, -1)
    top = np.zeros((int(is_top.sum()), heads, key), np.float32)
    for j, rows in places.by_block():
        read = _read(directions[torch.from_numpy(places.feature[rows])], v[j].float()).numpy()
        weights, position, some = pattern[j].float().numpy(), places.position[rows], found.at(rows)
        kept = some.place, some.value, some.n, some.best
        attribute(weights, read, position, per_unit[rows].numpy(), by_head[rows], *kept, slot[rows], top)
    return Attributed(found, torch.from_numpy(by_head), top)
