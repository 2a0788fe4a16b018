"""Which attention features are built from which earlier ones, over a text? Strong direct paths, counted.

At some positions of every block the strongest features of each layer are looked at. What an earlier layer's
feature at source s gives to one of them through the later layer's heads is, patterns and norm scales fixed,

    activation * (W_dec W_O) . (sum over heads of pattern[h] W_V[h] W_enc[h, f], back through the norm)

and its share is that over the later feature's pre-activation: a term of recursive DFA without residual SAEs.
Source: seed 004, automated circuit scans (row E10).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.analysis.text import Blocks
from atlas.circuits.parts import Sparse, Wide
from atlas.circuits.passes import Pass, reads_of, run_pass
from atlas.circuits.trace import Look, Tracer
from atlas.errors import ConfigError
from atlas.progress import Progress

MOST_PATHS = 20_000


@dataclass(frozen=True)
class Scanned:
    """What is looked at in each block, and which paths count."""

    positions: int = 4
    """Positions of each block, drawn anew for each (seeded; never BOS)."""
    features: int = 8
    """The strongest features of a layer at each."""
    least_share: float = 0.05
    """The smallest share of the pre-activation that counts."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("positions", 1, 10_000), ("features", 1, 10_000), ("least_share", 1e-6, 1)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} {value} is not allowed; allowed: {low} to {high}")


@dataclass
class Path:
    """A path so far."""

    n: int = 0
    total: float = 0.0
    largest: float = 0.0
    where: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Block, position, source, head of the largest share; of equal ones the first."""


class Wrote(NamedTuple):
    """What a layer's active features wrote at each source, padded with features that do not fire."""

    feature: Int[Tensor, "pos most"]
    write: Float[Tensor, "pos most d_model"]


Key = tuple[int, int, int, int]
"""Later layer, its feature, earlier layer, its feature."""


class PathScan:
    """Paths between the attention features of a tracer, summed over blocks."""

    def __init__(self, tracer: Tracer, how: Scanned) -> None:
        self.tracer, self.how = tracer, how
        self.paths: dict[Key, Path] = {}
        self.seen: dict[tuple[int, int], int] = {}
        self.writes = {n: _written(tracer, wide) for n, wide in tracer.attention.items()}

    @torch.no_grad()
    def block(self, tokens: Int[Tensor, " pos"], number: int) -> None:
        """Add one block of text."""
        look = Look(self.tracer, run_pass(self.tracer.model, tokens))
        random = np.random.default_rng([self.how.seed, number])
        n = min(self.how.positions, len(tokens) - 1)
        positions = np.sort(random.choice(np.arange(1, len(tokens)), n, replace=False)).tolist()
        wrote = {n: self._wrote(look.attention(n), self.writes[n]) for n in self.tracer.attention}
        for layer in sorted(self.tracer.attention)[1:]:
            sparse = look.attention(layer)
            for position in positions:
                order = torch.argsort(-sparse.acts[position], stable=True)[: self.how.features]
                features = [f for f in order.tolist() if sparse.acts[position, f] > 0]
                if features:
                    self._look(look, wrote, (number, layer, position), features)

    @staticmethod
    def _wrote(sparse: Sparse, writes: Float[Tensor, "d_sae d_model"]) -> Wrote:
        fires = sparse.acts > 0
        most = int(fires.sum(1).max())
        # Features that do not fire fill the places that are left, with nothing to write.
        feature = torch.argsort(~fires, dim=1, stable=True)[:, :most]
        weight = sparse.acts.gather(1, feature) * sparse.back
        return Wrote(feature, (weight[:, :, None] * writes[feature]).float())

    def _look(
        self, look: Look, wrote: dict[int, Wrote], at: tuple[int, int, int], features: list[int]
    ) -> None:
        block, layer, position = at
        sparse, wide = look.attention(layer), self.tracer.attention[layer]
        by_head = _directions(self.tracer, look.one, wide, layer, position, features)
        by_head = (by_head / sparse.size[position]).float()
        total, pre = by_head.sum(1).transpose(0, 1), sparse.pre[position, features].float()
        for one in features:
            self.seen[layer, one] = self.seen.get((layer, one), 0) + 1
        for earlier in sorted(n for n in self.tracer.attention if n < layer):
            feature, write = (part[: position + 1] for part in wrote[earlier])
            share = total @ write.transpose(1, 2) / pre[:, None]
            for source, which, place in (share >= self.how.least_share).nonzero().tolist():
                key = (layer, features[which], earlier, int(feature[source, place]))
                path, own = self.paths.setdefault(key, Path()), float(share[source, which, place])
                path.n, path.total = path.n + 1, path.total + own
                if own > path.largest:
                    heads = by_head[which, :, source] @ write[source, place]
                    path.largest, path.where = own, (block, position, source, int(heads.argmax()))

    def rows(self, most: int = MOST_PATHS) -> list[dict[str, Any]]:
        """Rows of ``circuit_paths``: those with the largest sum of shares, ties to the lower key."""
        names = {n: wide.sae.info.name for n, wide in self.tracer.attention.items()}
        order = sorted(self.paths, key=lambda key: (-self.paths[key].total, key))[:most]
        out = []
        for layer, feature, earlier, up in order:
            path = self.paths[layer, feature, earlier, up]
            block, position, source, head = path.where
            out.append({
                "sae": names[layer], "feature": feature, "up_sae": names[earlier], "up_feature": up,
                "n": path.n, "n_seen": self.seen[layer, feature], "mean_share": path.total / path.n,
                "max_share": path.largest, "block": block, "position": position, "source": source,
                "head": head,
            })  # fmt: skip
        return out


def _written(tracer: Tracer, wide: Wide) -> Float[Tensor, "d_sae d_model"]:
    """What one unit of each feature writes into the stream."""
    site = wide.sae.info.site
    if site.kind == "attn_out":
        return wide.decoder.double()
    return wide.decoder.double() @ tracer.model.W_O(site.layer).double().flatten(0, 1)


def _directions(
    tracer: Tracer, one: Pass, wide: Wide, layer: int, position: int, features: list[int]
) -> Float[Tensor, "n heads key d_model"]:
    """How each feature reads the stream at every source through each head."""
    if wide.heads is None:
        raise ValueError("an SAE that does not read heads has no sources")
    reads = reads_of(tracer.model, layer)
    normed = torch.einsum("hmd,nhd->nhm", reads.W_V, wide.heads[features].double())
    pattern = one.pattern[layer][:, position, : position + 1]
    weighted = pattern[None, :, :, None] * normed[:, :, None]
    return reads.back(weighted, one.ln_scale[layer][: position + 1])


def scan(
    tracer: Tracer, store: Blocks, blocks: int, how: Scanned, progress: Progress
) -> list[dict[str, Any]]:
    """Strong paths over the first ``blocks`` blocks of a text (see ``PathScan``)."""
    work = PathScan(tracer, how)
    for number in range(blocks):
        work.block(torch.from_numpy(store.blocks([number])[0]), number)
        progress.update(number + 1, blocks, f"{len(work.paths)} paths")
    return work.rows()
