"""``atlas study``: the seeds' experiments with SAEs, built and printed by one command."""

from pathlib import Path

import click

from atlas.configs import BuildConfig

FOLDER = Path(__file__).parents[1] / "resources" / "studies"
STUDIES = {
    "qk": ("heads", "qk"),
    "sweep": ("sweep",),
    "layers": ("layers", "pruning", "stages"),
    "revival": ("training", "sweep"),
    "circuits": ("layers",),
    "induction": ("induction", "tasks"),
}
"""Each study and the reports that show its result; its config is ``resources/studies/NAME.toml``."""


def study_config(name: str) -> BuildConfig:
    """The config of a study."""
    return BuildConfig.from_toml(FOLDER / f"{name}.toml")


@click.command()
@click.argument("name", type=click.Choice(tuple(STUDIES)))
@click.option("--dry-run", is_flag=True, help="Print the steps and which are current; do nothing.")
@click.option(
    "--config", is_flag=True, help="Print the study's config, to build a variant of it; do nothing."
)
@click.pass_context
def study(ctx: click.Context, name: str, dry_run: bool, config: bool) -> None:
    """Build a release that answers one of the seeds' questions, and print the answer.

    qk: quality of SAEs on q and k of single heads (seed 000's table). sweep: width and L1 coefficient
    against L0, quality and dead features. layers: SAEs of every layer's z, attn_out and mlp_out, then
    pruned and finetuned (seed 003's tables). revival: dead features with each remedy, with and without
    decoder bias. induction: which heads want long prefixes, and tasks without each head (seed 001).
    circuits: SAEs on z and resid_pre of every layer, for `atlas circuit` and `atlas ioi` (seed 004).
    """
    from atlas.cli.build import run_build
    from atlas.cli.report import report

    if config:
        click.echo((FOLDER / f"{name}.toml").read_text(encoding="utf8"), nl=False)
        return
    asked = study_config(name)
    run_build(asked, dry_run=dry_run)
    if not dry_run:
        for kind in STUDIES[name]:
            click.echo()
            ctx.invoke(report, kind=kind, release=asked.release_name, form="markdown")
