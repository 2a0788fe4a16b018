"""One shard of the corpus pass: the model runs once, and every SAE's evidence is taken down sparsely.

What a shard keeps is mergeable: activations (``acts``), near misses (``misses``), the covariance of every
site and the sums of FVE over active tokens (``variance``). Nothing dense outlives a batch.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atlas.analysis.acts import FeatureActs, Ints, StoredActs
from atlas.analysis.misses import NearMisses, without_firing
from atlas.analysis.residuals import KeptResiduals
from atlas.analysis.variance import ActiveShares, Moments
from atlas.analysis.weights import attribution_directions, has_heads
from atlas.corpus.tokens import TokenStore
from atlas.errors import StoreError
from atlas.lm.layers import read_sites
from atlas.lm.load import LanguageModel
from atlas.lm.runtime import batch_of, lanes
from atlas.progress import Progress
from atlas.sae.model import SAE, Active
from atlas.sae.normalise import normalise, scale_of
from atlas.sae.screen import Firing
from atlas.sites import Site

BATCH_BLOCKS = 16
Triples = tuple[np.ndarray, np.ndarray, np.ndarray]


class SAEPass:
    """What one SAE contributes to a shard.

    Where the processor has matrix units, what fires is found by ``atlas.sae.screen``, else from all
    pre-activations: the same features, but for those that rounding may swap, and values that differ in it.
    """

    def __init__(self, sae: SAE, n_heads: int, context: int) -> None:
        self.sae, self.context = sae, context
        self.screened = Firing(sae) if Firing.suits(sae) else None
        self.triples: list[Triples] = []
        self.misses = NearMisses(sae.d_sae, context)
        self.shares = ActiveShares(attribution_directions(sae), n_heads) if has_heads(sae) else None

    def update(self, x: Float[Tensor, "n d_in"], first_block: int) -> None:
        """Add a batch of consecutive blocks without their position 0."""
        sae = self.sae
        row, feature, value = self._firing(x, first_block)
        token = self._tokens(len(x), first_block)[row.cpu().numpy()]
        self.triples.append((feature.cpu().numpy().astype(np.int32), token, value.cpu().numpy()))
        if self.shares is not None:
            scale = sae.scale(x)
            scaled = x if scale is None else x / scale.size
            self.shares.update(scaled, row, feature, value - sae.bias_term[feature])

    def _tokens(self, n: int, first_block: int) -> Ints:
        """Where each of n rows lies in the text; its block's position 0 is not among them."""
        block, position = np.divmod(np.arange(n), self.context - 1)
        return (first_block + block) * self.context + position + 1

    def _firing(self, x: Float[Tensor, "n d_in"], first_block: int) -> Active:
        """What fires; near misses are taken down."""
        sae, screened = self.sae, self.screened
        seen = None if screened is None else screened.screen.look(normalise(x, sae.scale(x)))
        if screened is not None and seen is not None:
            found = screened.of(seen)
            self.misses.update_screened(screened.screen, seen, found, first_block)
            return found
        pre = sae.preactivations(x)
        found = sae.firing(x, pre)
        missed = without_firing(pre, found.row, found.feature)
        self.misses.update(missed.reshape(-1, self.context - 1, sae.d_sae), first_block)
        return found

    def save(self, folder: Path, number: int) -> None:
        """Write what was taken down."""
        FeatureActs.collect(self.triples, self.sae.d_sae, self.context).save(folder / f"acts-{number:05d}")
        self.misses.save(folder / f"misses-{number:05d}.npz")
        if self.shares is not None:
            self.shares.save(folder / f"shares-{number:05d}.npz")


