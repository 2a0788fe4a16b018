"""Whole blocks for banks whose objective looks at attention or at the model's output.

Such an objective needs each token where it stands: a batch is a run of blocks in place of shuffled tokens.
Position 0 is left out of the squared error like everywhere, but reconstructed for the objective, since
every query may look at it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from atlas.configs import SAEConfig
from atlas.errors import ConfigError
from atlas.lm.load import LanguageModel
from atlas.sae.forward import Forward, Params
from atlas.sae.group import Group
from atlas.sae.harvest import Chunk
from atlas.sae.normalise import Scale, normalise, scale_of
from atlas.sae.objectives import clean_log_probs, kl_loss, pattern_loss, scores_loss
from atlas.sites import Site, partner

CONTEXTUAL = {"scores": scores_loss, "pattern": pattern_loss}
"""The objectives that look at a head's attention."""


def harvested(sites: Sequence[Site], saes: Sequence[SAEConfig]) -> tuple[Site, ...]:
    """The sites whose activations training reads: the SAEs' own, and the other side for attention losses.

    >>> [s.name for s in harvested([Site("q", 0, 1)], [SAEConfig(objective="pattern")])]
    ['L00.H01.q', 'L00.H01.k']
    """
    own = list(sites)
    if any(sae.objective in CONTEXTUAL for sae in saes):
        own += [partner(site) for site in sites if site.kind in ("q", "k")]
    return tuple(dict.fromkeys(own))


class Context:
    """One batch of whole blocks for a bank whose objective looks at attention or at the model's output."""

    def __init__(self, model: LanguageModel, group: Group, chunk: Chunk, blocks: slice) -> None:
        self.model, self.group, self.tokens = model, group, chunk.tokens[blocks]
        self.raw = torch.stack([chunk.activations[site][blocks] for site in group.sites])
        self.other: Tensor | None = None
        if group.config.objective in CONTEXTUAL:
            others = [chunk.activations[partner(site)][blocks] for site in group.sites]
            self.other = torch.stack(others)
        self.clean = clean_log_probs(model, self.tokens) if group.config.objective == "kl" else None
        flat = self.raw.flatten(0, 2)
        self.undo = scale_of(flat, group.config.normalize_activations)
        ready = normalise(flat, self.undo).reshape(self.raw.shape) * group.scale[:, None, None, None]
        self.first = ready[:, :, 0]
        self.x = ready[:, :, 1:].flatten(1, 2)

    def objective(self, which: slice, p: Params, out: Forward) -> Float[Tensor, " n"]:
        """The objective's term for some members of the bank."""
        config, raw = self.group.config, self.raw[which]
        first = self.group.bank.forward(which, p, self.first[which]).x_hat
        n, blocks, pos, d_in = raw.shape
        x_hat = torch.cat([first[:, :, None], out.x_hat.reshape(n, blocks, pos - 1, d_in)], 2)
        x_hat = self._unscaled(x_hat, which)
        if self.clean is not None:
            loss = kl_loss(self.model, self.tokens, self.clean, self.group.sites[which], x_hat)
        elif self.other is not None:
            kinds = [site.kind for site in self.group.sites[which]]
            terms = [
                CONTEXTUAL[config.objective](
                    kind, raw[i : i + 1], x_hat[i : i + 1], self.other[which][i : i + 1]
                )
                for i, kind in enumerate(kinds)
            ]
            loss = torch.cat(terms)
        else:
            raise ConfigError(f"objective {config.objective!r} is not known")
        return config.objective_coefficient * loss

    def _unscaled(self, x_hat: Tensor, which: slice) -> Tensor:
        x_hat = x_hat / self.group.scale[which][:, None, None, None]
        if self.undo is None:
            return x_hat
        shape = (*self.raw.shape[:3], 1)
        mean, size, back = (t.reshape(shape)[which].flatten(0, 2) for t in self.undo)
        return Scale(mean, size, back).undo(x_hat.flatten(0, 2)).reshape(x_hat.shape)
