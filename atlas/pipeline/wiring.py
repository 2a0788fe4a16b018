"""The steps of a build, each with what it needs and the digest that follows.

    tokens -> train or train-000, ... and imports -> prune -> finetune -> evaluate, shards, summaries, ...

Steps after the SAEs read them as they are after the last stage that was asked for.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from atlas.configs import BuildConfig, TrainConfig
from atlas.corpus.sources import open_source
from atlas.lm.files import ModelFiles, tokenizer_digest
from atlas.pipeline.members import IMPORTS, Member, part_names
from atlas.plain import digest_of, to_plain
from atlas.sae.library import Imported
from atlas.sites import Site

CODE_VERSIONS = {
    "tokens": 1,
    "train": 2,
    "imports": 1,
    "prune": 1,
    "finetune": 1,
    "evaluate": 2,
    "heads": 1,
    "shard": 1,
    "summarise": 2,
    "dfa": 1,
    "reference": 2,
    "publish": 2,
}
"""Raised when a step's code changes what it writes, so that older outputs are made anew."""

QUEUES = {"tokens": "io", "imports": "io", "summarise": "cpu", "reference": "io", "publish": "io"}
"""Steps not named here run the model and go to the gpu queue."""

STAGE_STEPS = {"pruned": "prune", "finetuned": "finetune"}
"""The step of each stage after training (or importing)."""


def stages_of(config: BuildConfig) -> tuple[str, ...]:
    """What a build's SAEs go through, in order.

    >>> from atlas.configs import FinetuneConfig
    >>> stages_of(BuildConfig(finetune=FinetuneConfig()))
    ('trained', 'finetuned')
    """
    later = [stage for stage, step in STAGE_STEPS.items() if getattr(config, step) is not None]
    return ("trained", *later)


def analysed(config: BuildConfig) -> int:
    """Blocks to summarise: no more than the corpus may have."""
    return min(config.analysis.blocks, config.corpus.blocks)


def lasting(train: TrainConfig) -> dict[str, Any]:
    """The training settings that decide an SAE.

    How often it is saved, how many steps the sites are dealt out to, and whether activations pass through
    a cache do not change what is trained.
    """
    usual = TrainConfig()
    return to_plain(replace(train, checkpoint_seconds=0.0, parts=1, cache=False, cache_gb=usual.cache_gb))


def reading(train: TrainConfig) -> dict[str, Any]:
    """The settings that decide which training text later stages read, and how it is rounded."""
    names = ("batch", "chunk_batches", "seed", "activation_dtype")
    return {name: getattr(train, name) for name in names}


@dataclass(frozen=True)
class Step:
    """One unit of work: its output lies in ``steps/<kind>-<digest16>``."""

    name: str
    kind: str
    digest: str
    queue: str
    needs: tuple[str, ...]
    item: int = 0
    """Which part, shard or SAE it is about."""

    @property
    def folder(self) -> str:
        """Name of the output folder."""
        return f"{self.kind}-{self.digest[:16]}"


