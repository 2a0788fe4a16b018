"""A head read through two SAEs, one on its queries and one on its keys, and the model run with both.

    score[query, source] = q[query] . k[source] / sqrt(d_head)

Rebuilt means that the head's q and k are replaced by what their SAEs make of them, without the error
terms; the head's values and every other head stay as they are.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.circuits.edits import Edit
from atlas.circuits.splice import Splice
from atlas.errors import SAEError
from atlas.lm.hooks import Resume, capture, logits_with
from atlas.lm.load import LanguageModel
from atlas.sae.model import SAE
from atlas.sites import Site, partner


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
    resume: Resume | None = None,
) -> Run:
    """One pass: with the head's q and k rebuilt (perhaps edited), or of the model as it is.

    With ``error`` the SAEs' error terms are added, so that edits alone make a difference. With ``resume``
    (see ``entering``) the layers before the head's are not run again.
    """
    seen: dict[str, Tensor] = {}

    def keep(pattern: Tensor) -> None:
        seen["pattern"] = pattern[:, pair.head].detach()

    splice = Splice(model, pair, edits, error) if rebuilt else None
    through = {sae.info.site: partial(splice.through, sae) for sae in pair} if splice else {}
    watch = {f"blocks.{pair.layer}.attn.hook_pattern": keep}
    logits = logits_with(model, tokens, through, resume, watch)
    return Run(logits, seen["pattern"], splice)


def entering(model: LanguageModel, tokens: Int[Tensor, "batch pos"], pair: Pair) -> Resume:
    """What enters the pair's layer on these tokens, from which any number of passes can be resumed."""
    site = Site("resid_pre", pair.layer)
    return Resume(pair.layer, capture(model, tokens, [site])[0][site])
