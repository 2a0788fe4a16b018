"""``atlas db``: migrate the run and annotation database, back up and restore annotations."""

from pathlib import Path

import click

from atlas.db import schema
from atlas.db.backup import dump as dump_lines
from atlas.db.backup import load as load_lines
from atlas.db.engine import hidden, parse_url
from atlas.errors import DatabaseError, StoreError
from atlas.settings import Settings, load_settings
from atlas.store.atomic import atomic_file


def _where(settings: Settings) -> str:
    return hidden(parse_url(settings.database_url))


@click.group()
def db() -> None:
    """Migrate the run and annotation database; back up and restore annotations."""


@db.command()
def upgrade() -> None:
    """Bring the database to the schema of this version, creating what is missing."""
    settings = load_settings()
    click.echo(f"{_where(settings)}: schema {schema.upgrade(settings)}")


@db.command()
@click.argument("revision")
def downgrade(revision: str) -> None:
    """Go back to REVISION ("base" for none). Tables that it did not have are dropped with their rows."""
    settings = load_settings()
    click.echo(f"{_where(settings)}: schema {schema.downgrade(settings, revision)}")


@db.command()
def check() -> None:
    """Say whether the database is at the schema of this version and shaped as declared."""
    settings = load_settings()
    revision = schema.check(settings)
    found = schema.differences(settings)
    if found:
        raise DatabaseError(f"{_where(settings)} differs from schema {revision} in {len(found)}: {found[0]}")
    click.echo(f"{_where(settings)}: schema {revision}")


@db.command()
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path), default="-")
def dump(file: Path) -> None:
    """Write all annotations and their history as JSON lines to FILE, or to standard output."""
    lines = dump_lines(load_settings())
    if str(file) == "-":
        for line in lines:
            click.echo(line)
        return
    with atomic_file(file.absolute()) as temporary, temporary.open("w", encoding="utf8") as out:
        out.writelines(line + "\n" for line in lines)
    click.echo(f"wrote {file}", err=True)


@db.command()
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path))
def load(file: Path) -> None:
    """Load what `atlas db dump` wrote from FILE (or -). Nothing is overwritten; a conflict loads nothing."""
    settings = load_settings()
    try:
        with click.open_file(str(file), encoding="utf8") as source:
            new = load_lines(settings, source)
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    click.echo(f"loaded {new} new rows into {_where(settings)}")
