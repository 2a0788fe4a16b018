"""How many weights a model multiplies with, from the headers of its files: no torch, nothing is loaded."""

import json
import re
import struct
from math import prod
from typing import NamedTuple

from atlas.lm.files import ModelFiles, read_shape

_LAYER = re.compile(r"(?:^|\.)(?:h|layers|blocks)\.(\d+)\.")
_MOST_HEADER = 100_000_000


class ModelSizes(NamedTuple):
    """What decides the cost of a forward pass."""

    per_layer: int
    """Entries of the weight matrices of one layer, on average."""
    n_layers: int
    d_attn: int
    """Heads times d_head."""
    d_model: int
    d_vocab: int

    def forward(
        self, n_tokens: int | float, context: int, *, layers: int | float | None = None, logits: bool = True
    ) -> float:
        """FLOPs of a forward pass over blocks of ``context`` tokens, through ``layers`` layers (all).

        Per token and layer 2 * per_layer for the weights and 4 * context * d_attn for scores and their sums
        over values (computed for the whole square, as the model does); 2 * d_model * d_vocab for logits. A
        multiplication and an addition are two FLOPs (Kaplan et al. 2020, section 2.1).

        >>> ModelSizes(per_layer=12 * 64, n_layers=2, d_attn=8, d_model=8, d_vocab=10).forward(1, 16)
        4256.0
        """
        through = self.n_layers if layers is None else layers
        of_layers = through * (2 * self.per_layer + 4 * context * self.d_attn)
        return float(n_tokens * (of_layers + (2 * self.d_model * self.d_vocab if logits else 0)))


def read_sizes(files: ModelFiles) -> ModelSizes:
    """The sizes of a model; where its weights are no safetensors, with the usual 12 d_model^2 per layer."""
    shape = read_shape(files)
    found = [
        prod(dims) for path in sorted(files.path.glob("*.safetensors")) for dims in _layer_matrices(str(path))
    ]
    per_layer = sum(found) // shape.n_layers if found else 12 * shape.d_model**2
    return ModelSizes(per_layer, shape.n_layers, shape.n_heads * shape.d_head, shape.d_model, shape.d_vocab)


def _layer_matrices(path: str) -> list[list[int]]:
    """Shapes of the matrices inside layers, from a safetensors header; none if it cannot be read."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _MOST_HEADER)))
        return [
            entry["shape"]
            for name, entry in header.items()
            if _LAYER.search(name) and len(entry["shape"]) == 2
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return []
