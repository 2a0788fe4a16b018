"""``atlas annotations``: write annotations to files, read them again, and count what they say."""

from pathlib import Path

import click

from atlas.db.exchange import FORMS, KINDS, decode, encode, notes_of
from atlas.errors import ConfigError, StoreError
from atlas.settings import load_settings

_ENDINGS = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
_KIND = click.option(
    "--kind", type=click.Choice(list(KINDS)), default="heads", show_default=True, help="What notes are about."
)
_FORM = click.option(
    "--form", type=click.Choice(FORMS), help="The file's form; without it, by its ending (.csv, .jsonl, ...)."
)


@click.group()
def annotations() -> None:
    """Write annotations to files, read them again, and count what they say."""


def _form(file: Path, form: str | None) -> str:
    found = form or _ENDINGS.get(file.suffix.lower())
    if found is None:
        raise ConfigError(f"ending {file.suffix!r} is not known; allowed: {', '.join(_ENDINGS)}, or --form")
    return found


@annotations.command("export")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--of", "of", required=True, help="The model whose heads, or the SAE whose features.")
@_KIND
@_FORM
@click.option("--annotator", help="Only this annotator's notes.")
def export(file: Path, of: str, kind: str, form: str | None, annotator: str | None) -> None:
    """Write the notes about a model's heads, or an SAE's features, to FILE."""
    from atlas.store.atomic import atomic_file

    notes = notes_of(load_settings(), kind, of, annotator)
    data = encode(notes, kind, _form(file, form))
    with atomic_file(file.absolute()) as temporary:
        temporary.write_bytes(data)
    click.echo(f"wrote {len(notes)} notes about {kind} to {file}")


@annotations.command("import")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--model", default="", help="The model, where the file does not name one (a spreadsheet).")
@click.option("--annotator", default="", help="Who wrote it, where the file does not say.")
@_KIND
@_FORM
@click.option(
    "--replace", "replace_existing", is_flag=True, help="The file's notes become the next versions."
)
def import_notes(
    file: Path, model: str, annotator: str, kind: str, form: str | None, replace_existing: bool
) -> None:
    """Read notes from FILE and save them, all or nothing; without --replace, nothing there is changed."""
    from atlas.db.loading import put_notes

    try:
        data = file.read_bytes()
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from None
    notes = decode(data, kind, _form(file, form), model=model, annotator=annotator)
    done = put_notes(load_settings(), notes, replace_existing=replace_existing)
    click.echo(f"{done.new} new, {done.changed} changed, {done.same} there already")


@annotations.command("summary")
@click.argument("model")
@click.option("--annotator", help="Only this annotator's notes.")
def summary(model: str, annotator: str | None) -> None:
    """Print what the finished notes about MODEL's heads say: semanticity, group counts, agreement."""
    from atlas.db.reports import agreement_lines, group_lines, semanticity_lines

    settings = load_settings()
    parts = [semanticity_lines(settings, model, annotator), group_lines(settings, model, annotator)]
    parts += [] if annotator else [agreement_lines(settings, model)]
    click.echo("\n\n".join("\n".join(part) for part in parts if part))
