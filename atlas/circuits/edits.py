"""What can be done to the feature activations of a spliced SAE, and where."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atlas.errors import ConfigError, SAEError

KINDS = ("ablate", "scale", "set", "patch", "drop_error")
Where = int | Sequence[int] | Int[Tensor, "..."] | Bool[Tensor, "batch pos"] | None
"""Positions: None for all; one or several, the same in every prompt; a tensor [batch] or [batch, n] of each
prompt's own; a mask [batch, pos]."""


@dataclass(frozen=True)
class Edit:
    """One change of feature activations; made by the functions below."""

    sae: str
    kind: str
    features: tuple[int, ...] | None = None
    """None: all of them."""
    value: float | Tensor = 0.0
    where: Where = None


def ablate(sae: str, features: int | Sequence[int] | None = None, where: Where = None) -> Edit:
    """Set activations to zero; those of all features unless some are named."""
    return Edit(sae, "ablate", _several(features), 0.0, where)


def scale(sae: str, features: int | Sequence[int], factor: float, where: Where = None) -> Edit:
    """Multiply activations."""
    return Edit(sae, "scale", _several(features), factor, where)


def set_to(sae: str, features: int | Sequence[int], value: float, where: Where = None) -> Edit:
    """Give activations a value, whether the features fire or not."""
    return Edit(sae, "set", _several(features), value, where)


def patch(
    sae: str,
    acts: Float[Tensor, "batch pos d_sae"],
    features: int | Sequence[int] | None = None,
    where: Where = None,
) -> Edit:
    """Put in activations of another run, position by position.

    Positions that differ are lined up by the caller (``acts[:, from_positions]``); a batch of 1 serves all.
    """
    return Edit(sae, "patch", _several(features), acts, where)


def drop_error(sae: str, where: Where = None) -> Edit:
    """Set the error term x - x^ to zero, where a splice adds it."""
    return Edit(sae, "drop_error", None, 0.0, where)


def _several(features: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if features is None:
        return None
    return (features,) if isinstance(features, int) else tuple(features)


def mask_of(where: Where, batch: int, pos: int, device: torch.device) -> Bool[Tensor, "batch pos"]:
    """Which positions are meant; ConfigError for one that the prompts lack.

    >>> mask_of([0, 2], 1, 3, torch.device("cpu")).tolist()
    [[True, False, True]]
    >>> mask_of(torch.tensor([1, 0]), 2, 2, torch.device("cpu")).tolist()
    [[False, True], [True, False]]
    """
    if where is None:
        return torch.ones(batch, pos, dtype=torch.bool, device=device)
    if isinstance(where, Tensor) and where.dtype == torch.bool:
        if where.shape != (batch, pos):
            raise ConfigError(f"mask of shape {tuple(where.shape)} is not allowed; it must be {(batch, pos)}")
        return where.to(device)
    own = torch.as_tensor(where, device=device)
    per_prompt = isinstance(where, Tensor) and own.ndim > 0
    own = own.reshape(len(own) if per_prompt else 1, -1).expand(batch, -1)
    if own.numel() and not 0 <= int(own.min()) <= int(own.max()) < pos:
        bad = int(own.min()) if int(own.min()) < 0 else int(own.max())
        raise ConfigError(f"position {bad} does not exist; the prompts have positions 0 to {pos - 1}")
    return torch.zeros(batch, pos, dtype=torch.bool, device=device).scatter(1, own, value=True)


def check(edit: Edit, d_sae: int) -> None:
    """SAEError for a feature or shape that the SAE does not have."""
    wrong = [f for f in edit.features or () if not 0 <= f < d_sae]
    if wrong:
        raise SAEError(f"feature {wrong[0]} does not exist; SAE {edit.sae!r} has features 0 to {d_sae - 1}")
    if isinstance(edit.value, Tensor) and edit.value.shape[-1] != d_sae:
        raise SAEError(
            f"activations of {edit.value.shape[-1]} features cannot be patched into {edit.sae!r}; "
            f"allowed: {d_sae}"
        )


def apply(edit: Edit, acts: Float[Tensor, "batch pos d_sae"]) -> Float[Tensor, "batch pos d_sae"]:
    """The activations after the edit; differentiable in what stays."""
    batch, pos, d_sae = acts.shape
    chosen = mask_of(edit.where, batch, pos, acts.device)[..., None]
    if edit.features is not None:
        named = torch.zeros(d_sae, dtype=torch.bool, device=acts.device)
        named[list(edit.features)] = True
        chosen = chosen & named
    if isinstance(edit.value, Tensor):
        new = edit.value.to(acts)
    else:
        new = acts * edit.value if edit.kind == "scale" else acts.new_tensor(edit.value)
    return torch.where(chosen, new, acts)
