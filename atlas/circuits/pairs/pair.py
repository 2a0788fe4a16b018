"""A head read through two SAEs, one on its queries and one on its keys, and the model run with both.

    score[query, source] = q[query] . k[source] / sqrt(d_head)

Rebuilt means that the head's q and k are replaced by what their SAEs make of them, without the error
terms; the head's values and every other head stay as they are.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.circuits.edits import Edit
from atlas.circuits.splice import Splice
from atlas.errors import SAEError
from atlas.lm.load import LanguageModel
from atlas.sae.model import SAE
from atlas.sae.objectives import partner


class Pair(NamedTuple):
    """The SAEs of the two sides of one head."""

    q: SAE
    k: SAE

    @property
    def layer(self) -> int:
        """The head's layer."""
        return self.q.info.site.layer

    @property
    def head(self) -> int:
        """The head, from 0."""
        return self.q.info.site.head or 0


def make_pair(q: SAE, k: SAE) -> Pair:
    """A pair; SAEError unless the two are on the q and the k of one head, in this order."""
    if q.info.site.kind != "q" or k.info.site != partner(q.info.site):
        raise SAEError(
            f"SAEs {q.info.name!r} and {k.info.name!r} are on {q.info.site.name} and {k.info.site.name}; "
            "they must be on the q and the k of one head"
        )
    return Pair(q, k)


class Run(NamedTuple):
    """What a pass showed: the logits, and where the pair's head looked."""

    logits: Float[Tensor, "batch pos d_vocab"]
    pattern: Float[Tensor, "batch query key"]
    splice: Splice | None
    """The splice with what it saw; None of a pass of the model as it is."""


@torch.no_grad()
def run(
    model: LanguageModel,
    tokens: Int[Tensor, "batch pos"],
    pair: Pair,
    edits: Sequence[Edit] = (),
    *,
    rebuilt: bool = True,
    error: bool = False,
) -> Run:
    """One pass: with the head's q and k rebuilt (perhaps edited), or of the model as it is.

    With ``error`` the SAEs' error terms are added, so that edits alone make a difference.
    """
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:  # noqa: ARG001 - the hook protocol passes both
        seen["pattern"] = value[:, pair.head].detach()

    hooks = [(f"blocks.{pair.layer}.attn.hook_pattern", keep)]
    splice = Splice(model, pair, edits, error) if rebuilt else None
    with splice or nullcontext():
        logits = model.bridge.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    return Run(logits, seen["pattern"], splice)
