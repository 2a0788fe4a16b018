"""One bank in training: its optimiser, input scales, dead counters, and what it has logged."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from atlas.configs import SAEConfig, TrainConfig
from atlas.errors import SAEError
from atlas.plain import to_plain
from atlas.sae.bank import Bank, BankLoss, Objective, seed_of
from atlas.sae.forward import squared_error
from atlas.sae.log import Rows, density_rows, log_rows, watched_rows
from atlas.sae.model import SAE, SAEInfo
from atlas.sae.revive import resample
from atlas.sites import Site

TABLES = ("training_log", "training_density", "training_watched")
THRESHOLD_MEMORY = 0.99
"""How much of its mean a BatchTopK SAE's threshold keeps at each step."""

THRESHOLD_LR = 10.0
"""Learning rate of a JumpReLU SAE's log thresholds over that of its weights: they have further to go."""


class Moment(NamedTuple):
    """Where in the schedule a step stands."""

    step: int
    n_steps: int
    lr_factor: float
    tokens_per_second: float | None

    @property
    def last(self) -> bool:
        """Whether no step follows."""
        return self.step + 1 == self.n_steps


@dataclass(frozen=True)
class Origin:
    """What all SAEs of a training have in common."""

    model: str
    processing: str
    corpus: str
    context: int
    tokens_trained: int
    code_version: str


def same_bank(a: SAEConfig, b: SAEConfig, d_in: int) -> bool:
    """Whether SAEs of two configs can be stacked: they differ in k, coefficients and label at most.

    >>> same_bank(SAEConfig(k=8), SAEConfig(k=16, label="b"), 64)
    True
    >>> same_bank(SAEConfig("topk"), SAEConfig("relu"), 64)
    False
    """

    def shape(config: SAEConfig) -> SAEConfig:
        return replace(
            config, d_sae=config.width(d_in), expansion=1, k=1, l1_coefficient=0, l0_coefficient=0, label=None
        )

    return shape(a) == shape(b)


