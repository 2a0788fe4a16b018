"""Train every SAE that was asked for in one pass over the text, stoppable anywhere.

The inputs of each SAE are scaled so that their mean squared norm is d_in, which makes one learning rate
and one L1 coefficient fit every site; the scale is taken out again before the SAE is returned. The
decoder's bias starts at the mean of the first chunk.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atlas.configs import SAEConfig, TrainConfig
from atlas.errors import SAEError
from atlas.lm.load import LanguageModel
from atlas.progress import Progress
from atlas.sae.bank import Bank, BankLoss, seed_of
from atlas.sae.files import write_tensors
from atlas.sae.harvest import Stream, harvest_chunk
from atlas.sae.model import SAE, SAEInfo
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


@dataclass
class Member:
    """A bank in training: its sites, optimiser, input scales and dead counters."""

    bank: Bank
    sites: tuple[Site, ...]
    scale: Float[Tensor, " n_saes"]
    silent: Float[Tensor, "n_saes d_sae"]
    optimiser: torch.optim.Adam
    log: list[dict[str, Any]] = field(default_factory=list)


class Training:
    """The state of a training run and its steps.

    Raises:
        SAEError: the loss is no longer finite, or a checkpoint is damaged.
        ConfigError: two SAEs would have the same name.
        CorpusError: no block is left to train on.
    """

    def __init__(
        self,
        model: LanguageModel,
        stream: Stream,
        sites: Sequence[Site],
        saes: Sequence[SAEConfig],
        config: TrainConfig,
    ) -> None:
        self.model, self.stream, self.config, self.sites = model, stream, config, tuple(sites)
        self.n_chunks = math.ceil(config.tokens / (config.batch * config.chunk_batches))
        self.n_steps = self.n_chunks * config.chunk_batches
        self.chunk = 0
        self.members = [self._member(sae, group) for sae in saes for group in self._same_width(sites)]

    def _same_width(self, sites: Sequence[Site]) -> list[tuple[Site, ...]]:
        widths: dict[int, list[Site]] = {}
        for site in sites:
            widths.setdefault(site.d_in(self.model.shape), []).append(site)
        return [tuple(group) for group in widths.values()]

    def _member(self, sae: SAEConfig, sites: tuple[Site, ...]) -> Member:
        d_in, device = sites[0].d_in(self.model.shape), self.model.device
        names = [sae.name_at(self.model.name, site.name, d_in) for site in sites]
        bank = Bank(sae, d_in, names, self.config.seed, device)
        optimiser = torch.optim.Adam(list(bank.parameters().values()), lr=sae.lr, fused=True)
        silent = torch.zeros(len(sites), bank.d_sae, device=device)
        return Member(bank, sites, torch.ones(len(sites), device=device), silent, optimiser)

    def run(self, checkpoint: Path, progress: Progress) -> list[SAE]:
        """Train to the end, going on from ``checkpoint`` if there is one, and return the SAEs."""
        if checkpoint.exists():
            self.restore(checkpoint)
        saved = started = time.monotonic()
        first = self.chunk
        while self.chunk < self.n_chunks:
            self.train_chunk()
            rate = (self.chunk - first) * self.stream.chunk_tokens / (time.monotonic() - started)
            progress.update(self.chunk * self.config.chunk_batches, self.n_steps, self._summary(rate))
            if time.monotonic() - saved > self.config.checkpoint_seconds and self.chunk < self.n_chunks:
                self.save(checkpoint)
                saved = time.monotonic()
        return [sae for member in self.members for sae in self._finished(member)]

    def _summary(self, rate: float) -> str:
        rows = [row for m in self.members for row in m.log[-len(m.sites) :]]
        explained = sum(row["variance_explained"] for row in rows) / max(len(rows), 1)
        return f"{rate:,.0f} tokens/s, variance explained {explained:.2f}"

    def train_chunk(self) -> None:
        """Harvest one chunk and take its optimiser steps."""
        activations = harvest_chunk(self.model, self.stream, self.sites, self.chunk)
        for member in self.members:
            x = torch.stack([activations[site] for site in member.sites])
            if self.chunk == 0:
                self._start(member, x)
            x *= member.scale[:, None, None]
            for b in range(self.config.chunk_batches):
                step = self.chunk * self.config.chunk_batches + b
                self._step(member, x[:, b * self.config.batch : (b + 1) * self.config.batch], step)
        self.chunk += 1

    @torch.no_grad()
    def _start(self, member: Member, x: Float[Tensor, "n_saes n d_in"]) -> None:
        squares = x.square().sum(2).mean(1).clamp_min(1e-12)
        member.scale = (member.bank.d_in / squares).sqrt()
        member.bank.b_dec.copy_(x.mean(1) * member.scale[:, None])

    def _step(self, member: Member, x: Float[Tensor, "n_saes batch d_in"], step: int) -> None:
        bank, optimiser = member.bank, member.optimiser
        rate = bank.config.lr * learning_rate(self.config, step, self.n_steps)
        optimiser.param_groups[0]["lr"] = rate
        dead = member.silent >= self.config.dead_window
        loss = bank.loss(x, dead)
        optimiser.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        bank.project_gradients()
        optimiser.step()
        bank.renormalise()
        member.silent = torch.where(loss.fired, 0.0, member.silent + x.shape[1])
        if (step + 1) % self.config.log_every == 0 or step + 1 == self.n_steps:
            self._log(member, x, loss, step + 1, rate)

    @torch.no_grad()
    def _log(self, member: Member, x: Tensor, loss: BankLoss, step: int, rate: float) -> None:
        if not torch.isfinite(loss.total):
            worst = int((~torch.isfinite(loss.mse)).int().argmax())
            name = member.bank.names[worst]
            raise SAEError(f"training of {name!r} diverged at step {step}; try a smaller lr than {rate:g}")
        variance = (x - x.mean(1, keepdim=True)).square().sum(2).mean(1)
        dead = (member.silent >= self.config.dead_window).float().mean(1)
        for i, name in enumerate(member.bank.names):
            parts = {
                "mse_loss": loss.mse,
                "sparsity_loss": loss.sparsity,
                "aux_loss": loss.aux,
                "l0": loss.l0,
            }
            row: dict[str, Any] = {key: value[i].item() for key, value in parts.items()}
            row["loss"] = row["mse_loss"] + row["sparsity_loss"] + row["aux_loss"]
            row |= {"sae": name, "step": step, "tokens": step * self.config.batch, "lr": rate}
            row["variance_explained"] = 1 - row["mse_loss"] / max(variance[i].item(), 1e-12)
            row["dead_fraction"] = dead[i].item()
            member.log.append(row)

    def log_rows(self) -> list[dict[str, Any]]:
        """Rows of ``training_log`` so far."""
        return [row for member in self.members for row in member.log]

    def _finished(self, member: Member) -> list[SAE]:
        """The bank's SAEs for unscaled inputs: activations and biases shrink by the scale."""
        from atlas import __version__

        bank, out = member.bank, []
        topk = bank.config.architecture == "topk"
        for i, (name, site) in enumerate(zip(bank.names, member.sites, strict=True)):
            info = SAEInfo(
                name=name,
                model=self.model.name,
                processing=self.model.processing,
                site=site,
                architecture=bank.config.architecture,
                k=min(bank.config.k, bank.d_sae) if topk else None,
                l1_coefficient=None if topk else bank.config.l1_coefficient,
                tokens_trained=self.n_steps * self.config.batch,
                corpus=self.stream.store.meta.corpus,
                context=self.stream.store.meta.context,
                seed=seed_of(self.config.seed, name),
                origin="trained",
                code_version=__version__,
            )
            W_enc, b_enc, W_dec, b_dec = (p[i].detach().clone() for p in bank.parameters().values())
            scale = member.scale[i]
            out.append(SAE(info, W_enc.T.contiguous(), b_enc / scale, W_dec, b_dec / scale))
        return out

    def save(self, path: Path) -> None:
        """Write the whole state, atomically: weights, Adam's moments, scales, counters, log, position."""
        tensors: dict[str, Tensor] = {}
        for i, m in enumerate(self.members):
            tensors |= {f"{i}.scale": m.scale, f"{i}.silent": m.silent}
            for name, p in m.bank.parameters().items():
                tensors[f"{i}.{name}"] = p.detach()
                tensors |= {f"{i}.{name}.{key}": value for key, value in m.optimiser.state[p].items()}
        state = json.dumps({"chunk": self.chunk, "logs": [m.log for m in self.members]})
        with atomic_file(path) as work:
            write_tensors(work, tensors, {"state": state})

    def restore(self, path: Path) -> None:
        """Go on from what ``save`` wrote."""
        try:
            with safe_open(path, framework="pt", device=str(self.model.device)) as file:
                state = json.loads(file.metadata()["state"])
                chunk = int(state["chunk"])
                for i, m in enumerate(self.members):
                    self._restore_member(file, i, m)
                    m.log = state["logs"][i]
        except (OSError, SafetensorError, KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
            raise SAEError(
                f"checkpoint {str(path)!r} cannot be read ({error}); delete it to start anew"
            ) from None
        self.chunk = chunk

    @staticmethod
    def _restore_member(file: Any, i: int, m: Member) -> None:
        m.scale, m.silent = file.get_tensor(f"{i}.scale"), file.get_tensor(f"{i}.silent")
        for name, p in m.bank.parameters().items():
            with torch.no_grad():
                p.copy_(file.get_tensor(f"{i}.{name}"))
            keys = [k for k in file.keys() if k.startswith(f"{i}.{name}.")]  # noqa: SIM118 - not a dict
            m.optimiser.state[p] = {k.rsplit(".", 1)[1]: file.get_tensor(k) for k in keys}
