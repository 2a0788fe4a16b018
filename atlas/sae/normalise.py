"""Normalisation of an SAE's input, token by token, and its undoing on the reconstruction.

    none                    x as it is
    constant_norm_rescale   x * sqrt(d_in) / ||x||                       (seed 003, row D7)
    layer_norm              (x - mean(x)) / (std(x) + 1e-5), std with d_in - 1; undone by std(x) alone

The names and the formulas are SAELens's, so that files mean the same in both.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-5


class Scale(NamedTuple):
    """How each token was normalised: y = (x - mean) / size, undone by mean + back * y."""

    mean: Float[Tensor, "n 1"]
    size: Float[Tensor, "n 1"]
    back: Float[Tensor, "n 1"]

    def undo(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """From normalised vectors back to the model's."""
        return torch.addcmul(self.mean, self.back, x)


def scale_of(x: Float[Tensor, "n d_in"], how: str) -> Scale | None:
    """The mean and size to take out of each token; None where the input stays as it is.

    >>> scale_of(torch.tensor([[2.0, 2.0, 2.0, 2.0]]), "constant_norm_rescale").size.item()
    2.0
    """
    if how == "none":
        return None
    if how == "layer_norm":
        mean = x.mean(1, keepdim=True)
        std = (x - mean).std(1, keepdim=True)
        return Scale(mean, std + EPSILON, std)
    size = x.norm(dim=1, keepdim=True).clamp_min(1e-12) / x.shape[1] ** 0.5
    return Scale(torch.zeros_like(size), size, size)


def normalise(x: Float[Tensor, "n d_in"], scale: Scale | None) -> Float[Tensor, "n d_in"]:
    """The normalised vectors.

    >>> x = torch.tensor([[2.0, 2.0, 2.0, 2.0]])
    >>> normalise(x, scale_of(x, "constant_norm_rescale")).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    return x if scale is None else (x - scale.mean) / scale.size
