"""One shard of the corpus pass: the model runs once, and every SAE's activations are taken down sparsely."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from atlas.analysis.acts import UNREADABLE, FeatureActs
from atlas.analysis.weights import Moments
from atlas.corpus.tokens import TokenStore
from atlas.errors import StoreError
from atlas.lm.hooks import capture
from atlas.lm.load import LanguageModel
from atlas.progress import Progress
from atlas.sae.model import SAE
from atlas.sae.normalise import scale_of
from atlas.sites import Site

BATCH_BLOCKS = 16
Triples = tuple[np.ndarray, np.ndarray, np.ndarray]


class ShardPass:
    """Collects activations (without position 0) and moments of every site, batch by batch.

    SAEs that normalise their input have moments of their own: of x divided by the token's size.
    """

    def __init__(self, model: LanguageModel, saes: Sequence[SAE], store: TokenStore) -> None:
        self.model, self.saes, self.store = model, saes, store
        self.sites = tuple(dict.fromkeys(sae.info.site for sae in saes))
        self.triples: list[list[Triples]] = [[] for _ in saes]
        self.moments = {
            (sae.info.site, sae.info.normalize_activations): Moments.empty(sae.d_in) for sae in saes
        }

    @torch.no_grad()
    def update(self, blocks: range) -> None:
        """Add a batch of blocks."""
        context = self.store.meta.context
        tokens = torch.from_numpy(self.store.blocks(blocks)).to(self.model.device)
        activations, _ = capture(self.model, tokens, self.sites)
        occurrence = np.add.outer(np.array(blocks) * context, np.arange(1, context)).ravel()
        flat = {site: x[:, 1:].reshape(-1, x.shape[-1]).float() for site, x in activations.items()}
        for (site, how), moments in self.moments.items():
            scale = scale_of(flat[site], how)
            moments.update(flat[site] if scale is None else flat[site] / scale.size)
        for sae, kept in zip(self.saes, self.triples, strict=True):
            row, feature, value = (t.cpu().numpy() for t in sae.active(flat[sae.info.site]))
            kept.append((feature, occurrence[row], value))

    def run(self, blocks: range, progress: Progress) -> None:
        """Add all blocks of the shard."""
        for start in range(blocks.start, blocks.stop, BATCH_BLOCKS):
            batch = range(start, min(start + BATCH_BLOCKS, blocks.stop))
            self.update(batch)
            progress.update(batch.stop - blocks.start, len(blocks))

    def save(self, folder: Path) -> None:
        """Write one file per SAE, and one per site and normalisation."""
        context = self.store.meta.context
        for i, (sae, kept) in enumerate(zip(self.saes, self.triples, strict=True)):
            FeatureActs.collect(kept, sae.d_sae, context).save(folder / f"acts-{i:05d}.npz")
        for (site, how), m in self.moments.items():
            np.savez(_moments_file(folder, site, how), n=m.n, total=m.total, outer=m.outer)


def _moments_file(folder: Path, site: Site, how: str) -> Path:
    return folder / (f"moments-{site.name}.npz" if how == "none" else f"moments-{site.name}-{how}.npz")


def load_acts(shards: Sequence[Path], index: int) -> FeatureActs:
    """One SAE's activations over all shards."""
    return FeatureActs.merge(FeatureActs.load(folder / f"acts-{index:05d}.npz") for folder in shards)


def load_moments(shards: Sequence[Path], site: Site, normalize_activations: str = "none") -> Moments:
    """Moments of one site, as SAEs of this normalisation need them, over all shards in the shards' order."""
    merged: Moments | None = None
    for folder in shards:
        path = _moments_file(folder, site, normalize_activations)
        try:
            with np.load(path, allow_pickle=False) as file:
                part = Moments(int(file["n"]), file["total"], file["outer"])
        except UNREADABLE as error:
            raise StoreError(f"moments in {str(path)!r} cannot be read: {error}") from None
        merged = part if merged is None else merged.merge(part)
    if merged is None:
        raise StoreError(f"no shard holds moments of {site.name}")
    return merged
