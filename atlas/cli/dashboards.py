"""``atlas export-release``: a release, or a part of it, in other programs' formats and as plain files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from atlas.errors import ConfigError
from atlas.settings import Settings, load_settings

if TYPE_CHECKING:
    import duckdb

    from atlas.interop.dashboards.selection import Part, Wanted
    from atlas.interop.dashboards.weights import Decoder
    from atlas.progress import Progress
    from atlas.store.release import ReleaseInfo

FORMATS = ("saedashboard", "neuronpedia", "headvis", "jsonl", "parquet")
DASHBOARDS = ("saedashboard", "neuronpedia")
PLAIN = ("jsonl", "parquet")


@click.command("export-release")
@click.argument("release", required=False)
@click.option(
    "--to", "folder", required=True, type=click.Path(path_type=Path), help="Folder to write; must be new."
)
@click.option("--format", "kind", required=True, type=click.Choice(FORMATS), help="Whose format.")
@click.option("--sae", "saes", multiple=True, metavar="NAME", help="Only this SAE; may be repeated.")
@click.option("--site", "sites", multiple=True, metavar="KIND", help="Only SAEs of z, q, ...; repeatable.")
@click.option("--layer", "layers", multiple=True, type=click.IntRange(min=0), help="Only this; repeatable.")
@click.option("--features", metavar="RANGES", help="Only these features of each SAE, such as 0-99,200.")
@click.option("--alive", is_flag=True, help="Only features that fire.")
@click.option("--table", "tables", multiple=True, help="jsonl, parquet: this table or view; repeatable.")
@click.option(
    "--batch", type=click.IntRange(1, 4096), help="saedashboard, neuronpedia: features per file; else 128."
)
@click.option("--creator", metavar="ID", help="neuronpedia: the user who owns what is imported.")
@click.option("--blocks", type=click.IntRange(min=1), help="headvis: blocks of text to look at; else 2048.")
@click.option("--model", metavar="NAME", help="headvis: where the model is, if not where the release says.")
def export_release(
    release: str | None,
    folder: Path,
    kind: str,
    saes: tuple[str, ...],
    sites: tuple[str, ...],
    layers: tuple[int, ...],
    features: str | None,
    alive: bool,
    **options: Any,
) -> None:
    """Write RELEASE (NAME or NAME@VERSION; the one published last by default) in another format.

    saedashboard: batch-N.json per SAE. neuronpedia: its folder for bulk import, with people's labels as
    explanations. headvis: a tree about heads, for which the model is run over the text. jsonl, parquet: the
    tables. See docs/formats.md.
    """
    from atlas.cli.display import display
    from atlas.interop.dashboards.selection import Wanted, parse_features, select
    from atlas.store.atomic import atomic_dir
    from atlas.store.connection import cursor, open_release
    from atlas.store.published import current

    _check_options(kind, features is not None or alive, options)
    settings = load_settings()
    wanted = Wanted(saes, sites, layers, parse_features(features) if features else (), alive)
    info = current(settings, release)
    # One thread, so that views, too, come in the same order every time.
    con = cursor(open_release(info.path, threads=1))
    parts = select(con, wanted)
    with (
        atomic_dir(folder.expanduser().absolute()) as work,
        display(f"{info.label} as {kind}") as progress,
    ):
        _write(kind, _Export(settings, info, con, parts, wanted, work, options), progress)
    click.echo(f"{info.label}: {kind} in {folder}")


def _check_options(kind: str, narrowed: bool, options: dict[str, Any]) -> None:
    """ConfigError for an option that says nothing about this format."""
    meant = {"tables": PLAIN, "batch": DASHBOARDS, "creator": ("neuronpedia",)}
    meant |= dict.fromkeys(("blocks", "model"), ("headvis",))
    for name, kinds in meant.items():
        if options[name] and kind not in kinds:
            flag = "--table" if name == "tables" else f"--{name}"
            raise ConfigError(f"{flag} is not for --format {kind}; allowed: {', '.join(kinds)}")
    if narrowed and kind == "headvis":
        raise ConfigError("--features and --alive are not for --format headvis, which is about heads")


class _Export:
    """What an export writes from, where it writes, and its options."""

    def __init__(
        self,
        settings: Settings,
        info: "ReleaseInfo",
        con: "duckdb.DuckDBPyConnection",
        parts: "Sequence[Part]",
        wanted: "Wanted",
        folder: Path,
        options: dict[str, Any],
    ) -> None:
        self.settings, self.info, self.con, self.parts = settings, info, con, parts
        self.wanted, self.folder, self.options = wanted, folder, options

    @property
    def made_from(self) -> dict[str, str]:
        """The release, in words that an export carries with it."""
        from atlas import __version__

        return {
            "release": self.info.label,
            "release_digest": self.info.digest,
            "release_created": self.info.created,
            "exported_by": f"head-atlas {__version__}",
        }


def _write(kind: str, export: _Export, progress: "Progress") -> None:
    writers: dict[str, Callable[[_Export, Progress], None]] = {
        "saedashboard": _saedashboard,
        "neuronpedia": _neuronpedia,
        "headvis": _headvis,
    }
    if kind in writers:
        writers[kind](export, progress)
        return
    from atlas.interop.dashboards.plain import write_plain

    tables = export.options["tables"]
    write_plain(export.con, export.parts, export.wanted, tables, export.folder, kind, progress)
    about = json.dumps(export.made_from, indent=1) + "\n"
    (export.folder / "release.json").write_text(about, encoding="utf8")


def _saedashboard(export: _Export, progress: "Progress") -> None:
    from atlas.interop.dashboards.pages import Pages
    from atlas.interop.dashboards.saedashboard import BATCH, write_saedashboard

    pages, size = Pages(export.con, _decoders(export)), export.options["batch"] or BATCH
    write_saedashboard(pages, export.parts, export.folder, export.made_from, progress, size)


def _neuronpedia(export: _Export, progress: "Progress") -> None:
    from atlas.db.arrow import arrow_tables
    from atlas.interop.dashboards.neuronpedia import CREATOR, Source, write_neuronpedia
    from atlas.interop.dashboards.pages import Pages
    from atlas.interop.dashboards.saedashboard import BATCH

    labels = arrow_tables(export.settings)["feature_annotations"]
    creator = export.options["creator"] or CREATOR
    source = Source(export.info.name, export.info.created, creator, made_from=export.made_from, labels=labels)
    pages, size = Pages(export.con, _decoders(export)), export.options["batch"] or BATCH
    write_neuronpedia(pages, export.parts, export.folder, source, progress, size)


def _headvis(export: _Export, progress: "Progress") -> None:
    from atlas.interop.dashboards.headvis import BLOCKS, write_headvis

    blocks, model = export.options["blocks"] or BLOCKS, export.options["model"]
    write_headvis(
        export.con,
        export.parts,
        export.wanted.layers,
        export.folder,
        export.made_from,
        export.settings,
        progress,
        n_blocks=blocks,
        model_name=model,
    )


def _decoders(export: _Export) -> "Callable[[Part], Decoder | None]":
    """Finds decoders on this machine, and says of each SAE whose weights are not here what stays empty."""
    from atlas.interop.dashboards.weights import find_decoder

    def find(part: "Part") -> "Decoder | None":
        decoder = find_decoder(export.settings, part.sae, part.digest)
        if decoder is None:
            click.echo(
                f"note: the weights of {part.sae} are not on this machine; "
                "vector, neuron_alignment and correlated_features_l1 stay empty",
                err=True,
            )
        return decoder

    return find
