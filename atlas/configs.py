"""What an experiment is: frozen dataclasses, read strictly from TOML or JSON, named by a digest.

A sentence under each field says what it does. Nothing here looks at the machine (see ``settings``) and
nothing acts on creation beyond checking values.
"""

import json
import math
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from atlas.errors import ConfigError, one_of
from atlas.plain import digest_of, from_plain, to_plain
from atlas.sites import KINDS
from atlas.sweeps import expand_sweeps

ARCHITECTURES = ("topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated")
SPARSE_BY_K = ("topk", "batchtopk", "matryoshka")
DEAD_FEATURES = ("auto", "auxk", "resample", "ghost", "none")
NORMALISATIONS = ("none", "constant_norm_rescale", "layer_norm")
DECODERS = ("unit", "clipped", "free")
OBJECTIVES = ("mse", "scores", "pattern", "kl")
PRECISIONS = ("float32", "bfloat16", "auto")
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
    """One kind of SAE; it is trained once at every site.

    Coefficients and thresholds hold at inputs of mean squared norm d_in, to which every site is scaled
    while it is trained.
    """

    architecture: str = "topk"
    """topk, batchtopk, matryoshka (BatchTopK with nested prefixes), relu, jumprelu or gated."""
    expansion: int = 8
    """d_sae as a multiple of d_in, where d_sae is not given."""
    d_sae: int | None = None
    """Number of features."""
    k: int = 32
    """topk, batchtopk, matryoshka: features kept per token (batchtopk: on average)."""
    prefixes: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)
    """matryoshka: the nested dictionaries, as fractions of d_sae; the last is 1."""
    l1_coefficient: float = 3.0
    """relu, gated: weight of the L1 penalty."""
    l0_coefficient: float = 0.3
    """jumprelu: weight of the L0 penalty."""
    threshold: float = 0.5
    """jumprelu: threshold at the start, for encoder rows of norm 1 (wide SAEs start smaller)."""
    bandwidth: float = 0.5
    """jumprelu: width of the kernel through which the threshold gets its gradient; smaller, as well."""
    sparsity_warmup: float = 0.05
    """relu, gated, jumprelu: fraction of the steps over which the penalty rises to its full weight."""
    decoder: str = "unit"
    """unit: rows of norm 1; clipped: of norm 1 at most; free: any norm, with the penalty on activation
    times norm, and rescaled to norm 1 when training ends."""
    decoder_bias: bool = True
    """Whether there is a b_dec; it starts at the mean activation."""
    normalize_activations: str = "none"
    """none, constant_norm_rescale (each token to norm sqrt(d_in)) or layer_norm."""
    tied_start: bool = True
    """Whether W_enc starts as the transpose of W_dec (shorter, where a wide SAE has no k)."""
    dead_features: str = "auto"
    """auxk, resample, ghost or none; auto is auxk for the architectures with k and none for the others."""
    aux_k: int = 64
    """auxk: dead features that help to explain the error, per token; 0 for none."""
    aux_coefficient: float = 1 / 32
    """auxk: weight of the AuxK loss."""
    resample_tokens: int = 250_000
    """resample: tokens between resamplings, the last at half of the training."""
    objective: str = "mse"
    """mse; or beside it, for q and k: scores or pattern (of attention); for any site: kl (of the logits)."""
    objective_coefficient: float = 1.0
    """Weight of the objective beside the squared error."""
    mse_coefficient: float = 1.0
    """Weight of the squared error."""
    lr: float = 2e-3
    """Peak learning rate of Adam."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient."""
    beta2: float = 0.999
    """Adam's decay of the mean squared gradient."""
    label: str | None = None
    """Distinguishes two SAEs of the same architecture and width in a release."""

    def __post_init__(self) -> None:
        one_of("architecture", self.architecture, ARCHITECTURES)
        one_of("dead_features", self.dead_features, DEAD_FEATURES)
        one_of("normalize_activations", self.normalize_activations, NORMALISATIONS)
        one_of("decoder", self.decoder, DECODERS)
        one_of("objective", self.objective, OBJECTIVES)
        for name in ("expansion", "k", "lr", "threshold", "bandwidth", "resample_tokens"):
            _positive(f"sae {name}", getattr(self, name))
        for name in ("aux_k", "aux_coefficient", "l1_coefficient", "l0_coefficient", "sparsity_warmup"):
            _at_least(f"sae {name}", getattr(self, name), 0)
        for name in ("objective_coefficient", "mse_coefficient"):
            _at_least(f"sae {name}", getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"sae {name} {value!r} is not allowed; it must be from 0 to below 1")
        self._check_width()

    def _check_width(self) -> None:
        if self.d_sae is not None:
            _positive("sae d_sae", self.d_sae)
        if self.has_k and self.d_sae is not None and self.d_sae < self.k:
            raise ConfigError(f"sae k {self.k} is more than d_sae {self.d_sae}")
        rising = sorted(set(self.prefixes))
        if not rising or list(self.prefixes) != rising or rising[0] <= 0 or rising[-1] != 1:
            raise ConfigError(f"sae prefixes {self.prefixes} are not allowed; they rise from above 0 to 1")

    @property
    def has_k(self) -> bool:
        """Whether the architecture keeps k features."""
        return self.architecture in SPARSE_BY_K

    @property
    def revival(self) -> str:
        """What is done for dead features: auxk, resample, ghost or none."""
        if self.dead_features == "auto":
            return "auxk" if self.has_k else "none"
        return self.dead_features

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
    histogram_every: int = 10
    """Logged rows between two histograms of feature density."""
    watch: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    """Features whose strongest activation is logged over time."""
    precision: str = "float32"
    """Matrix products in float32 or bfloat16 (weights stay float32); auto is bfloat16 where it is fast."""
    parts: int = 1
    """Training steps that the sites are dealt out to, for several workers or GPUs."""
    cache: bool = False
    """Whether activations are written to disk first; sweeps and repeated runs then read them."""
    activation_dtype: str = "float32"
    """float32, float16 or bfloat16: what activations are rounded to before training, and cached as."""
    cache_gb: float = 50.0
    """Most gigabytes that the cache may take."""
    seed: int = 0
    """Seed of initial weights and of the order of the text."""

    def __post_init__(self) -> None:
        one_of("precision", self.precision, PRECISIONS)
        one_of("activation_dtype", self.activation_dtype, ("float32", "float16", "bfloat16"))
        for feature in self.watch:
            _at_least("train watch", feature, 0)
        for name in ("tokens", "batch", "chunk_batches", "dead_window", "log_every"):
            _positive(f"train {name}", getattr(self, name))
        for name in ("warmup", "decay"):
            if getattr(self, name) > 1:
                raise ConfigError(f"train {name} {getattr(self, name)!r} is too large; allowed: 0 to 1")
        for name in ("histogram_every", "parts", "cache_gb"):
            _positive(f"train {name}", getattr(self, name))
        for name in ("seed", "warmup", "decay", "checkpoint_seconds"):
            _at_least(f"train {name}", getattr(self, name), 0)


