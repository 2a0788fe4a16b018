"""``atlas demo``: the main job on the bundled model, then the app."""

import click

from atlas.configs import (
    AnalysisConfig,
    BuildConfig,
    CorpusConfig,
    EvalConfig,
    ModelConfig,
    SAEConfig,
    TrainConfig,
)

DEMO = BuildConfig(
    model=ModelConfig("docs-12l"),
    corpus=CorpusConfig("stdlib", blocks=4096, context=128),
    sae=(SAEConfig("topk", expansion=4, k=32, lr=2e-3),),
    train=TrainConfig(tokens=393_216, batch=1024, chunk_batches=16, dead_window=40_000),
    evaluation=EvalConfig(blocks=32),
    analysis=AnalysisConfig(blocks=1536, shard_blocks=256),
)
"""Small enough for a laptop's two cores and a few minutes; every step is the real one."""


@click.command()
@click.option("--no-serve", is_flag=True, help="Stop before the app.")
@click.option("--port", type=int, default=8501, show_default=True, help="Port of the app.")
@click.pass_context
def demo(ctx: click.Context, no_serve: bool, port: int) -> None:
    """Train SAEs on all 144 heads of the bundled docs-12l, make every table, and open the app."""
    from atlas.cli.build import run_build

    run_build(DEMO)
    if not no_serve:
        from atlas.cli.app import app

        ctx.invoke(app, port=port)
