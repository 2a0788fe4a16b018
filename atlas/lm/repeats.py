"""Random tokens said twice: text that only looking back can predict."""

from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from atlas.errors import ConfigError


def random_repeats(
    n_blocks: int, length: int, d_vocab: int, *, bos: int, seed: int, exclude: Iterable[int] = ()
) -> Int[Tensor, "batch position"]:
    """Return blocks of BOS and then ``length`` random tokens twice: shape [n_blocks, 2 * length + 1].

    Tokens are drawn uniformly, with replacement, from the vocabulary without BOS and ``exclude`` (other
    special tokens). They depend on the seed alone, not on the device.

    >>> random_repeats(1, 3, 10, bos=0, seed=1).shape
    torch.Size([1, 7])
    """
    special = {bos, *exclude}
    allowed = torch.tensor([token for token in range(d_vocab) if token not in special])
    if n_blocks < 1 or length < 2 or not len(allowed):
        raise ConfigError(
            f"random repeats: {n_blocks} blocks of {length} tokens out of {len(allowed)}; "
            "allowed: at least 1 block, 2 tokens, 1 ordinary token in the vocabulary"
        )
    generator = torch.Generator().manual_seed(seed)
    once = allowed[torch.randint(len(allowed), (n_blocks, length), generator=generator)]
    return torch.cat([torch.full((n_blocks, 1), bos), once, once], dim=1)
