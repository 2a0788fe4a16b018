"""``atlas sql``: one query over a release and the annotations, to the terminal or a file."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from atlas.errors import ConfigError
from atlas.settings import load_settings

if TYPE_CHECKING:
    import pyarrow as pa

_TERMINAL_ROWS = 100
_FORMATS = ("table", "csv", "json", "parquet")


@click.command(name="sql")
@click.argument("query")
@click.option(
    "--release", metavar="NAME", help="Release, or NAME@VERSION; the one published last by default."
)
@click.option(
    "--format", "kind", type=click.Choice(_FORMATS), help="By default a table, or what --out ends in."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Most rows; 100 for a table, else ATLAS_QUERY_ROWS."
)
@click.option(
    "--seconds", type=click.FloatRange(min=0.01), help="Time bound; ATLAS_QUERY_SECONDS by default."
)
def sql(
    query: str,
    release: str | None,
    kind: str | None,
    out: Path | None,
    limit: int | None,
    seconds: float | None,
) -> None:
    """Ask in SQL. QUERY is one SELECT (or DESCRIBE, SHOW, SUMMARIZE, EXPLAIN); - reads it from stdin.

    It sees every table of the release (see `atlas schema`) and, as they are now, head_annotations,
    feature_annotations and annotation_history. It can write nothing.
    """
    from atlas.store.sandbox import prewarm, run_sql

    prewarm()  # it starts while the rest is imported
    from atlas.db.arrow import arrow_tables
    from atlas.store.published import current
    from atlas.store.studies import study_tables

    settings = load_settings()
    kind = _format(kind, out)
    rows = limit or (_TERMINAL_ROWS if kind == "table" else settings.query_rows)
    result = run_sql(
        sys.stdin.read() if query == "-" else query,
        current(settings, release).path,
        {**arrow_tables(settings), **study_tables(settings)},
        seconds=seconds or settings.query_seconds,
        memory=settings.query_memory,
        rows=rows,
    )
    _write(result.table, kind, out)
    if result.truncated:
        click.echo(_truncation(result.table.num_rows, rows), err=True)


def _format(kind: str | None, out: Path | None) -> str:
    """The format asked for, or the one that the file's ending names."""
    if kind is None:
        ending = out.suffix.lstrip(".").lower() if out is not None else "table"
        kind = {"txt": "table"}.get(ending, ending)
        if kind not in _FORMATS:
            raise ConfigError(
                f"--out {str(out)!r} names no format; allowed endings: .csv .json .parquet .txt"
            )
    if kind == "parquet" and out is None and sys.stdout.isatty():
        raise ConfigError("parquet does not go to a terminal; name a file with --out")
    return kind


def _write(table: "pa.Table", kind: str, out: Path | None) -> None:
    from atlas.store import export
    from atlas.store.atomic import atomic_file

    if kind == "table":
        to_terminal = out is None and sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if to_terminal else None
        text = export.to_text(table, width=width) + "\n"
        if out is None:
            click.echo(text, nl=False)
        else:
            with atomic_file(out) as work:
                work.write_text(text, "utf-8")
    elif out is not None:
        export.write_file(table, out, kind)
    else:
        export.WRITERS[kind](table, sys.stdout.buffer)


def _truncation(shown: int, rows: int) -> str:
    if shown < rows:
        return f"note: cut to the first {shown:,} rows, which fill 64 MB; ask for fewer columns"
    return f"note: cut to the first {shown:,} rows; there are more (raise --limit)"
