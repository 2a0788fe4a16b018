"""The steps of a build, each with what it needs and the digest that follows.

    tokens -> train or train-000, ... and imports -> prune -> finetune -> evaluate, shards, summaries, ...

Steps after the SAEs read them as they are after the last stage that was asked for.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from atlas.configs import BuildConfig, TrainConfig
from atlas.corpus.sources import open_source
from atlas.corpus.stores import extension_ranges
from atlas.lm.files import ModelFiles, tokenizer_digest
from atlas.pipeline.members import IMPORTS, Member, pairs_of, part_names
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
    "heads": 2,
    "shard": 6,
    "effects": 1,
    "summarise": 8,
    "dfa": 9,
    "attribute": 4,
    "pair": 3,
    "reference": 2,
    "publish": 6,
}
"""Raised when a step's code changes what it writes, so that older outputs are made anew."""

QUEUES = {
    "tokens": "io",
    "imports": "io",
    "summarise": "cpu",
    "attribute": "cpu",
    "reference": "io",
    "publish": "io",
}
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


def text_ranges(config: BuildConfig) -> list[range]:
    """The blocks of each token store of the analysed text: the training's, and what comes after it.

    >>> from atlas.configs import AnalysisConfig, CorpusConfig
    >>> text_ranges(BuildConfig(corpus=CorpusConfig(blocks=100), analysis=AnalysisConfig(blocks=250)))
    [range(0, 100), range(100, 200), range(200, 400)]
    """
    first = config.corpus.blocks
    return [range(first), *extension_ranges(first, config.analysis.blocks)]


def shard_ranges(config: BuildConfig) -> list[range]:
    """The blocks of each shard; a shorter text cuts them off."""
    size, blocks = config.analysis.shard_blocks, config.analysis.blocks
    return [range(start, min(start + size, blocks)) for start in range(0, blocks, size)]


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
        texts = self._extensions(corpus, tokenizer)
        sources = self._sources()
        stages = self._stages(sources)
        last = stages[-1:] or sources
        self.add("evaluate", "evaluate", ("tokens", *sources, *stages), blocks=self.held_out)
        measured = to_plain(config.heads)
        self.add("heads", "heads", ("tokens",), model=self.model, blocks=self.held_out, heads=measured)
        shards = self._shards(last)
        self.add("effects", "effects", ("tokens", *last), blocks=config.analysis.loss_blocks)
        summaries = self._summaries(texts, tuple(dict.fromkeys((*last, *stages))), shards)
        attributions = self._attributions(texts, last, shards, summaries)
        # The table of models says where the weights came from, which their digest does not cover.
        needs = (*texts, *last, *shards)
        self.add("reference", "reference", needs, model=self.model, source=self.files.source)
        pairs = self._pairs(texts, last, summaries)
        shown = (*summaries, *attributions, *pairs)
        parts = ("tokens", *sources, *stages, "evaluate", "heads", *shown, "reference")
        plain = to_plain(config) | {"train": lasting(config.train)}
        self.add("publish", "publish", parts, release=config.release_name, config=plain)
        return tuple(self.made.values())

    def _extensions(self, corpus: dict[str, Any], tokenizer: str) -> tuple[str, ...]:
        """The steps that make the analysed text, which may go on after the text of the training."""
        names = ["tokens"]
        for item, blocks in enumerate(text_ranges(self.config)[1:], 1):
            names.append(f"tokens-{item:04d}")
            where = [blocks.start, blocks.stop]
            self.add(names[-1], "tokens", (), item, corpus=corpus, tokenizer=tokenizer, blocks=where)
        return tuple(names)

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
        names = []
        for item, blocks in enumerate(shard_ranges(self.config)):
            name = f"shard-{item:04d}"
            needs = (*self._texts_before(blocks.stop), *saes)
            self.add(name, "shard", needs, item, blocks=[blocks.start, blocks.stop])
            names.append(name)
        return tuple(names)

    def _texts_before(self, block: int) -> tuple[str, ...]:
        """The token stores that hold the text before a block, so that later ones do not touch its steps."""
        ranges = text_ranges(self.config)
        return tuple(
            f"tokens-{item:04d}" if item else "tokens"
            for item, blocks in enumerate(ranges)
            if blocks.start < block
        )

    def _summaries(
        self, texts: tuple[str, ...], saes: tuple[str, ...], shards: tuple[str, ...]
    ) -> tuple[str, ...]:
        analysis, names = self.config.analysis, []
        settings = {"seed": analysis.seed, "coactivation_blocks": analysis.coactivation_blocks}
        for item, sae in enumerate(self.saes):
            name = self._name_of("summarise", sae.name)
            needs = (*texts, *saes, *shards, "effects")
            self.add(name, "summarise", needs, item, sae=sae.name, **settings)
            names.append(name)
        return tuple(names)

    def _attributions(
        self,
        texts: tuple[str, ...],
        saes: tuple[str, ...],
        shards: tuple[str, ...],
        summaries: tuple[str, ...],
    ) -> tuple[str, ...]:
        """A second look at the kept examples of SAEs that read heads: parts of the text, then each SAE."""
        reading = [item for item, sae in enumerate(self.saes) if sae.site.kind in ("z", "attn_out")]
        if not reading:
            return ()
        kept = tuple(summaries[item] for item in reading)
        parts, names = [], []
        for item, blocks in enumerate(shard_ranges(self.config)):
            parts.append(f"dfa-{item:04d}")
            needs = (*self._texts_before(blocks.stop), *saes, *kept)
            self.add(parts[-1], "dfa", needs, item, blocks=[blocks.start, blocks.stop])
        for item in reading:
            names.append(self._name_of("attribute", self.saes[item].name))
            needs = (*texts, *saes, *shards, *parts)
            self.add(names[-1], "attribute", needs, item, sae=self.saes[item].name)
        return tuple(names)

    def _pairs(
        self, texts: tuple[str, ...], saes: tuple[str, ...], summaries: tuple[str, ...]
    ) -> tuple[str, ...]:
        """What is tried with each head that has SAEs on its queries and its keys."""
        names = []
        for item, (q, k) in enumerate(pairs_of(self.saes)):
            names.append(self._name_of("pair", self.saes[q].name))
            needs = (*texts, *saes, summaries[q], summaries[k])
            both = {"q": self.saes[q].name, "k": self.saes[k].name}
            self.add(names[-1], "pair", needs, item, model=self.model, qk=to_plain(self.config.qk), **both)
        return tuple(names)

    def _name_of(self, kind: str, sae: str) -> str:
        """A step's name: with the short name of its SAE, unless another step has it."""
        name = f"{kind}-{sae.split('/', 1)[-1]}"
        return f"{kind}-{sae}" if name in self.made else name
