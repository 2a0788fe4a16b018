"""A build small enough to run several times in a test session, and what to compare of two releases."""

from dataclasses import replace
from pathlib import Path

from atlas.configs import (
    AnalysisConfig,
    BuildConfig,
    CorpusConfig,
    EvalConfig,
    FinetuneConfig,
    HeadsConfig,
    ModelConfig,
    PruneConfig,
    SAEConfig,
    TrainConfig,
)
from atlas.pipeline.local import run_local
from atlas.pipeline.plan import Plan, make_plan
from atlas.settings import Settings, load_settings
from atlas.store.connection import open_release
from atlas.store.release import current

SMALL = BuildConfig(
    model=ModelConfig("docs-2l"),
    corpus=CorpusConfig("stdlib", blocks=80, context=64),
    sae=(SAEConfig("topk", d_sae=96, k=8, aux_k=8), SAEConfig("relu", d_sae=64, l1_coefficient=2.0)),
    train=TrainConfig(
        tokens=8192, batch=256, chunk_batches=4, log_every=4, dead_window=2000, checkpoint_seconds=0
    ),
    evaluation=EvalConfig(6),
    analysis=AnalysisConfig(40, shard_blocks=16),
    heads=HeadsConfig(ablation_blocks=1, prompts=1, repeats=2),
)

REFINED = replace(
    SMALL,
    train=replace(SMALL.train, parts=2),
    prune=PruneConfig(max_activation=3.2, firing_rate=0.05, tokens=3000),
    finetune=FinetuneConfig(tokens=4096, lr=5e-3),
)
"""The same SAEs, trained in two steps, pruned by limits that take some of them, and finetuned."""

SMALL_TOML = """
[model]
name = "docs-2l"
[corpus]
blocks = 80
context = 64
[[sae]]
architecture = "topk"
d_sae = 96
k = 8
aux_k = 8
[[sae]]
architecture = "relu"
d_sae = 64
l1_coefficient = 2.0
[train]
tokens = 8192
batch = 256
chunk_batches = 4
log_every = 4
dead_window = 2000
checkpoint_seconds = 0
[evaluation]
blocks = 6
[analysis]
blocks = 40
shard_blocks = 16
[heads]
ablation_blocks = 1
prompts = 1
repeats = 2
"""


class Quiet:
    """A display that shows nothing; counts updates."""

    def __init__(self, *_):
        self.updates = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def update(self, done, total, message=""):
        self.updates.append((done, total))


def settings_at(home: Path) -> Settings:
    return load_settings({"ATLAS_HOME": str(home), "ATLAS_THREADS": "1"})


def build(home: Path, config: BuildConfig = SMALL) -> Plan:
    settings = settings_at(home)
    plan = make_plan(config, settings)
    run_local(plan, settings, Quiet)
    return plan


def table_digests(home: Path, name: str = "docs-2l") -> dict[str, tuple[int, str]]:
    """Rows and content digest of every table of the current release."""
    with open_release(current(home / "releases", name).path) as con:
        return {t: (n, d) for t, n, d in con.execute("SELECT * FROM manifest").fetchall()}