class Wiring:
    """Builds the steps one after another, each with the digest of what it needs."""

    def __init__(
        self,
        config: BuildConfig,
        files: ModelFiles,
        parts: Sequence[Sequence[Site]],
        saes: Sequence[Member],
        imported: Sequence[Imported],
    ) -> None:
        self.config, self.files, self.parts = config, files, parts
        self.saes, self.imported = saes, imported
        self.made: dict[str, Step] = {}
        self.model = {"name": files.name, "digest": files.digest, "processing": config.model.processing}
        self.held_out = config.evaluation.blocks

    def add(self, name: str, kind: str, needs: tuple[str, ...], item: int = 0, **settings: Any) -> None:
        """One more step; what it needs is there already."""
        inputs = [self.made[need].digest for need in needs]
        digest = digest_of({"kind": kind, "code": CODE_VERSIONS[kind], "needs": inputs, "settings": settings})
        self.made[name] = Step(name, kind, digest, QUEUES.get(kind, "gpu"), needs, item)

    def all(self) -> tuple[Step, ...]:
        """The steps of the build, in an order in which they can be done."""
        config = self.config
        corpus = asdict(config.corpus) | {"identity": open_source(config.corpus.source).identity()}
        tokenizer = tokenizer_digest(self.files)
        self.add("tokens", "tokens", (), corpus=corpus, tokenizer=tokenizer, least=self.held_out + 1)
        sources = self._sources()
        stages = self._stages(sources)
        last = stages[-1:] or sources
        self.add("evaluate", "evaluate", ("tokens", *sources, *stages), blocks=self.held_out)
        self.add("heads", "heads", ("tokens",), model=self.model)
        shards = self._shards(last)
        summaries = self._summaries(tuple(dict.fromkeys((*last, *stages))), shards)
        dfa = self._dfa(last, shards, summaries)
        # The table of models says where the weights came from, which their digest does not cover.
        needs = ("tokens", *last, *shards)
        self.add("reference", "reference", needs, model=self.model, source=self.files.source)
        parts = ("tokens", *sources, *stages, "evaluate", "heads", *summaries, *dfa, "reference")
        plain = to_plain(config) | {"train": lasting(config.train)}
        self.add("publish", "publish", parts, release=config.release_name, config=plain)
        return tuple(self.made.values())

    def _sources(self) -> tuple[str, ...]:
        """The steps that SAEs come from."""
        names = part_names(self.parts)
        for item, (name, sites) in enumerate(zip(names, self.parts, strict=True)):
            self.add(
                name,
                "train",
                ("tokens",),
                item,
                model=self.model,
                held_out=self.held_out,
                sites=[site.name for site in sites],
                sae=to_plain(self.config.sae),
                train=lasting(self.config.train),
            )
        if not self.imported:
            return names
        saes = [[sae.name, sae.digest] for sae in self.imported]
        self.add(IMPORTS, "imports", (), model=self.model, saes=saes)
        return (*names, IMPORTS)

    def _stages(self, sources: tuple[str, ...]) -> tuple[str, ...]:
        """The steps that change the SAEs afterwards."""
        config, names, last = self.config, [], sources
        text = reading(config.train) | {"held_out": self.held_out}
        if config.prune is not None:
            self.add("prune", "prune", ("tokens", *last), prune=to_plain(config.prune), text=text)
            names, last = ["prune"], ("prune",)
        if config.finetune is not None:
            schedule = {"warmup": config.train.warmup, "decay": config.train.decay}
            settings = to_plain(config.finetune) | schedule
            self.add("finetune", "finetune", ("tokens", *last), finetune=settings, text=text)
            names.append("finetune")
        return tuple(names)

    def _shards(self, saes: tuple[str, ...]) -> tuple[str, ...]:
        analysis, blocks = self.config.analysis, analysed(self.config)
        names = []
        for item in range(-(-blocks // analysis.shard_blocks)):
            name = f"shard-{item:04d}"
            start = item * analysis.shard_blocks
            stop = min(start + analysis.shard_blocks, blocks)
            self.add(name, "shard", ("tokens", *saes), item, blocks=[start, stop])
            names.append(name)
        return tuple(names)

    def _summaries(self, saes: tuple[str, ...], shards: tuple[str, ...]) -> tuple[str, ...]:
        names = []
        for item, sae in enumerate(self.saes):
            name = f"summarise-{sae.name.split('/', 1)[-1]}"
            name = f"summarise-{sae.name}" if name in self.made else name
            needs = ("tokens", *saes, *shards)
            self.add(name, "summarise", needs, item, sae=sae.name, seed=self.config.analysis.seed)
            names.append(name)
        return tuple(names)

    def _dfa(
        self, saes: tuple[str, ...], shards: tuple[str, ...], summaries: tuple[str, ...]
    ) -> tuple[str, ...]:
        if not any(sae.site.kind == "z" and sae.site.head is None for sae in self.saes):
            return ()
        self.add("dfa", "dfa", ("tokens", *saes, *shards, *summaries))
        return ("dfa",)
