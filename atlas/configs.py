"""What an experiment is: frozen dataclasses, read strictly from TOML or JSON, named by a digest.

A sentence under each field says what it does. Nothing here looks at the machine (see ``settings``) and
nothing acts on creation beyond checking values.
"""

import dataclasses
import hashlib
import json
import math
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from atlas.errors import ConfigError, one_of
from atlas.sites import KINDS

ARCHITECTURES = ("topk", "relu")
PROCESSINGS = ("raw", "folded")
RELEASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MOST = 10**12
T = TypeVar("T")


def _at_least(where: str, value: float, low: float) -> None:
    _bounded(where, value)
    if not value >= low:
        raise ConfigError(f"{where} {value!r} is too small; allowed: {low:g} or more")


def _bounded(where: str, value: float) -> None:
    if math.isinf(value) or value > MOST:
        raise ConfigError(f"{where} {value!r} is too large; allowed: up to {MOST}")


def _positive(where: str, value: float) -> None:
    _bounded(where, value)
    if not value > 0:
        raise ConfigError(f"{where} {value!r} is not allowed; it must be above 0")


@dataclass(frozen=True)
class ModelConfig:
    """Which language model, and how its weights are prepared."""

    name: str = "docs-12l"
    """A bundled model, a local Hugging Face folder, or a hub name such as gpt2."""
    processing: str = "raw"
    """raw, or folded (LayerNorm folded, weights centred, value biases folded)."""

    def __post_init__(self) -> None:
        one_of("processing", self.processing, PROCESSINGS)


@dataclass(frozen=True)
class CorpusConfig:
    """Which text, cut into blocks of equal length."""

    source: str = "stdlib"
    """stdlib, a .txt, .jsonl or .parquet file, a folder of text, or hf:NAME."""
    blocks: int = 8192
    """Most blocks to take; a shorter text gives fewer."""
    context: int = 128
    """Tokens in a block, BOS included."""

    def __post_init__(self) -> None:
        _at_least("corpus blocks", self.blocks, 2)
        _at_least("corpus context", self.context, 8)


@dataclass(frozen=True)
class SitesConfig:
    """Where in the model SAEs are trained."""

    kinds: tuple[str, ...] = ("z",)
    """Any of z q k v resid_pre attn_out mlp_out."""
    layers: str | tuple[int, ...] = "all"
    """"all" or layer numbers."""
    heads: str | tuple[int, ...] | None = None
    """For single-head sites: "all" or head numbers. Unset: whole layers for z, all heads for q, k, v."""

    def __post_init__(self) -> None:
        for kind in self.kinds:
            one_of("site", kind, KINDS)


@dataclass(frozen=True)
class SAEConfig:
    """One kind of SAE; it is trained once at every site."""

    architecture: str = "topk"
    """topk or relu."""
    expansion: int = 8
    """d_sae as a multiple of d_in, where d_sae is not given."""
    d_sae: int | None = None
    """Number of features."""
    k: int = 32
    """TopK: features kept per token."""
    aux_k: int = 64
    """TopK: silent features that help to explain the error (AuxK); 0 for none."""
    aux_coefficient: float = 1 / 32
    """TopK: weight of the AuxK loss."""
    l1_coefficient: float = 3.0
    """ReLU: weight of the L1 penalty, at inputs of mean squared norm d_in and unit decoder rows."""
    lr: float = 2e-3
    """Peak learning rate of Adam (betas 0.9, 0.999)."""
    label: str | None = None
    """Distinguishes two SAEs of the same architecture and width in a release."""

    def __post_init__(self) -> None:
        one_of("architecture", self.architecture, ARCHITECTURES)
        for name in ("expansion", "k", "lr"):
            _positive(f"sae {name}", getattr(self, name))
        for name in ("aux_k", "aux_coefficient", "l1_coefficient"):
            _at_least(f"sae {name}", getattr(self, name), 0)
        if self.d_sae is not None:
            _positive("sae d_sae", self.d_sae)
        if self.d_sae is not None and self.d_sae < self.k and self.architecture == "topk":
            raise ConfigError(f"sae k {self.k} is more than d_sae {self.d_sae}")

    def width(self, d_in: int) -> int:
        """d_sae at a site of this width."""
        return self.d_sae if self.d_sae is not None else self.expansion * d_in

    def name_at(self, model: str, site: str, d_in: int) -> str:
        """The SAE's readable name.

        >>> SAEConfig(expansion=4).name_at("docs-12l", "L05.z", 192)
        'docs-12l/L05.z.topk-768'
        """
        suffix = f"-{self.label}" if self.label else ""
        return f"{model}/{site}.{self.architecture}-{self.width(d_in)}{suffix}"


