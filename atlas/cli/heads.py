"""``atlas heads``: everything measured of one head, and the measurements made again."""

import re
from collections.abc import Mapping

import click

from atlas.configs import BuildConfig
from atlas.errors import ConfigError, StoreError
from atlas.settings import load_settings

CLOSE = 1e-3
"""Largest difference of a number that another machine or batching may make."""


def measured_config(provenance: Mapping[str, str]) -> BuildConfig:
    """The config of the build that a release came from; StoreError where it came from elsewhere."""
    try:
        return BuildConfig.from_json(provenance["config"])
    except (KeyError, ValueError, TypeError, ConfigError) as error:
        raise StoreError(
            f"the release does not say how it was built ({error}); build one to compare"
        ) from None


@click.command()
@click.argument("head", required=False, metavar="[HEAD]")
@click.option(
    "--release", metavar="NAME", help="Release, or NAME@VERSION; the one published last by default."
)
@click.option("--model", metavar="NAME", help="A model of the release; the first by default.")
@click.option("--recompute", is_flag=True, help="Measure all heads again, and compare with the release.")
@click.pass_context
def heads(
    ctx: click.Context, head: str | None, release: str | None, model: str | None, recompute: bool
) -> None:
    """Print what was measured of HEAD (such as L5H3), or of all heads.

    With --recompute, the model reads the release's text again and every table about heads is compared with
    the stored one: exit code 1 if rows are missing or a number differs by more than 0.001.
    """
    from atlas.cli.report import markdown
    from atlas.store.build import read_provenance
    from atlas.store.connection import cursor, open_release
    from atlas.store.queries import overview
    from atlas.store.release import current
    from atlas.store.reports_heads import all_scores, one_head

    settings = load_settings()
    info = current(settings.releases, release)
    con = cursor(open_release(info.path))
    if recompute:
        config = measured_config(read_provenance(info.path))
        from atlas.cli.display import display
        from atlas.pipeline.remeasure import agreement, remeasure

        with display("heads") as progress:
            found = agreement(con, remeasure(config, settings, progress))
        for one in found:
            far = f"largest difference {one.largest:.2g}" + (f" ({one.where})" if one.largest else "")
            click.echo(f"{one.table:<20} {one.rows:>6} rows, {one.unmatched} unmatched, {far}")
        if any(one.unmatched or one.largest > CLOSE for one in found):
            ctx.exit(1)
        return
    name = overview.find_model(overview.models(con), model)
    if head is None:
        parts = all_scores(con, name.model)
    else:
        match = re.fullmatch(r"L(\d{1,4})H(\d{1,4})", head, re.IGNORECASE)
        if match is None or int(match[1]) >= name.n_layers or int(match[2]) >= name.n_heads:
            last = f"L{name.n_layers - 1}H{name.n_heads - 1}"
            raise StoreError(f"head {head!r} does not exist in {name.model}; allowed: L0H0 to {last}")
        parts = one_head(con, name.model, int(match[1]), int(match[2]))
    if not parts:
        raise StoreError(f"release {info.label!r} has no scores of heads of model {name.model!r}")
    click.echo(markdown(parts), nl=False)
