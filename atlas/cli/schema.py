"""``atlas schema``: every table and column with its meaning, for the terminal or the reference page."""

import click

from atlas.errors import StoreError, one_of
from atlas.schema import Entry, Field, entries


@click.command()
@click.argument("table", required=False)
@click.option("--markdown", is_flag=True, help="The whole reference as Markdown (docs/tables.md).")
def schema(table: str | None, markdown: bool) -> None:
    """Show the tables that SQL can ask, or the columns of one TABLE, with meanings and units."""
    known = {entry.name: entry for entry in entries()}
    if markdown:
        click.echo(to_markdown(tuple(known.values())), nl=False)
    elif table is None:
        width = max(map(len, known))
        for entry in known.values():
            click.echo(f"{entry.name:<{width}}  {entry.row}")
    else:
        one_of("table", table, known, StoreError)
        click.echo(describe(known[table]))


def describe(entry: Entry) -> str:
    """One table for the terminal."""
    head = f"{entry.name}: {entry.row}"
    if entry.key:
        head += f"; sorted by and unique in {', '.join(entry.key)}"
    names = max(len(f.name) for f in entry.fields)
    kinds = max(len(f.type) for f in entry.fields)
    lines = [f"{f.name:<{names}}  {f.type:<{kinds}}  {_meaning(f)}" for f in entry.fields]
    return "\n".join([head, "", *lines, *(["", entry.definition] if entry.definition else [])])


def _meaning(field: Field) -> str:
    unit = f" [{field.unit}]" if field.unit else ""
    null = " (may be NULL)" if field.nullable and "NULL" not in field.meaning else ""
    return f"{field.meaning}{unit}{null}"


def to_markdown(tables: tuple[Entry, ...]) -> str:
    """The reference page; made from the declarations, never by hand."""
    lines = [
        "# Tables",
        "",
        "Made by `atlas schema --markdown > docs/tables.md` from the declarations in `atlas/tables.py`,",
        "`atlas/store/views.py`, `atlas/store/view_columns.py`, `atlas/db/arrow.py` and",
        "`atlas/store/study_tables.py`. Indices start at 0.",
        "The annotation tables come from the annotation database, those with a column `study` from studies",
        "(see circuits.md); both are joined when a query runs.",
    ]
    for entry in tables:
        key = f" Sorted by and unique in {', '.join(f'`{k}`' for k in entry.key)}." if entry.key else ""
        lines += ["", f"## `{entry.name}`", "", f"{_escape(entry.row)}.{key}", ""]
        lines += ["| Column | Type | Meaning | Unit | NULL |", "|---|---|---|---|---|"]
        for f in entry.fields:
            null = "yes" if f.nullable else ""
            lines.append(f"| `{f.name}` | `{f.type}` | {_escape(f.meaning)} | {f.unit} | {null} |")
        if entry.definition:
            lines += ["", "```", entry.definition, "```"]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
