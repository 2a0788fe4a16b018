"""``atlas schema``: every table and column with its meaning, for the terminal or the reference page."""

from collections.abc import Iterable
from typing import NamedTuple

import click

from atlas.cli.schema_reviews import REVIEWS
from atlas.errors import StoreError, one_of
from atlas.tables import Table

_HEAD_KEY = {"model": "the model's name", "layer": "layer, from 0", "head": "head, from 0"}
_FEATURE_KEY = {"sae": "the SAE", "feature": "index of the feature in its SAE"}
_SAVED = {
    "annotator": "who wrote it",
    "version": "how often it was saved",
    "created_at": "first saved",
    "updated_at": "last saved",
}

ANNOTATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "head_annotations": (
        "model x layer x head x annotator",
        {
            **_HEAD_KEY,
            **_SAVED,
            "label": "one short line: what the head does",
            "groupings": "the families that its top features fall into, in the annotator's words",
            "semanticity": "how many unrelated things it does; NULL if not judged",
            "confidence": "1 (a guess) to 5 (sure); NULL if not given",
            "role": "a known role, such as induction or previous token",
            "star": "worth showing to others",
            "novel": "a grouping not seen in an earlier head",
            "notes": "free text in Markdown",
            "status": "draft, or done",
            "seconds_spent": "time spent on this head so far",
        },
    ),
    "feature_annotations": (
        "SAE x feature x annotator",
        {
            **_FEATURE_KEY,
            **_SAVED,
            "label": "one short line: what the feature stands for",
            "tags": "the annotator's own words",
            "interpretability": "how well it can be understood; NULL if not judged",
            "notes": "free text in Markdown",
        },
    ),
    "annotation_history": (
        "save of an annotation; never changed afterwards",
        {
            **{name: f"{meaning}; NULL for a feature's" for name, meaning in _HEAD_KEY.items()},
            **{name: f"{meaning}; NULL for a head's" for name, meaning in _FEATURE_KEY.items()},
            "id": "order of the saves",
            "kind": "head or feature",
            "annotator": "who saved",
            "version": "the version that this save made",
            "payload": "everything that was saved, as JSON text",
            "saved_at": "when",
        },
    ),
}
ANNOTATIONS |= REVIEWS
_TIMES = ("created_at", "updated_at", "saved_at", "merged_at", "withdrawn_at", "decided_at", "rated_at")
_UNITS = {"seconds_spent": "seconds", **dict.fromkeys(_TIMES, "UTC")}


class Field(NamedTuple):
    """One column as the reference shows it."""

    name: str
    type: str
    meaning: str
    unit: str
    nullable: bool


class Entry(NamedTuple):
    """One table or view as the reference shows it."""

    name: str
    row: str
    key: tuple[str, ...]
    fields: tuple[Field, ...]
    definition: str = ""


def entries() -> tuple[Entry, ...]:
    """Every table of a release, its views, the annotation tables, and those of studies."""
    return (*_release_tables(), *_views(), *_annotation_tables(), *_study_tables())


def _release_tables() -> list[Entry]:
    from atlas.tables import TABLES

    return _entries(TABLES.values())


def _entries(tables: Iterable[Table]) -> list[Entry]:
    from atlas.store.build import sql_type

    return [
        Entry(
            table.name,
            f"One row per {table.row}",
            table.key,
            tuple(Field(c.name, sql_type(c.type), c.meaning, c.unit, c.nullable) for c in table.columns),
        )
        for table in tables
    ]


def _study_tables() -> list[Entry]:
    from atlas.store.study_tables import STUDY_TABLES

    return _entries(STUDY_TABLES.values())


def _views() -> list[Entry]:
    from atlas.store.views import VIEWS

    return [Entry(view.name, view.meaning, (), (), view.create.strip()) for view in VIEWS]


def _annotation_tables() -> list[Entry]:
    import pyarrow as pa

    from atlas.db.arrow import SCHEMAS
    from atlas.store.build import sql_type

    found = []
    for name, schema in SCHEMAS.items():
        row, meanings = ANNOTATIONS[name]
        fields = []
        for column in schema:
            kind = "TIMESTAMP" if pa.types.is_timestamp(column.type) else sql_type(column.type)
            meaning, unit = meanings[column.name], _UNITS.get(column.name, "")
            fields.append(Field(column.name, kind, meaning, unit, column.nullable))
        found.append(Entry(name, f"One row per {row}", (), tuple(fields)))
    return found


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
    if entry.definition:
        return f"{head}\n\n{entry.definition}"
    if entry.key:
        head += f"; sorted by and unique in {', '.join(entry.key)}"
    names = max(len(f.name) for f in entry.fields)
    kinds = max(len(f.type) for f in entry.fields)
    lines = [f"{f.name:<{names}}  {f.type:<{kinds}}  {_meaning(f)}" for f in entry.fields]
    return "\n".join([head, "", *lines])


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
        "`atlas/store/views.py`, `atlas/db/arrow.py` and `atlas/store/study_tables.py`. Indices start at 0.",
        "The annotation tables come from the annotation database, those with a column `study` from studies",
        "(see circuits.md); both are joined when a query runs.",
    ]
    for entry in tables:
        key = f" Sorted by and unique in {', '.join(f'`{k}`' for k in entry.key)}." if entry.key else ""
        lines += ["", f"## `{entry.name}`", "", f"{_escape(entry.row)}.{key}", ""]
        if entry.definition:
            lines += ["```", entry.definition, "```"]
            continue
        lines += ["| Column | Type | Meaning | Unit | NULL |", "|---|---|---|---|---|"]
        for f in entry.fields:
            null = "yes" if f.nullable else ""
            lines.append(f"| `{f.name}` | `{f.type}` | {_escape(f.meaning)} | {f.unit} | {null} |")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
