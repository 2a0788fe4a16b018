"""In which order an annotator goes through the heads of a model."""

from collections.abc import Mapping
from hashlib import blake2s

from atlas.errors import one_of

Head = tuple[int, int]
ORDERS = {
    "layer": "by layer and head",
    "random": "in a random order that a seed fixes",
    "disagreement": "those on which finished notes differ most first",
}


def shuffled(heads: list[Head], seed: int) -> list[Head]:
    """Heads in a random order that depends on the seed and on nothing else.

    Each head is placed by a hash of the seed and itself, so every machine and version gives the same order,
    and two heads keep theirs when others come or go.

    >>> shuffled([(0, 0), (0, 1), (0, 2), (1, 0)], 7) == shuffled([(1, 0), (0, 2), (0, 1), (0, 0)], 7)
    True
    """

    def place(head: Head) -> bytes:
        return blake2s(f"{seed} {head[0]} {head[1]}".encode(), digest_size=16).digest()

    return sorted(heads, key=place)


def ordered(
    n_layers: int,
    n_heads: int,
    order: str = "layer",
    seed: int = 0,
    distances: Mapping[Head, float] | None = None,
) -> list[Head]:
    """Every head of a model once, in one of ORDERS.

    ``distances``: how far finished notes about a head are apart (:func:`atlas.db.comparing.disputed_heads`);
    heads without one come last. Ties go to the lower layer, then the lower head.

    >>> ordered(2, 2, "disagreement", distances={(1, 0): 0.5})
    [(1, 0), (0, 0), (0, 1), (1, 1)]
    """
    one_of("order", order, ORDERS)
    heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    if order == "random":
        return shuffled(heads, seed)
    if order == "disagreement":
        told = distances or {}
        return sorted(heads, key=lambda head: (-told.get(head, -1.0), head))
    return heads