@dataclass(frozen=True)
class PruneConfig:
    """Which features are taken out after training (seed 003's three criteria)."""

    max_activation: float = 1.0
    """Features that never fire as strongly, at inputs of mean squared norm d_in, are pruned."""
    decoder_norm: float = 0.99
    """Features whose decoder row is shorter are pruned (means something for decoder = clipped)."""
    firing_rate: float = 1e-6
    """Features that fire more rarely are pruned."""
    tokens: int = 500_000
    """Training tokens over which activations and rates are measured."""

    def __post_init__(self) -> None:
        for name in ("max_activation", "decoder_norm", "firing_rate"):
            _at_least(f"prune {name}", getattr(self, name), 0)
        _positive("prune tokens", self.tokens)


@dataclass(frozen=True)
class FinetuneConfig:
    """Training after training, against feature suppression: the encoder is frozen, the loss is MSE alone."""

    tokens: int = 500_000
    """Tokens to finetune on."""
    lr: float = 2e-3
    """Peak learning rate of Adam."""

    def __post_init__(self) -> None:
        _positive("finetune tokens", self.tokens)
        _positive("finetune lr", self.lr)


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
    coactivation_blocks: int = 512
    """The first of these blocks, in which features that fire together are counted."""
    loss_blocks: int = 64
    """The first of these blocks, on which the effect of ablating a feature is measured by gradients."""
    seed: int = 0
    """Seed of the drawn examples."""

    def __post_init__(self) -> None:
        for name in ("blocks", "shard_blocks", "coactivation_blocks", "loss_blocks"):
            _positive(f"analysis {name}", getattr(self, name))
        _at_least("analysis seed", self.seed, 0)


@dataclass(frozen=True)
class SlotConfig:
    """What stands in a template's ``{name}``: one of some words, or a run of random characters."""

    name: str = ""
    """The name in the template; every ``{name}`` of a prompt is filled alike."""
    words: tuple[str, ...] = ()
    """Words to draw from."""
    characters: str = ""
    """Instead of words: characters to draw from."""
    length: int = 8
    """How many characters are drawn."""

    def __post_init__(self) -> None:
        _positive("slot length", self.length)
        if bool(self.words) == bool(self.characters):
            raise ConfigError(f"slot {self.name!r} needs either words or characters, and not both")