class ShardPass:
    """Collects the evidence of all SAEs (position 0 left out) and moments of every site, batch by batch.

    SAEs that normalise their input have moments of their own: of x divided by the token's size. With
    ``residuals``, what enters layers is kept for DFA, as far as there is room.
    """

    def __init__(
        self,
        model: LanguageModel,
        saes: Sequence[SAE],
        store: TokenStore,
        residuals: KeptResiduals | None = None,
    ) -> None:
        self.model, self.store, self.residuals = model, store, residuals
        context = store.meta.context
        self.passes = [SAEPass(sae, model.shape.n_heads, context) for sae in saes]
        self.sites = tuple(dict.fromkeys(sae.info.site for sae in saes))
        self.moments = {
            (sae.info.site, sae.info.normalize_activations): Moments.empty(sae.d_in)
            for sae in saes
            if has_heads(sae)
        }

    @torch.no_grad()
    def update(self, blocks: range, pool: ThreadPoolExecutor) -> None:
        """Add a batch of blocks; SAEs side by side."""
        tokens = torch.from_numpy(self.store.blocks(blocks)).to(self.model.device)
        entering = () if self.residuals is None else self.residuals.sites
        wanted = list(dict.fromkeys([*self.sites, *entering]))
        activations = read_sites(self.model, tokens, wanted, pool)
        flat = {site: activations[site][:, 1:].flatten(0, 1).float() for site in self.sites}
        # The short ones come last, so that no lane waits long for another at the end.
        work = [partial(one.update, flat[one.sae.info.site], blocks.start) for one in self.passes]
        work += [partial(self._moments_of, flat[key[0]], key) for key in self.moments]
        if self.residuals is not None:
            work.append(partial(self.residuals.write, blocks, activations))
        for done in [pool.submit(one) for one in work]:
            done.result()

    def _moments_of(self, x: Float[Tensor, "n d_in"], key: tuple[Site, str]) -> None:
        scale = scale_of(x, key[1])
        self.moments[key].update(x if scale is None else x / scale.size)

    def run(self, blocks: range, progress: Progress) -> None:
        """Add all blocks of the shard."""
        with lanes() as pool:
            size = batch_of(BATCH_BLOCKS)
            for start in range(blocks.start, blocks.stop, size):
                batch = range(start, min(start + size, blocks.stop))
                self.update(batch, pool)
                progress.update(batch.stop - blocks.start, len(blocks))

    def save(self, folder: Path) -> None:
        """Write the evidence of every SAE, and moments of every site and normalisation."""
        with lanes() as pool:
            list(pool.map(lambda pair: pair[1].save(folder, pair[0]), enumerate(self.passes)))
        for (site, how), moments in self.moments.items():
            moments.save(_moments_file(folder, site, how))


def _moments_file(folder: Path, site: Site, how: str) -> Path:
    return folder / (f"moments-{site.name}.npz" if how == "none" else f"moments-{site.name}-{how}.npz")


def stored_acts(shards: Sequence[Path], number: int) -> StoredActs:
    """One SAE's activations over all shards."""
    return StoredActs([folder / f"acts-{number:05d}" for folder in shards])


def load_misses(shards: Sequence[Path], number: int) -> NearMisses:
    """One SAE's near misses over all shards."""
    return _merged(NearMisses.load(folder / f"misses-{number:05d}.npz") for folder in shards)


def load_shares(shards: Sequence[Path], number: int, sae: SAE, n_heads: int) -> ActiveShares:
    """One SAE's sums of FVE over active tokens, over all shards in the shards' order."""
    empty = ActiveShares(attribution_directions(sae), n_heads)
    return _merged(empty.load(folder / f"shares-{number:05d}.npz") for folder in shards)


def load_moments(shards: Sequence[Path], site: Site, normalize_activations: str = "none") -> Moments:
    """Moments of one site, as SAEs of this normalisation need them, over all shards in the shards' order."""
    return _merged(Moments.load(_moments_file(folder, site, normalize_activations)) for folder in shards)


@runtime_checkable
class _Mergeable(Protocol):
    def merge(self, other: Any) -> Any: ...


Part = TypeVar("Part", bound=_Mergeable)


def _merged(parts: Iterable[Part]) -> Part:
    kept = iter(parts)
    first = next(kept, None)
    if first is None:
        raise StoreError("there is no shard to merge")
    merged: Part = reduce(lambda one, other: one.merge(other), kept, first)
    return merged
