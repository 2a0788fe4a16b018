"""Train every SAE that was asked for in one pass over the text, stoppable anywhere.

The inputs of each SAE are scaled so that their mean squared norm is d_in, which makes one learning rate
and one coefficient fit every site; the scale is taken out again before the SAE is returned. SAEs of one
shape are stacked in a bank, whatever their site, k or coefficient.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atlas.configs import SAEConfig, TrainConfig
from atlas.errors import Cancelled, ConfigError, SAEError
from atlas.lm.load import LanguageModel
from atlas.progress import Progress
from atlas.sae.context import Context, harvested
from atlas.sae.files import write_tensors
from atlas.sae.group import TABLES, Group, Moment, Origin, same_bank
from atlas.sae.harvest import Chunk, Harvest, Source, Stream
from atlas.sae.live_log import LiveLog
from atlas.sae.log import Rows
from atlas.sae.model import SAE
from atlas.sae.normalise import normalise, scale_of
from atlas.sae.objectives import check_objectives
from atlas.sae.precision import matmul_dtype
from atlas.sites import Site
from atlas.store.atomic import atomic_file


def learning_rate(config: TrainConfig, step: int, n_steps: int) -> float:
    """The factor of the peak learning rate at a step: a rise, a plateau, a fall to zero.

    >>> config = TrainConfig(warmup=0.1, decay=0.2)
    >>> [round(learning_rate(config, s, 100), 2) for s in (0, 9, 50, 79, 90, 99)]
    [0.1, 1.0, 1.0, 1.0, 0.5, 0.05]
    """
    rise = (step + 1) / max(1.0, config.warmup * n_steps)
    fall = (n_steps - step) / max(1.0, config.decay * n_steps)
    return min(1.0, rise, fall)


class Training:
    """The state of a training run and its steps.

    Raises:
        SAEError: the loss is no longer finite, or a checkpoint is damaged.
        ConfigError: an objective does not fit a site.
        CorpusError: no block is left to train on.
    """

    def __init__(
        self,
        model: LanguageModel,
        stream: Stream,
        sites: Sequence[Site],
        saes: Sequence[SAEConfig],
        config: TrainConfig,
        source: Source | None = None,
    ) -> None:
        self.model, self.stream, self.config, self.sites = model, stream, config, tuple(sites)
        self.source = source or Harvest(model, stream, harvested(sites, saes))
        self.n_chunks = math.ceil(config.tokens / (config.batch * config.chunk_batches))
        self.n_steps = self.n_chunks * config.chunk_batches
        self.chunk = 0
        self.whole = True
        """Whether the state is that between two chunks."""
        self.rate: float | None = None
        self.names: list[str] = []
        self.batch_blocks = stream.chunk_blocks // config.chunk_batches
        self._check([sae.objective for sae in saes])
        self.groups = self._groups(saes)

    def _check(self, objectives: Sequence[str]) -> None:
        sample = torch.from_numpy(self.stream.store.blocks(self.stream.block_numbers(0)[:1]))
        sample = sample.to(self.model.device)
        check_objectives(objectives, self.sites, self.model, sample)
        context = self.stream.store.meta.context
        other = [objective for objective in objectives if objective != "mse"]
        if other and not self.batch_blocks:
            raise ConfigError(
                f"objective {other[0]!r} reads whole blocks, and train batch {self.config.batch} is below "
                f"one; allowed with corpus context {context}: {context - 1} or more"
            )

    def _batch_tokens(self, objective: str) -> int:
        """Tokens of a step: where an objective reads whole blocks, those that make about a ``batch``."""
        whole = self.batch_blocks * (self.stream.store.meta.context - 1)
        return self.config.batch if objective == "mse" else whole

    def _groups(self, saes: Sequence[SAEConfig]) -> list[Group]:
        """Banks of SAEs of one shape; ``names`` keeps the order in which SAEs are returned."""
        kinds: list[tuple[int, list[tuple[SAEConfig, Site, str]]]] = []
        shape, device = self.model.shape, self.model.device
        for sae in saes:
            widths = dict.fromkeys(site.d_in(shape) for site in self.sites)
            for site in (s for width in widths for s in self.sites if s.d_in(shape) == width):
                d_in, name = site.d_in(shape), sae.name_at(self.model.name, site.name, site.d_in(shape))
                self.names.append(name)
                found = next((m for d, m in kinds if d == d_in and same_bank(m[0][0], sae, d_in)), None)
                if found is None:
                    kinds.append((d_in, [(sae, site, name)]))
                else:
                    found.append((sae, site, name))
        dtype = matmul_dtype(self.config.precision, device)
        groups = []
        for d_in, members in kinds:
            configs, where, names = [m[0] for m in members], [m[1] for m in members], [m[2] for m in members]
            groups.append(Group(configs, where, names, d_in, self.config, device, dtype))
        return groups

    def run(self, checkpoint: Path, progress: Progress, live: Path | None = None) -> list[SAE]:
        """Train to the end, going on from ``checkpoint`` if there is one, and return the SAEs.

        ``live`` gets the rows of the training tables while they come, as JSON lines. Asked to stop between
        two chunks, or while the next one is read, the training saves its state first.
        """
        if checkpoint.exists():
            self.restore(checkpoint)
        shown = LiveLog(live, self.groups)
        saved = started = time.monotonic()
        first = self.chunk
        progress.update(first * self.config.chunk_batches, self.n_steps)
        try:
            while self.chunk < self.n_chunks:
                self.train_chunk()
                self.rate = (self.chunk - first) * self.stream.chunk_tokens / (time.monotonic() - started)
                progress.update(self.chunk * self.config.chunk_batches, self.n_steps, self._summary())
                shown.write()
                if time.monotonic() - saved > self.config.checkpoint_seconds and self.chunk < self.n_chunks:
                    self.save(checkpoint)
                    saved = time.monotonic()
        except Cancelled:
            if self.whole and self.chunk > first:
                self.save(checkpoint)
            raise
        return self.finished()

    def finished(self) -> list[SAE]:
        """The SAEs, config by config, within it by width of the site and then in the order of the sites."""
        from atlas import __version__

        meta = self.stream.store.meta
        made: dict[str, SAE] = {}
        for group in self.groups:
            tokens = self.n_steps * self._batch_tokens(group.config.objective)
            origin = Origin(
                self.model.name, self.model.processing, meta.corpus, meta.context, tokens, __version__
            )
            made |= {sae.info.name: sae for sae in group.finished(origin)}
        return [made[name] for name in self.names]

    def _summary(self) -> str:
        rows = [row for g in self.groups for row in g.rows["training_log"][-len(g.bank) :]]
        count = max(len(rows), 1)
        explained = sum(row["variance_explained"] for row in rows) / count
        l0 = sum(row["l0"] for row in rows) / count
        return f"{self.rate or 0:,.0f} tokens/s, variance explained {explained:.2f}, L0 {l0:.0f}"

    def train_chunk(self) -> None:
        """Read one chunk and take its optimiser steps."""
        chunk = self.source.chunk(self.chunk)
        order = torch.from_numpy(self.stream.token_order(self.chunk)).to(self.model.device)
        shuffled = {
            (site, how): self._rows(chunk, site, how)[order]
            for site, how in dict.fromkeys(
                (site, g.config.normalize_activations) for g in self.groups for site in g.sites
            )
        }
        self.whole = False
        for group in self.groups:
            rows = [shuffled[site, group.config.normalize_activations] for site in group.sites]
            if self.chunk == 0:
                group.start(rows)
            for b in range(self.config.chunk_batches):
                self._step(group, chunk, rows, b)
            self._resample(group, rows)
        self.chunk += 1
        self.whole = True

    @staticmethod
    def _rows(chunk: Chunk, site: Site, how: str) -> Float[Tensor, "n d_in"]:
        rows = chunk.rows(site)
        return normalise(rows, scale_of(rows, how))

    def _step(self, group: Group, chunk: Chunk, rows: Sequence[Tensor], b: int) -> None:
        step = self.chunk * self.config.chunk_batches + b
        factor = learning_rate(self.config, step, self.n_steps)
        at = Moment(step, self.n_steps, factor, self.rate)
        if group.config.objective == "mse":
            size = self.config.batch
            x = torch.stack([r[b * size : (b + 1) * size] for r in rows])
            group.step(x.mul_(group.scale[:, None, None]), at, None)
        else:
            context = Context(
                self.model, group, chunk, slice(b * self.batch_blocks, (b + 1) * self.batch_blocks)
            )
            group.step(context.x, at, context.objective)

    def _resample(self, group: Group, rows: Sequence[Tensor]) -> None:
        """After a chunk: new starts for dead features each time ``resample_tokens`` have gone by."""
        every, chunk_tokens = group.config.resample_tokens, self.stream.chunk_tokens
        before, now = self.chunk * chunk_tokens, (self.chunk + 1) * chunk_tokens
        due = now // every > before // every and 2 * now <= self.n_steps * self.config.batch
        if group.config.revival == "resample" and due:
            scaled = [r[:8192] * scale for r, scale in zip(rows, group.scale, strict=True)]
            group.resample(scaled, (self.chunk + 1) * self.config.chunk_batches)

    def tables(self) -> dict[str, Rows]:
        """Rows of the training tables so far."""
        return {name: [row for g in self.groups for row in g.rows[name]] for name in TABLES}

    def save(self, path: Path) -> None:
        """Write the whole state, atomically: weights, Adam's moments, scales, counters, logs, position."""
        tensors = {f"{i}.{name}": t for i, g in enumerate(self.groups) for name, t in g.state().items()}
        state = json.dumps({"chunk": self.chunk, "logs": [g.rows for g in self.groups]})
        with atomic_file(path) as work:
            write_tensors(work, tensors, {"state": state})

    def restore(self, path: Path) -> None:
        """Go on from what ``save`` wrote."""
        try:
            with safe_open(path, framework="pt", device=str(self.model.device)) as file:
                state = json.loads(file.metadata()["state"])
                chunk, names = int(state["chunk"]), list(file.keys())
                for i, group in enumerate(self.groups):
                    mine = [n for n in names if n.startswith(f"{i}.")]
                    group.restore({n.removeprefix(f"{i}."): file.get_tensor(n) for n in mine})
                    group.rows = {name: list(state["logs"][i][name]) for name in TABLES}
        except (OSError, SafetensorError, KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
            raise SAEError(
                f"checkpoint {str(path)!r} cannot be read ({error}); delete it to start anew"
            ) from None
        self.chunk = chunk
