"""``atlas report``: the tables of the seeds from a release, and figures of sweeps and trainings."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atlas.errors import ConfigError, StoreError
from atlas.settings import load_settings

if TYPE_CHECKING:
    import duckdb

    from atlas.store.reports import Part

KINDS = ("qk", "heads", "sweep", "layers", "pruning", "stages", "training", "families", "induction", "tasks")
FIGURES = ("sweep", "training")
ENDINGS = (".html", ".svg", ".png")
_LACKING = {
    "qk": "SAEs on q or k of single heads",
    "heads": "SAEs on q or k of single heads",
    "sweep": "site with several SAEs of one architecture",
    "layers": "SAEs of whole layers",
    "pruning": "pruned SAEs",
    "stages": "SAEs that were pruned or finetuned",
    "training": "SAEs that were trained here",
    "families": "SAEs on z of whole layers",
    "induction": "measurements of induction (made by an older version, it has none)",
    "tasks": "tasks on which heads were ablated",
}
_CURVES = (
    ("mse_loss", "squared error (log)", True, ".3~r"),
    ("l0", "L0, active features per token", False, ".3~r"),
    ("variance_explained", "variance explained, share", False, "~%"),
    ("dead_fraction", "dead features, share of d_sae", False, "~%"),
    ("lr", "learning rate", False, "~e"),
    ("tokens_per_second", "tokens per second", False, "~s"),
)


@click.command()
@click.argument("kind", type=click.Choice(KINDS))
@click.option(
    "--release", metavar="NAME", help="Release, or NAME@VERSION; the one published last by default."
)
@click.option("--model", metavar="NAME", help="A model of the release; the first by default.")
@click.option(
    "--format",
    "form",
    type=click.Choice(("markdown", "csv")),
    default="markdown",
    help="markdown: as shown; csv: every column in full precision.",
)
@click.option(
    "--figure",
    type=click.Path(path_type=Path, dir_okay=False),
    help="sweep, training: also draw it into this file (.html, .svg or .png).",
)
def report(kind: str, release: str | None, model: str | None, form: str, figure: Path | None) -> None:
    """Print a table of a release.

    qk: quality of the q and k SAEs of every head; heads: the same, a box per head. sweep: SAEs of one site
    against their settings. layers: quality by layer, beside the model's own loss. pruning: features by
    criterion. stages: quality after training, pruning and finetuning. training: where every training ended.
    families: heads by what their features read, and how well that agrees with attention scores.
    induction: long-prefix and short-prefix induction heads, and the evidence. tasks: what each task loses
    without a head.
    """
    from atlas.store.connection import cursor, open_release
    from atlas.store.published import current
    from atlas.store.queries import overview
    from atlas.store.reports import KINDS as REPORTS

    if figure is not None:
        _check_figure(kind, figure)
    info = current(load_settings(), release)
    con = cursor(open_release(info.path))
    name = overview.find_model(overview.models(con), model).model
    parts = REPORTS[kind](con, name)
    if not parts:
        raise StoreError(f"release {info.label!r} has no {_LACKING[kind]} of model {name!r}")
    click.echo(markdown(parts) if form == "markdown" else csv(parts), nl=False)
    if figure is not None:
        draw(_specification(kind, con, name, parts[0]), figure)


def markdown(parts: Sequence["Part"]) -> str:
    """The tables as Markdown; numbers stand right, and cells are as wide as their column."""
    from atlas.store.reports import written

    out = []
    for part in parts:
        rows = part.rows.to_pylist() + ([dict(part.foot)] if part.foot else [])
        cells = [[c.title for c in part.columns]]
        cells += [[_cell(written(row.get(c.name), c.form)) for c in part.columns] for row in rows]
        widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(part.columns))]
        right = [bool(c.form) for c in part.columns]
        rule = [f"{'-' * (w - r)}{':' * r}" for w, r in zip(widths, right, strict=True)]
        lines = [
            " | ".join(f"{v:>{w}}" if r else f"{v:<{w}}" for v, w, r in zip(line, widths, right, strict=True))
            for line in (cells[0], rule, *cells[1:])
        ]
        out.append(f"### {part.title}\n\n" + "".join(f"| {line} |\n" for line in lines))
    return "\n".join(out)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def csv(parts: Sequence["Part"]) -> str:
    """Every row and column in full precision, the tables under one another; no rows of means."""
    import io

    import pyarrow as pa
    from pyarrow import csv as writer

    rows = pa.concat_tables([part.rows for part in parts], promote_options="default")
    sink = io.BytesIO()
    writer.write_csv(rows, sink)
    return sink.getvalue().decode("utf8")


def _check_figure(kind: str, figure: Path) -> None:
    """ConfigError, before anything is worked out, for a figure that cannot be drawn."""
    if kind not in FIGURES:
        raise ConfigError(f"--figure {str(figure)!r}: {kind} has no figure; allowed: {', '.join(FIGURES)}")
    if figure.suffix not in ENDINGS:
        raise ConfigError(f"--figure {str(figure)!r} names no format; allowed: {', '.join(ENDINGS)}")
    if figure.suffix != ".html" and importlib.util.find_spec("vl_convert") is None:
        raise ConfigError(
            f"--figure {str(figure)!r}: package vl-convert-python is missing, which {figure.suffix} needs; "
            "install it, or write .html"
        )


def _specification(kind: str, con: "duckdb.DuckDBPyConnection", model: str, part: "Part") -> dict[str, Any]:
    from atlas import figures
    from atlas.store.queries import training

    if kind == "sweep":
        rows = part.rows.to_pylist()
        axes = figures.swept(rows)
        if not axes:
            raise StoreError("the SAEs of this sweep differ neither in l1_coefficient, k nor d_sae")
        panels = [figures.sweep(rows, axes[0], *panel) for panel in figures.SWEEP]
        return figures.beside(panels, rows, 300, 240)
    saes = training.trained(con, model).to_pylist()
    log = training.rows_of(con, "training_log", [row["sae"] for row in saes]).to_pylist()
    settings = {row["sae"]: row for row in saes}
    data = [{**settings[row["sae"]], **row} for row in log]
    return figures.beside([figures.over_tokens(saes, *curve) for curve in _CURVES], data, 300, 200)


def draw(spec: dict[str, Any], figure: Path) -> None:
    """Write a figure; HTML holds its libraries where vl-convert-python is there, else it links to them."""
    import altair

    from atlas.store.atomic import atomic_file

    ending = figure.suffix.removeprefix(".")
    more: dict[str, Any] = {}
    if ending == "html":
        more["inline"] = importlib.util.find_spec("vl_convert") is not None
    if ending == "png":
        more["scale_factor"] = 2
    chart = altair.ConcatChart.from_dict(spec, validate=False)
    # Altair refuses more than 5000 rows by default; a figure in a file may hold a whole training log.
    with altair.data_transformers.enable("default", max_rows=None), atomic_file(figure) as work:
        chart.save(str(work), format=ending, **more)
    print(f"wrote {figure}", file=sys.stderr)  # noqa: T201
