"""What would the loss be without a feature, where it fires?

To first order: where feature f fires with activation a on token t, taking it out changes the site's
activation x by -a W_dec[f] (times the token's own scale where the SAE normalises its input), so

    loss_effect[f] = mean over firing tokens of -a (W_dec[f] . dL/dx_t)

L is the summed next-token cross-entropy of the token's block, in nats. Positive: the loss would rise, the
feature helps. One forward and one backward pass over a sample of the text serve all sites and SAEs. (seed
003's agenda; attribution patching, Nanda 2023, for the first order.)
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from atlas.analysis.text import Blocks
from atlas.lm.hooks import gradients
from atlas.lm.load import LanguageModel
from atlas.progress import Progress
from atlas.sae.model import SAE

BATCH_BLOCKS = 8
_GATHERED = 1 << 15
"""Firings whose decoder rows and gradients are multiplied at once."""


class LossEffects:
    """Sums of first-order effects on the loss, feature by feature; a mergeable summary."""

    def __init__(self, model: LanguageModel, saes: Sequence[SAE], store: Blocks) -> None:
        self.model, self.saes, self.store = model, saes, store
        self.total = [np.zeros(sae.d_sae) for sae in saes]
        self.n = [np.zeros(sae.d_sae, np.int64) for sae in saes]

    def run(self, blocks: range, progress: Progress) -> None:
        """Add blocks of the text (position 0 left out)."""
        for start in range(blocks.start, blocks.stop, BATCH_BLOCKS):
            batch = range(start, min(start + BATCH_BLOCKS, blocks.stop))
            self.update(batch)
            progress.update(batch.stop - blocks.start, len(blocks))

    def update(self, blocks: range) -> None:
        """Add one batch."""
        tokens = torch.from_numpy(self.store.blocks(blocks)).to(self.model.device)
        sites = tuple(dict.fromkeys(sae.info.site for sae in self.saes))
        found = gradients(self.model, tokens, sites)
        for number, sae in enumerate(self.saes):
            x, gradient = (part[:, 1:].flatten(0, 1).float() for part in found[sae.info.site])
            feature, effect = first_order_effects(sae, x, gradient)
            n = sae.d_sae
            self.total[number] += np.bincount(feature, weights=effect, minlength=n)
            self.n[number] += np.bincount(feature, minlength=n)

    def merge(self, other: "LossEffects") -> "LossEffects":
        """The sums over both parts of the text."""
        merged = LossEffects(self.model, self.saes, self.store)
        merged.total = [a + b for a, b in zip(self.total, other.total, strict=True)]
        merged.n = [a + b for a, b in zip(self.n, other.n, strict=True)]
        return merged

    def finish(self) -> list[dict[str, npt.NDArray]]:
        """``loss_effect`` (NaN where a feature did not fire) and ``n_loss`` of each SAE's features."""
        return [
            {
                "loss_effect": np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0),
                "n_loss": n,
            }
            for total, n in zip(self.total, self.n, strict=True)
        ]


@torch.no_grad()
def first_order_effects(
    sae: SAE, x: Float[Tensor, "n d_in"], gradient: Float[Tensor, "n d_in"]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The feature of each firing on these tokens, and the first-order change of the loss without it."""
    row, feature, value = sae.active(x)
    scale = sae.scale(x)
    if scale is not None:
        gradient = gradient * scale.back
    parts = []
    for at in range(0, len(row), _GATHERED):
        some = slice(at, at + _GATHERED)
        along = (gradient[row[some]] * sae.decoder_directions[feature[some]]).sum(1)
        parts.append(-value[some].double() * along.double())
    effect = torch.cat(parts) if parts else value.double()
    return feature.cpu().numpy(), effect.cpu().numpy()
