"""What would the loss be without a feature, where it fires?

To first order: where feature f fires with activation a on token t, taking it out changes the site's
activation x by -a W_dec[f] (times the token's own scale where the SAE normalises its input), so

    loss_effect[f] = mean over firing tokens of -a (W_dec[f] . dL/dx_t)

L is the summed next-token cross-entropy of the token's block, in nats. Positive: the loss would rise, the
feature helps. One forward and one backward pass over a sample of the text serve all sites and SAEs. (seed
003's agenda; attribution patching, Nanda 2023, for the first order.)

How far to trust it: on docs-2l (TopK, 1,024 features, k 16, 800,000 tokens of training; 100 features of each
SAE, 10 firings each) the rank correlation with exact ablation of one firing at a time, averaged by feature,
was .97 at L01.z, .85 at L00.z and .83 at L01.resid_pre. Early sites bend more, and there the exact loss rises
more on average than first order says.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from atlas.analysis.text import Blocks
from atlas.lm.hooks import gradients
from atlas.lm.load import LanguageModel
from atlas.lm.runtime import batch_of
from atlas.progress import Progress
from atlas.sae.model import SAE

BATCH_BLOCKS = 8


class LossEffects:
    """Sums of first-order effects on the loss, feature by feature; a mergeable summary."""

    def __init__(self, model: LanguageModel, saes: Sequence[SAE], store: Blocks) -> None:
        self.model, self.saes, self.store = model, saes, store
        self.total = [np.zeros(sae.d_sae) for sae in saes]
        self.n = [np.zeros(sae.d_sae, np.int64) for sae in saes]

    def run(self, blocks: range, progress: Progress) -> None:
        """Add blocks of the text (position 0 left out)."""
        size = batch_of(BATCH_BLOCKS)
        for start in range(blocks.start, blocks.stop, size):
            batch = range(start, min(start + size, blocks.stop))
            self.update(batch)
            progress.update(batch.stop - blocks.start, len(blocks))

    def update(self, blocks: range) -> None:
        """Add one batch."""
        tokens = torch.from_numpy(self.store.blocks(blocks)).to(self.model.device)
        sites = tuple(dict.fromkeys(sae.info.site for sae in self.saes))
        found = gradients(self.model, tokens, sites)
        for number, sae in enumerate(self.saes):
            x, gradient = (part[:, 1:].flatten(0, 1).float() for part in found[sae.info.site])
            n, total = first_order_effects(sae, x, gradient)
            self.n[number] += n.cpu().numpy()
            self.total[number] += total.cpu().numpy()

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
) -> tuple[Int[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """How often each feature fires on these tokens, and the sum of what its ablation would do to the loss.

    The gradients of a feature's tokens are summed up first, weighted by its activations there: a product
    with a sparse matrix, which costs a tenth of a dot product for every firing.
    """
    row, feature, value = sae.active(x)
    scale = sae.scale(x)
    if scale is not None:
        gradient = gradient * scale.back
    order = feature.argsort(stable=True)
    n = torch.bincount(feature, minlength=sae.d_sae)
    weighted = embedding_bag(
        row[order],
        gradient,
        pad(n.cumsum(0), (1, 0)),
        mode="sum",
        per_sample_weights=value[order],
        include_last_offset=True,
    )
    return n, -(weighted.double() * sae.decoder_directions.double()).sum(1)
