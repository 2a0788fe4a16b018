"""The plan of a build: steps, what each needs, and a digest that names each step's output.

A step's digest covers its own settings, the version of its code and the digests of what it needs, so an
output that exists under its digest is current by construction. No torch here: a plan is made in the time
it takes to hash the model's files.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from atlas.configs import BuildConfig, digest_of, to_plain
from atlas.corpus.sources import open_source
from atlas.errors import ConfigError, one_of
from atlas.lm.files import ModelFiles, find_model, read_shape, tokenizer_digest
from atlas.settings import Settings
from atlas.sites import ModelShape, Site, expand_sites

CODE_VERSIONS = {
    "tokens": 1,
    "train": 1,
    "evaluate": 1,
    "heads": 1,
    "shard": 1,
    "summarise": 1,
    "dfa": 1,
    "reference": 1,
    "publish": 1,
}
"""Raised when a step's code changes what it writes, so that older outputs are made anew."""

QUEUES = {"tokens": "io", "summarise": "cpu", "reference": "io", "publish": "io"}
"""Steps not named here run the model and go to the gpu queue."""


@dataclass(frozen=True)
class Step:
    """One unit of work: its output lies in ``steps/<kind>-<digest16>``."""

    name: str
    kind: str
    digest: str
    queue: str
    needs: tuple[str, ...]
    item: int = 0
    """Which shard or SAE it is about."""

    @property
    def folder(self) -> str:
        """Name of the output folder."""
        return f"{self.kind}-{self.digest[:16]}"


@dataclass(frozen=True)
class Plan:
    """A config with everything that it decides: model files, sites, names of SAEs, steps."""

    config: BuildConfig
    files: ModelFiles
    shape: ModelShape
    sites: tuple[Site, ...]
    sae_names: tuple[str, ...]
    sae_sites: tuple[Site, ...]
    steps: tuple[Step, ...]

    @cached_property
    def by_name(self) -> dict[str, Step]:
        """The steps by name."""
        return {step.name: step for step in self.steps}

    def step(self, name: str) -> Step:
        """The step of that name; ConfigError if the plan has none."""
        one_of("step", name, self.by_name)
        return self.by_name[name]

    def of_kind(self, kind: str) -> tuple[Step, ...]:
        """The steps of a kind, in order."""
        return tuple(step for step in self.steps if step.kind == kind)

    def shard_blocks(self, item: int) -> range:
        """The blocks that a shard asks for; a shorter corpus cuts them off."""
        size = self.config.analysis.shard_blocks
        return range(item * size, min((item + 1) * size, analysed(self.config)))


def analysed(config: BuildConfig) -> int:
    """Blocks to summarise: no more than the corpus may have."""
    return min(config.analysis.blocks, config.corpus.blocks)


def make_plan(config: BuildConfig, settings: Settings) -> Plan:  # noqa: ARG001 - the machine decides nothing yet
    """Work out the steps of a build.

    Raises:
        ModelError, CorpusError: the model or the text cannot be found.
        ConfigError: a layer, head or site does not exist in the model, the context is longer than the
            model's, or two SAEs would have one name.
    """
    files = find_model(config.model.name)
    shape = read_shape(files)
    if config.corpus.context > shape.n_ctx:
        raise ConfigError(
            f"corpus context {config.corpus.context} is too long; {files.name} allows {shape.n_ctx}"
        )
    sites = expand_sites(config.sites.kinds, config.sites.layers, config.sites.heads, shape)
    names, sae_sites = _sae_names(config, files, shape, sites)
    steps = _Steps(config, files, sites, names, sae_sites).all()
    return Plan(config, files, shape, sites, names, sae_sites, steps)