class Group:
    """A bank with one site per SAE, and the state of its training."""

    def __init__(
        self,
        configs: Sequence[SAEConfig],
        sites: Sequence[Site],
        names: Sequence[str],
        d_in: int,
        train: TrainConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.bank = Bank(configs, d_in, names, train.seed, device, dtype)
        self.sites, self.train = tuple(sites), train
        config, parameters = configs[0], self.bank.parameters()
        n, zeros = len(names), torch.zeros
        # One group per tensor, in the order of ``parameters``.
        self.optimiser = torch.optim.Adam(
            [{"params": [p]} for p in parameters.values()],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        self.scale = torch.ones(n, device=device)
        self.silent = zeros(n, self.bank.d_sae, device=device)
        self.window = zeros(n, self.bank.d_sae, device=device)
        self.counts = zeros(3, n, device=device)  # tokens in the window; BatchTopK's threshold and its weight
        self.rows: dict[str, Rows] = {name: [] for name in TABLES}
        self.watch = tuple(f for f in train.watch if f < self.bank.d_sae)

    @property
    def config(self) -> SAEConfig:
        """What the members have in common."""
        return self.bank.config

    @property
    def dead(self) -> Bool[Tensor, "n d_sae"]:
        """Features silent for the dead window."""
        return self.silent >= self.train.dead_window

    @torch.no_grad()
    def start(self, x: Sequence[Float[Tensor, "n d_in"]]) -> None:
        """Set the input scales, and b_dec to the mean activation, from each SAE's first activations.

        Raises:
            SAEError: a site is zero on all of them (the MLPs of an attention-only model).
        """
        silent = [site.name for site, rows in zip(self.sites, x, strict=True) if not rows.any()]
        if silent:
            raise SAEError(
                f"{', '.join(silent)} is zero on all of the first {len(x[0])} tokens; allowed: sites "
                "that hold something to reconstruct"
            )
        if self.config.normalize_activations == "none":
            squares = torch.stack([rows.square().sum(1).mean() for rows in x]).clamp_min(1e-12)
            self.scale = (self.bank.d_in / squares).sqrt()
        if self.config.decoder_bias:
            means = torch.stack([rows.mean(0) for rows in x])
            self.bank.b_dec.copy_(means * self.scale[:, None])

    def step(self, x: Float[Tensor, "n batch d_in"], at: Moment, objective: Objective | None) -> None:
        """One optimiser step on activations that are already scaled."""
        config, train = self.config, self.train
        logs = (at.step + 1) % train.log_every == 0 or at.last
        for name, group in zip(self.bank.parameters(), self.optimiser.param_groups, strict=True):
            faster = THRESHOLD_LR if name == "log_threshold" else 1.0
            group["lr"] = config.lr * at.lr_factor * faster
        warm = min(1.0, (at.step + 1) / max(1.0, config.sparsity_warmup * at.n_steps))
        loss = self.bank.loss(x, self.dead, warm, objective, self.watch if logs else ())
        self.bank.project_gradients()
        self.optimiser.step()
        self.bank.renormalise()
        self.silent = torch.where(loss.firings > 0, 0.0, self.silent + x.shape[1])
        self.window += loss.firings
        self.counts[0] += x.shape[1]
        self._remember_threshold(loss)
        if logs:
            self._log(x, loss, at)

    def _remember_threshold(self, loss: BankLoss) -> None:
        found, keep = loss.least > 0, THRESHOLD_MEMORY
        for place, new in ((1, loss.least), (2, torch.ones_like(loss.least))):
            mean = keep * self.counts[place] + (1 - keep) * new
            self.counts[place] = torch.where(found, mean, self.counts[place])

    @torch.no_grad()
    def _log(self, x: Tensor, loss: BankLoss, at: Moment) -> None:
        self._check(loss.total, self.bank.names, at.step + 1)
        step, names, train = at.step + 1, self.bank.names, self.train
        common = {
            "step": step,
            "tokens": step * x.shape[1],
            "lr": self.config.lr * at.lr_factor,
            "tokens_per_second": at.tokens_per_second,
        }
        dead = self.dead.float().mean(1)
        self.rows["training_log"] += log_rows(names, loss, x, dead, common)
        peak = loss.peak / self.scale[:, None]
        if self.config.decoder == "free":  # as in the finished SAE, whose rows have norm 1
            peak = peak * self.bank.W_dec[:, list(self.watch)].norm(dim=2)
        self.rows["training_watched"] += watched_rows(names, step, self.watch, peak)
        if step % (train.log_every * train.histogram_every) == 0 or at.last:
            rates = self.window / self.counts[0].clamp_min(1)[:, None]
            self.rows["training_density"] += density_rows(names, step, rates)
            self.window.zero_()
            self.counts[0].zero_()

    def _check(self, loss: Float[Tensor, " n"], names: Sequence[str], step: int) -> None:
        if torch.isfinite(loss).all():
            return
        worst = int((~torch.isfinite(loss)).int().argmax())
        raise SAEError(
            f"training of {names[worst]!r} diverged by step {step}; try a smaller lr than {self.config.lr:g}"
        )

    @torch.no_grad()
    def resample(self, rows: Sequence[Float[Tensor, "n d_in"]], step: int) -> None:
        """Give each SAE's dead features a new start on scaled activations of its site."""
        dead, p = self.dead, self.bank.parameters()
        whole = {"b_dec": self.bank.b_dec, **p}
        for s, x in enumerate(rows):
            if not dead[s].any():
                continue
            one = slice(s, s + 1)
            x_hat = self.bank.forward(one, {name: t[one] for name, t in whole.items()}, x[None]).x_hat[0]
            error = x - x_hat
            self._check(error.square().sum()[None], self.bank.names[one], step)
            seed = seed_of(self.train.seed, f"{self.bank.names[s]}/resample/{step}")
            resample(whole, s, dead[s], x, error, seed)
            for name, tensor in p.items():
                if name != "b_dec":
                    for key in ("exp_avg", "exp_avg_sq"):
                        self.optimiser.state[tensor][key][s, dead[s]] = 0.0
            self.silent[s, dead[s]] = 0.0

    @torch.no_grad()
    def error(self, s: int, x: Float[Tensor, "n d_in"]) -> float:
        """Mean squared error of one SAE on scaled activations."""
        one = slice(s, s + 1)
        p = {name: t[one] for name, t in {"b_dec": self.bank.b_dec, **self.bank.parameters()}.items()}
        return squared_error(x[None], self.bank.forward(one, p, x[None]).x_hat).item()

    def finished(self, origin: Origin) -> list[SAE]:
        """The bank's SAEs for unscaled inputs: activations and biases shrink by the scale."""
        return [self._finished(s, origin) for s in range(len(self.bank))]

    def _finished(self, s: int, origin: Origin) -> SAE:
        bank, config, scale = self.bank, self.bank.configs[s], self.scale[s]
        p = {name: t[s].detach().clone() for name, t in {"b_dec": bank.b_dec, **bank.parameters()}.items()}
        norm = (
            p["W_dec"].norm(dim=1).clamp_min(1e-8)
            if config.decoder == "free"
            else torch.ones_like(p["b_enc"])
        )
        tensors = {
            "W_enc": (p["W_enc"] * norm[:, None]).T.contiguous(),
            "b_enc": p["b_enc"] * norm / scale,
            "W_dec": p["W_dec"] / norm[:, None],
            "b_dec": p["b_dec"] / scale,
        }
        if config.architecture == "jumprelu":
            tensors["threshold"] = p["log_threshold"].exp() * norm / scale
        elif config.architecture == "gated":
            tensors |= {"b_gate": p["b_gate"] * norm / scale, "r_mag": p["r_mag"]}
        elif config.architecture in ("batchtopk", "matryoshka"):
            mean = self.counts[1, s] / self.counts[2, s].clamp_min(1e-8)
            tensors["threshold"] = mean * norm / scale
        return SAE(self._info(s, origin), **tensors)

    def _info(self, s: int, origin: Origin) -> SAEInfo:
        config, name = self.bank.configs[s], self.bank.names[s]
        coefficient = config.l0_coefficient if config.architecture == "jumprelu" else config.l1_coefficient
        used = {"sae": to_plain(config), "train": to_plain(replace(self.train, checkpoint_seconds=0.0))}
        used["train"]["precision"] = str(self.bank.dtype).removeprefix("torch.")
        for machine in ("parts", "cache", "cache_gb"):
            used["train"].pop(machine)
        return SAEInfo(
            name=name,
            model=origin.model,
            processing=origin.processing,
            site=self.sites[s],
            architecture=config.architecture,
            k=min(config.k, self.bank.d_sae) if config.has_k else None,
            l1_coefficient=None if config.has_k else coefficient,
            tokens_trained=origin.tokens_trained,
            corpus=origin.corpus,
            context=origin.context,
            seed=seed_of(self.train.seed, name),
            origin="trained",
            code_version=origin.code_version,
            normalize_activations=config.normalize_activations,
            settings=json.dumps(used, sort_keys=True),
        )

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the training state."""
        out = {"scale": self.scale, "silent": self.silent, "window": self.window, "counts": self.counts}
        for name, p in self.bank.parameters().items():
            out[name] = p
            out |= {f"{name}.{key}": value for key, value in self.optimiser.state[p].items()}
        return out

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state`` gave; KeyError or RuntimeError if it does not fit."""
        self.scale, self.silent = state["scale"], state["silent"]
        self.window, self.counts = state["window"], state["counts"]
        for name, p in self.bank.parameters().items():
            p.copy_(state[name])
            keys = [key for key in state if key.startswith(f"{name}.")]
            self.optimiser.state[p] = {key.removeprefix(f"{name}."): state[key] for key in keys}
