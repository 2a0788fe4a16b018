"""The residual stream kept on disk between the corpus pass and DFA, so that the model need not run twice.

DFA looks again at nearly every block of the text, at patterns and values alone. Both follow from the residual
stream that enters a layer (``atlas.lm.attention``), in less than half the time of a whole pass and bit for
bit; it takes 4 d_model bytes per token and layer. For a shard that is not here as a whole, because the bound
was reached or another machine read it, the model runs again, so the tables are the same with it and without.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atlas.analysis.acts import Ints
from atlas.errors import StoreError
from atlas.lm.load import LanguageModel
from atlas.sae.cache_files import Shard, raw
from atlas.sae.cache_store import ActivationStore, values_of
from atlas.sites import Site

_FOR_HEADERS = 50
"""Room is asked for a fiftieth more, for headers and digests."""


class KeptResiduals:
    """What enters some layers, in batches of blocks as the corpus pass reads them.

    ``text`` says which text it is; caches of other texts and models in ``folder`` make room if nobody uses
    them. ``limit_bytes`` bounds them all.

    Raises:
        StoreError: the folder cannot be made.
    """

    def __init__(
        self,
        model: LanguageModel,
        layers: Sequence[int],
        text: Mapping[str, object],
        batch_blocks: int,
        folder: Path,
        limit_bytes: int,
    ) -> None:
        self.sites = tuple(Site("resid_pre", layer) for layer in sorted(set(layers)))
        about = dict(text) | values_of(model, int(str(text["context"])), "float32", batch_blocks)
        # Another number of them may add up in another order.
        about["threads"] = torch.get_num_threads()
        d_in = partial(Site.d_in, shape=model.shape)
        self.on_disk = ActivationStore(folder, about, self.sites, d_in, limit_bytes)

    def has_room(self, blocks: range) -> bool:
        """Whether all of these blocks fit under the bound; a part of a shard would be of no use."""
        d_in = sum(self.on_disk.d_in(site) for site in self.sites)
        size = len(blocks) * self.on_disk.context * d_in * self.on_disk.dtype.itemsize
        return self.on_disk.folder.has_room(size + size // _FOR_HEADERS, self.on_disk.limit_bytes)

    def write(self, blocks: range, activations: Mapping[Site, Tensor]) -> None:
        """Keep what a batch showed, as far as there is room."""
        found = {site: activations[site].float().cpu().contiguous() for site in self.sites}
        self.on_disk.write(list(blocks), found)

    def hold(self, batches: Sequence[Ints]) -> bool:
        """Whether all of these batches are here, each kept as one.

        Of a batch cut otherwise, products could be added up in another order.
        """
        return all(self._shards(batch) for batch in batches)

    def read(self, batch: Ints, layer: int) -> Float[Tensor, "blocks pos d_model"]:
        """What enters a layer in a batch.

        Raises:
            StoreError: it is not here, or what is here is damaged.
        """
        site, context = Site("resid_pre", layer), self.on_disk.context
        found = torch.empty(len(batch), context, self.on_disk.d_in(site))
        places = np.arange(len(batch))
        for shard in self._shards(batch):
            if site in shard.sites:
                try:
                    shard.read(places, places, {site: raw(found)})
                except OSError as error:
                    raise StoreError(f"what enters layer {layer} cannot be read: {error}") from None
                return found
        raise StoreError(f"what enters layer {layer} in blocks {batch} is not kept")

    def _shards(self, batch: Ints) -> list[Shard]:
        """The files that hold a batch and nothing else; none unless all layers are there."""
        wanted = [int(block) for block in batch]
        readings, missing = self.on_disk.folder.find(wanted)
        shards = [reading.shard for reading in readings]
        return [] if missing or any(shard.blocks != wanted for shard in shards) else shards

    def forget(self, blocks: range) -> None:
        """Delete what is kept of these blocks."""
        self.on_disk.folder.remove(blocks)