def _sae_names(
    config: BuildConfig, files: ModelFiles, shape: ModelShape, sites: tuple[Site, ...]
) -> tuple[tuple[str, ...], tuple[Site, ...]]:
    """Names and sites of the SAEs in the order in which the training step returns them."""
    names, found = [], []
    for sae in config.sae:
        widths = dict.fromkeys(site.d_in(shape) for site in sites)
        for site in (s for width in widths for s in sites if s.d_in(shape) == width):
            d_in = site.d_in(shape)
            if sae.architecture == "topk" and sae.k > sae.width(d_in):
                raise ConfigError(f"sae k {sae.k} is more than d_sae {sae.width(d_in)} at site {site.name}")
            names.append(sae.name_at(files.name, site.name, d_in))
            found.append(site)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two SAEs would be called {twice[0]!r}; give one [[sae]] a label")
    return tuple(names), tuple(found)


class _Steps:
    """Builds the steps one after another, each with the digest of what it needs."""

    def __init__(
        self,
        config: BuildConfig,
        files: ModelFiles,
        sites: tuple[Site, ...],
        names: tuple[str, ...],
        sae_sites: tuple[Site, ...],
    ) -> None:
        self.config, self.files, self.sites, self.names = config, files, sites, names
        self.sae_sites = sae_sites
        self.made: dict[str, Step] = {}

    def add(self, name: str, kind: str, needs: tuple[str, ...], item: int = 0, **settings: Any) -> None:
        inputs = [self.made[need].digest for need in needs]
        digest = digest_of({"kind": kind, "code": CODE_VERSIONS[kind], "needs": inputs, "settings": settings})
        self.made[name] = Step(name, kind, digest, QUEUES.get(kind, "gpu"), needs, item)

    def all(self) -> tuple[Step, ...]:
        config = self.config
        model = {"name": self.files.name, "digest": self.files.digest, "processing": config.model.processing}
        held_out = config.evaluation.blocks
        corpus = asdict(config.corpus) | {"identity": open_source(config.corpus.source).identity()}
        least = held_out + 1
        self.add("tokens", "tokens", (), corpus=corpus, tokenizer=tokenizer_digest(self.files), least=least)
        self.add(
            "train",
            "train",
            ("tokens",),
            model=model,
            held_out=held_out,
            sites=[site.name for site in self.sites],
            sae=to_plain(config.sae),
            # How often it is saved does not change what is trained.
            train=to_plain(replace(config.train, checkpoint_seconds=0.0)),
        )
        self.add("evaluate", "evaluate", ("tokens", "train"), blocks=held_out)
        self.add("heads", "heads", ("tokens",), model=model)
        shards = self._shards()
        summaries = self._summaries(shards)
        dfa = self._dfa(shards, summaries)
        # The table of models says where the weights came from, which their digest does not cover.
        self.add(
            "reference", "reference", ("tokens", "train", *shards), model=model, source=self.files.source
        )
        parts = ("tokens", "train", "evaluate", "heads", *summaries, *dfa, "reference")
        self.add("publish", "publish", parts, release=config.release_name, config=to_plain(config))
        return tuple(self.made.values())

    def _shards(self) -> tuple[str, ...]:
        analysis, blocks = self.config.analysis, analysed(self.config)
        names = []
        for item in range(-(-blocks // analysis.shard_blocks)):
            name = f"shard-{item:04d}"
            start = item * analysis.shard_blocks
            stop = min(start + analysis.shard_blocks, blocks)
            self.add(name, "shard", ("tokens", "train"), item, blocks=[start, stop])
            names.append(name)
        return tuple(names)

    def _summaries(self, shards: tuple[str, ...]) -> tuple[str, ...]:
        names = []
        for item, sae in enumerate(self.names):
            name = f"summarise-{sae.split('/', 1)[1]}"
            needs = ("tokens", "train", *shards)
            self.add(name, "summarise", needs, item, sae=sae, seed=self.config.analysis.seed)
            names.append(name)
        return tuple(names)

    def _dfa(self, shards: tuple[str, ...], summaries: tuple[str, ...]) -> tuple[str, ...]:
        if not any(site.kind == "z" and site.head is None for site in self.sae_sites):
            return ()
        self.add("dfa", "dfa", ("tokens", "train", *shards, *summaries))
        return ("dfa",)
