"""Key features that follow a token, query features that are one, and features of positions: found by rule.

The rules read the columns of the ``features`` table. Source: seed 000, rows A5, A7, A16.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

LEAST_SHARE, LEAST_ACTIVE, ONE_POSITION, STRONGEST = 0.5, 10, 0.9, 2000
Columns = Mapping[str, npt.NDArray[Any]]


class Follower(NamedTuple):
    """A feature whose strongest tokens come after one token."""

    feature: int
    token: int
    share: float


def followers(k: Columns, n: int, bos: int) -> list[Follower]:
    """The ``n`` clearest "I follow X" features of a key SAE, each of another X, clearest first.

    At least half of the 200 strongest tokens follow X, which is not BOS, and the feature is not about one
    place or one token itself: those shares are below a half. Ties go to the feature that fires more often,
    then to the lower one.

    >>> k = {"n_active": [50, 50, 9], "top_previous_token": [4, 4, 5], "top_previous_share": [0.6, 0.9, 1.0],
    ...      "top_token_share": [0.1, 0.1, 0.1], "top_position_share": [0.1, 0.1, 0.1]}
    >>> [one.feature for one in followers({name: np.array(v) for name, v in k.items()}, 4, bos=0)]
    [1]
    """
    share = np.nan_to_num(k["top_previous_share"].astype(np.float64))
    about_else = np.maximum(
        np.nan_to_num(k["top_token_share"].astype(np.float64)),
        np.nan_to_num(k["top_position_share"].astype(np.float64)),
    )
    usable = (share >= LEAST_SHARE) & (k["n_active"] >= LEAST_ACTIVE) & (about_else < LEAST_SHARE)
    found: dict[int, Follower] = {}
    for feature in np.lexsort((np.arange(len(share)), -k["n_active"], -share)):
        token = k["top_previous_token"][feature]
        if usable[feature] and token != bos and int(token) not in found and len(found) < n:
            found[int(token)] = Follower(int(feature), int(token), float(share[feature]))
    return list(found.values())


class Places(NamedTuple):
    """Features that belong to one position, and how those of the two sides fit together."""

    positional: npt.NDArray[np.int64]
    """Features of which nine tenths of the strongest tokens are at one position, as far as they could be."""
    position: npt.NDArray[np.int64]

    @property
    def covered(self) -> int:
        """Positions that have such a feature."""
        return len(np.unique(self.position))


def places(of: Columns, n_blocks: int) -> Places:
    """The positional features of an SAE, by position and then by number.

    A feature's strongest tokens are 2000, or all on which it fires; a text of fewer blocks has not that many
    at one position, and the nine tenths are of those that it has.
    """
    share = np.nan_to_num(of["top_position_share"].astype(np.float64))
    strongest = np.clip(of["n_active"], 1, STRONGEST)
    most = np.minimum(1.0, n_blocks / strongest)
    found = np.flatnonzero((share >= ONE_POSITION * most) & (of["n_active"] >= LEAST_ACTIVE))
    position = of["top_position"][found].astype(np.int64)
    order = np.lexsort((found, position))
    return Places(found[order], position[order])


class Diagonal(NamedTuple):
    """How q-feature x k-feature products are spread over distances; NaN where there is nothing to compare."""

    share: float
    """Of the positional query features, those whose best positional key feature is one position earlier."""
    on: float
    """Mean product with key features one position earlier."""
    off: float
    """Mean product with the key features of all other positions."""
    n: int
    """Positional query features that have a positional key feature one position earlier."""


def subdiagonal(products: npt.NDArray[np.float32], q: Places, k: Places) -> Diagonal:
    """Seed 000's dark line one below the diagonal, as numbers; ``products`` are of all features [q, k].

    >>> q, k = Places(np.array([0, 1]), np.array([2, 3])), Places(np.array([0, 1]), np.array([1, 2]))
    >>> subdiagonal(np.array([[5.0, 1.0], [0.0, 4.0]], np.float32), q, k)
    Diagonal(share=1.0, on=4.5, off=0.5, n=2)
    """
    if not len(q.positional) or not len(k.positional):
        return Diagonal(np.nan, np.nan, np.nan, 0)
    table = products[np.ix_(q.positional, k.positional)].astype(np.float64)
    before = k.position[None, :] == q.position[:, None] - 1
    able = before.any(1)
    best = before[np.arange(len(table)), table.argmax(1)]
    share = float(best[able].mean()) if able.any() else np.nan
    on, off = (float(table[m].mean()) if m.any() else np.nan for m in (before, ~before))
    return Diagonal(share, on, off, int(able.sum()))