@dataclass(frozen=True)
class TaskConfig:
    """A task: prompts made from a template, and the stretch of them in which the loss counts."""

    name: str = ""
    """Short text, unique among the tasks."""
    template: str = ""
    """Text with slots in braces; ``[[`` and ``]]`` enclose what is to be predicted."""
    slot: tuple[SlotConfig, ...] = ()
    """What its slots are filled with."""

    def __post_init__(self) -> None:
        if not RELEASE_NAME.fullmatch(self.name):
            raise ConfigError(
                f"task name {self.name!r} is not allowed; use letters, digits, '.', '_' and '-'"
            )
        opened, closed = self.template.find("[["), self.template.find("]]")
        if self.template.count("[[") != 1 or self.template.count("]]") != 1 or not 0 < opened < closed - 2:
            raise ConfigError(
                f"task {self.name!r}: template {self.template!r} must enclose what is to be predicted, after "
                "other text, in one pair of [[ and ]]"
            )
        used, known = set(re.findall(r"\{(\w*)\}", self.template)), [slot.name for slot in self.slot]
        if sorted(used) != sorted(known):
            raise ConfigError(
                f"task {self.name!r} has the slots {sorted(known)}; its template names {sorted(used)}"
            )


@dataclass(frozen=True)
class HeadsConfig:
    """How heads are measured, beside their attention on the evaluation text."""

    ablation_blocks: int = 8
    """The first evaluation blocks, on which the loss without each head is measured; 0: it is not."""
    prompts: int = 12
    """Prompts of each task, on which the loss without each head is measured; 0: it is not."""
    repeats: int = 32
    """Random sequences of each kind: repeats, and earlier matches of each length."""
    task: tuple[TaskConfig, ...] = ()
    """Tasks beside the bundled ones (digit-copy, url)."""

    def __post_init__(self) -> None:
        for name in ("ablation_blocks", "prompts"):
            _at_least(f"heads {name}", getattr(self, name), 0)
        _positive("heads repeats", self.repeats)
        names = [task.name for task in self.task]
        if len(set(names)) < len(names):
            raise ConfigError(f"tasks {names} must have different names")


@dataclass(frozen=True)
class QKConfig:
    """What is tried with every head that has an SAE on its queries and one like it on its keys."""

    prompts: tuple[str, ...] = (
        "Mr and Mrs Dursley were perfectly normal. Mr D",
        "When Mary and John went to the store, John gave a drink to",
    )
    """Prompts on which the head's pattern is rebuilt and its features are removed one by one."""
    repeats: int = 16
    """Blocks of random tokens twice, on which induction is tried; 0: it is not."""
    half: int = 50
    """Random tokens before they come again (fewer where the model's context is shorter)."""
    targets: int = 2
    """Features "I follow X" of the keys, each taken out and left alone."""
    scale: float = 5.0
    """How much stronger such a feature is made when it is left alone."""
    seed: int = 0
    """Seed of the random tokens."""

    def __post_init__(self) -> None:
        for name in ("repeats", "targets", "seed"):
            _at_least(f"qk {name}", getattr(self, name), 0)
        _at_least("qk half", self.half, 4)
        _positive("qk scale", self.scale)


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides what a release holds."""

    release: str | None = None
    """The release's name; the model's name if unset."""
    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    sites: SitesConfig = field(default_factory=SitesConfig)
    sae: tuple[SAEConfig, ...] = (SAEConfig(),)
    imports: tuple[str, ...] = ()
    """Names of imported SAEs (see ``atlas import``) that join the trained ones."""
    train: TrainConfig = field(default_factory=TrainConfig)
    prune: PruneConfig | None = None
    finetune: FinetuneConfig | None = None
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    qk: QKConfig = field(default_factory=QKConfig)

    def __post_init__(self) -> None:
        if not self.sae and not self.imports:
            raise ConfigError("no [[sae]] and no import is given; at least one is needed")
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
            return from_plain(cls, expand_sweeps(tomllib.loads(path.read_text(encoding="utf8"))))
        except OSError as error:
            raise ConfigError(f"config {str(path)!r} cannot be read: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"config {str(path)!r} is not TOML: {error}") from None
        except ConfigError as error:
            raise ConfigError(f"config {str(path)!r}: {error}") from None
