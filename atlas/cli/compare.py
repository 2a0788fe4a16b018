"""``atlas compare-reference``: a release beside what was published about the same model."""

import click

from atlas.settings import load_settings


@click.command("compare-reference")
@click.option(
    "--release", metavar="NAME", help="Release, or NAME@VERSION; the one published last by default."
)
@click.option("--model", metavar="NAME", help="A model of the release; the first by default.")
@click.option(
    "--format",
    "form",
    type=click.Choice(("markdown", "csv")),
    default="markdown",
    help="markdown: as shown; csv: the published numbers alone, in full precision.",
)
def compare_reference(release: str | None, model: str | None, form: str) -> None:
    """Rank correlations between published facts about a model's heads and the columns of a release.

    There is reference data for GPT-2 small: attention scores, loss under mean ablation, spectra of the OV and
    QK operators, and heads with a published role. A release of another model is refused.
    """
    from atlas.cli.report import csv, markdown
    from atlas.store.connection import cursor, open_release
    from atlas.store.queries import overview
    from atlas.store.reference import compare
    from atlas.store.release import current

    info = current(load_settings().releases, release)
    con = cursor(open_release(info.path))
    found = overview.find_model(overview.models(con), model)
    parts = compare(con, found.model, found.n_layers, found.n_heads)
    click.echo(markdown(parts) if form == "markdown" else csv(parts[:1]), nl=False)
