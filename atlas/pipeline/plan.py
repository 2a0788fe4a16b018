"""The plan of a build: steps, what each needs, and a digest that names each step's output.

A step's digest covers its own settings, the version of its code and the digests of what it needs, so an
output that exists under its digest is current by construction. No torch here: a plan is made in the time
it takes to hash the model's files.
"""

from dataclasses import dataclass
from functools import cached_property

from atlas.configs import BuildConfig
from atlas.errors import ConfigError, one_of
from atlas.lm.files import ModelFiles, find_model, read_shape
from atlas.pipeline.members import Member, deal, find_imports, members_of
from atlas.pipeline.wiring import STAGE_STEPS, Step, Wiring, shard_ranges, stages_of
from atlas.settings import Settings
from atlas.sites import ModelShape, Site, expand_sites

__all__ = ["Plan", "Step", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """A config with everything that it decides: model files, parts of the training, SAEs, steps."""

    config: BuildConfig
    files: ModelFiles
    shape: ModelShape
    parts: tuple[tuple[Site, ...], ...]
    """The sites of each training step."""
    saes: tuple[Member, ...]
    """Every SAE, in the order in which later steps number them (see ``members``)."""
    steps: tuple[Step, ...]

    @cached_property
    def by_name(self) -> dict[str, Step]:
        """The steps by name."""
        return {step.name: step for step in self.steps}

    @property
    def sae_names(self) -> tuple[str, ...]:
        """Names of the SAEs."""
        return tuple(sae.name for sae in self.saes)

    @property
    def stages(self) -> tuple[str, ...]:
        """What the SAEs go through: trained, perhaps pruned, perhaps finetuned."""
        return stages_of(self.config)

    def place(self, item: int, stage: str | None = None) -> tuple[str, str]:
        """The step that makes an SAE as it is after a stage (the last one), and its folder in the output."""
        stage = stage or self.stages[-1]
        one_of("stage", stage, self.stages)
        if stage in STAGE_STEPS:
            return STAGE_STEPS[stage], f"{item:05d}"
        return self.saes[item].step, f"{self.saes[item].item:05d}"

    def step(self, name: str) -> Step:
        """The step of that name; ConfigError if the plan has none."""
        one_of("step", name, self.by_name)
        return self.by_name[name]

    def of_kind(self, kind: str) -> tuple[Step, ...]:
        """The steps of a kind, in order."""
        return tuple(step for step in self.steps if step.kind == kind)

    def shard_blocks(self, item: int) -> range:
        """The blocks that a shard asks for; a shorter corpus cuts them off."""
        return shard_ranges(self.config)[item]


def make_plan(config: BuildConfig, settings: Settings) -> Plan:
    """Work out the steps of a build.

    Raises:
        ModelError, CorpusError: the model or the text cannot be found.
        SAEError: an imported SAE is not there, or was made for another model.
        ConfigError: a layer, head or site does not exist in the model, the context is longer than the
            model's, or two SAEs would have one name.
    """
    files = find_model(config.model.name)
    shape = read_shape(files)
    if config.corpus.context > shape.n_ctx:
        raise ConfigError(
            f"corpus context {config.corpus.context} is too long; {files.name} allows {shape.n_ctx}"
        )
    parts: tuple[tuple[Site, ...], ...] = ()
    if config.sae:
        sites = expand_sites(config.sites.kinds, config.sites.layers, config.sites.heads, shape)
        parts = deal(sites, shape, config.train.parts)
    imported = find_imports(config, settings, files, shape)
    saes = members_of(config, files, shape, parts, imported)
    steps = Wiring(config, files, parts, saes, imported).all()
    return Plan(config, files, shape, parts, saes, steps)
