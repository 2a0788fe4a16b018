"""Which features point the same way? The nearest by cosine, in the same SAE and in others.

Directions can be compared where they lie in the same space: encoders and decoders of one site always;
decoders of whatever writes into the residual stream (z and v by way of W_O) in the stream; encoders of
resid_pre in the stream too, whatever the layer.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from atlas.analysis.weights import Columns, residual_directions
from atlas.errors import SAEError
from atlas.lm.load import LanguageModel
from atlas.lm.runtime import in_lanes
from atlas.sae.model import SAE
from atlas.sae.topk import top_k
from atlas.sites import Site

N_NEIGHBOURS = 5
DIRECTIONS, SCOPES = ("decoder", "encoder"), ("within", "across")
_ROWS, _COLUMNS = 1024, 4096


def neighbours(model: LanguageModel, saes: Sequence[SAE], item: int) -> Columns:
    """Table ``neighbours`` of the SAE ``saes[item]``: its features' 5 nearest, within it and across others.

    ``within`` compares the SAE's own directions; ``across`` those of all other ``saes`` that share a space
    with it. A feature is not its own neighbour, and directions of length zero have and are none, so a
    feature may have fewer rows. Cosines are float32; ties go to the SAE that comes first, then to the
    smaller feature. ``saes`` may load an SAE when it is asked for: one at a time is looked at.

    Raises:
        SAEError: there is no SAE of this number.
    """
    if not 0 <= item < len(saes):
        raise SAEError(f"SAE number {item} does not exist; allowed: 0 to {len(saes) - 1}")
    parts = [_table(model, saes, item, direction, scope) for direction in DIRECTIONS for scope in SCOPES]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def comparable(direction: str, one: Site, other: Site) -> bool:
    """Whether the directions of SAEs on two sites lie in the same space.

    >>> z, resid, q = Site("z", 0), Site("resid_pre", 1), Site("q", 0, 1)
    >>> comparable("decoder", z, resid), comparable("encoder", z, resid), comparable("encoder", z, z)
    (True, False, True)
    >>> comparable("decoder", q, q), comparable("decoder", q, z), comparable("decoder", q, Site("q", 1, 1))
    (True, False, False)
    """
    if one == other:
        return True
    if direction == "encoder":
        return one.kind == other.kind == "resid_pre"
    return not {one.kind, other.kind} & {"q", "k"}


class Nearest:
    """The nearest of everything shown so far to each of some directions.

    >>> near = Nearest(torch.tensor([[1.0, 0.0], [4.0, 3.0], [0.0, 0.0]]), n=1)
    >>> near.show(0, torch.tensor([[0.0, 2.0], [5.0, 0.0], [0.0, 0.0]]))
    >>> [column.tolist() for column in near.rows()]
    [[0, 1], [0, 0], [0, 0], [1, 1], [1.0, 0.800000011920929]]
    """

    def __init__(self, directions: Float[Tensor, "n_rows d"], n: int = N_NEIGHBOURS) -> None:
        self._mine, self._present = _unit(directions)
        shape = (len(directions), n)
        self._cosine = self._mine.new_full(shape, -torch.inf)
        self._sae = torch.zeros(shape, dtype=torch.int64, device=directions.device)
        self._feature = self._sae.clone()

    def show(self, sae: int, directions: Float[Tensor, "n_others d"] | None = None) -> None:
        """Add the features of the SAE of this number, larger than any before; None: those it was made of."""
        others, present = (self._mine, self._present) if directions is None else _unit(directions)
        for first in range(0, len(others), _COLUMNS):
            some = slice(first, first + _COLUMNS)
            own = first if directions is None else None
            look = partial(self._look, others[some], ~present[some], own, sae, first)
            in_lanes(look, range(0, len(self._mine), _ROWS), self._mine.device)

    def _look(
        self,
        others: Float[Tensor, "width d"],
        absent: Bool[Tensor, " width"],
        own: int | None,
        sae: int,
        first: int,
        start: int,
    ) -> None:
        """Compare rows from ``start`` on with a run of others; ``own``: where it begins among the rows."""
        rows = slice(start, start + _ROWS)
        cosine = self._mine[rows] @ others.T
        if absent.any():
            cosine[:, absent] = -torch.inf
        if own is not None:
            # Row start + i is the same feature as column own + j.
            cosine.diagonal(start - own).fill_(-torch.inf)
        self._merge(rows, cosine, sae, first)

    def _merge(self, rows: slice, cosine: Float[Tensor, "n width"], sae: int, first: int) -> None:
        """Those of before come first and lower features before higher ones; a stable sort keeps it so."""
        n = self._cosine.shape[1]
        found, column = top_k(cosine, min(n, cosine.shape[1]))
        found, order = torch.cat([self._cosine[rows], found], 1).sort(dim=1, descending=True, stable=True)
        self._cosine[rows] = found[:, :n]
        for kept, new in ((self._sae, torch.full_like(column, sae)), (self._feature, column + first)):
            kept[rows] = torch.cat([kept[rows], new], 1).gather(1, order[:, :n])

    def rows(self) -> tuple[np.ndarray, ...]:
        """Feature, rank, other SAE, other feature and cosine, sorted by feature, then rank."""
        kept = (self._cosine > -torch.inf) & self._present[:, None]
        feature, rank = kept.nonzero(as_tuple=True)
        found = (feature, rank, self._sae[kept], self._feature[kept], self._cosine[kept].clamp(-1, 1))
        return tuple(column.cpu().numpy() for column in found)


def _table(model: LanguageModel, saes: Sequence[SAE], item: int, direction: str, scope: str) -> Columns:
    near = Nearest(_directions(model, saes[item], direction, scope))
    names = np.full(len(saes), "", dtype=object)
    names[item] = saes[item].info.name
    if scope == "within":
        near.show(item)
    else:
        for number, other in _others(saes, item, direction):
            names[number] = other.info.name
            near.show(number, _directions(model, other, direction, scope))
    feature, rank, sae, other_feature, cosine = near.rows()
    return {
        "feature": feature,
        "direction": np.full(len(feature), direction),
        "scope": np.full(len(feature), scope),
        "rank": rank,
        "other_sae": names[sae],
        "other": other_feature,
        "cosine": cosine,
    }


def _others(saes: Sequence[SAE], item: int, direction: str) -> Iterator[tuple[int, SAE]]:
    site = saes[item].info.site
    for number in range(len(saes)):
        other = saes[number]
        if number != item and comparable(direction, site, other.info.site):
            yield number, other


def _directions(model: LanguageModel, sae: SAE, direction: str, scope: str) -> Float[Tensor, "d_sae d"]:
    """Encoder or decoder directions; decoders in the stream where others are to be compared there."""
    if direction == "encoder":
        return sae.encoder_directions.T
    stream = residual_directions(model, sae) if scope == "across" else None
    return sae.decoder_directions if stream is None else stream


def _unit(directions: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Bool[Tensor, " n"]]:
    """Directions of length one, and which of them had a length at all."""
    norm = directions.norm(dim=1, keepdim=True)
    present = norm > 0
    return (directions / torch.where(present, norm, 1)).contiguous(), present.squeeze(1)