@dataclass(frozen=True)
class TrainConfig:
    """How the SAEs are trained; all of them read the same activations in the same order."""

    tokens: int = 2_000_000
    """Training tokens; the text is read again in a new order when it is shorter."""
    batch: int = 4096
    """Tokens per optimiser step."""
    chunk_batches: int = 4
    """Optimiser steps per harvested and shuffled chunk."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises."""
    decay: float = 0.3
    """Last fraction of the steps, over which the learning rate falls to zero."""
    dead_window: int = 100_000
    """A feature silent for this many tokens counts as dead."""
    log_every: int = 10
    """Optimiser steps between rows of the training log."""
    checkpoint_seconds: float = 30.0
    """Wall-clock time between checkpoints; it does not change the result."""
    seed: int = 0
    """Seed of initial weights and of the order of the text."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "chunk_batches", "dead_window", "log_every"):
            _positive(f"train {name}", getattr(self, name))
        for name in ("seed", "warmup", "decay", "checkpoint_seconds"):
            _at_least(f"train {name}", getattr(self, name), 0)


@dataclass(frozen=True)
class EvalConfig:
    """The held-out text on which SAEs are judged: the first blocks of the corpus, never trained on."""

    blocks: int = 64
    """Held-out blocks."""

    def __post_init__(self) -> None:
        _positive("evaluation blocks", self.blocks)


@dataclass(frozen=True)
class AnalysisConfig:
    """The text that the tables summarise: the first blocks of the corpus."""

    blocks: int = 2048
    """Blocks to summarise; a shorter corpus gives fewer."""
    shard_blocks: int = 256
    """Blocks in one shard: the unit that is lost and redone when a worker dies."""
    seed: int = 0
    """Seed of the drawn examples."""

    def __post_init__(self) -> None:
        _positive("analysis blocks", self.blocks)
        _positive("analysis shard_blocks", self.shard_blocks)
        _at_least("analysis seed", self.seed, 0)


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides what a release holds."""

    release: str | None = None
    """The release's name; the model's name if unset."""
    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    sites: SitesConfig = field(default_factory=SitesConfig)
    sae: tuple[SAEConfig, ...] = (SAEConfig(),)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)

    def __post_init__(self) -> None:
        if not self.sae:
            raise ConfigError("no [[sae]] is given; at least one is needed")
        if self.corpus.blocks <= self.evaluation.blocks:
            raise ConfigError(
                f"evaluation blocks {self.evaluation.blocks} leave nothing to train on: "
                f"corpus blocks is {self.corpus.blocks}, and more are needed"
            )

    @property
    def release_name(self) -> str:
        """The release's name, safe as a folder name."""
        name = self.release or Path(self.model.name.replace(":", "-")).name or "atlas"
        if not RELEASE_NAME.fullmatch(name):
            raise ConfigError(
                f"release {name[:80]!r} is not allowed; use up to 64 letters, digits, '.', '_' and '-', "
                "a letter or digit first"
            )
        return name

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON; names the run."""
        return digest_of(to_plain(self))

    def to_json(self) -> str:
        """Canonical JSON, which ``from_json`` reads back to an equal config."""
        return json.dumps(to_plain(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "BuildConfig":
        """Read what ``to_json`` wrote.

        >>> BuildConfig.from_json(BuildConfig().to_json()) == BuildConfig()
        True
        """
        return from_plain(cls, json.loads(text))

    @classmethod
    def from_toml(cls, path: Path) -> "BuildConfig":
        """Read a TOML file; ConfigError names the file and what is wrong in it."""
        try:
            return from_plain(cls, tomllib.loads(path.read_text(encoding="utf8")))
        except OSError as error:
            raise ConfigError(f"config {str(path)!r} cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"config {str(path)!r} is not TOML: {error}") from None
        except ConfigError as error:
            raise ConfigError(f"config {str(path)!r}: {error}") from None


def to_plain(value: Any) -> Any:
    """A config as dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    return value


def digest_of(plain: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of dicts, lists and scalars.

    >>> digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def from_plain(cls: type[T], plain: Any, where: str = "") -> T:
    """Build a config dataclass from dicts, lists and scalars, refusing unknown keys and wrong types.

    >>> from_plain(ModelConfig, {"name": "gpt2", "procesing": "raw"})
    Traceback (most recent call last):
    ...
    atlas.errors.ConfigError: key 'procesing' is not known; allowed: name, processing
    """
    if not isinstance(plain, dict):
        raise ConfigError(f"{where or cls.__name__} {plain!r} is not a table of keys")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in plain:
        one_of(f"{where + ' ' if where else ''}key", key, names)
    return cls(
        **{key: _typed(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in plain.items()}
    )


def _typed(hint: Any, value: Any, where: str) -> Any:
    """``value`` as ``hint`` asks, or ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _first_fit(args, value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} {value!r} is not a list")
        return tuple(_typed(args[0], item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where} {value!r} is not {_readable(hint)}")
    return value


def _first_fit(options: tuple[Any, ...], value: Any, where: str) -> Any:
    for option in options:
        if option is type(None):
            if value is None:
                return None
            continue
        try:
            return _typed(option, value, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where} {value!r} is not {' or '.join(_readable(o) for o in options)}")


def _readable(hint: Any) -> str:
    names = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "unset",
    }
    return names.get(hint, "a list" if typing.get_origin(hint) is tuple else str(hint))
