"""Every table, view and annotation table that SQL sees, with the meaning of each column."""

from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa

from atlas.db.arrow import SCHEMAS
from atlas.db.meanings import ANNOTATIONS, UNITS
from atlas.store.build import sql_type
from atlas.store.study_tables import STUDY_TABLES
from atlas.store.view_columns import RECORDS, VIEW_COLUMNS
from atlas.store.views import VIEWS
from atlas.tables import TABLES, Column, Table


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
    return (*_release_tables(), *_views(), *_entries(RECORDS), *_annotation_tables(), *_study_tables())


def _release_tables() -> list[Entry]:
    return _entries(TABLES.values())


def _entries(tables: Iterable[Table]) -> list[Entry]:
    return [
        Entry(
            table.name,
            f"One row per {table.row}",
            table.key,
            _fields(table.columns),
        )
        for table in tables
    ]


def _fields(columns: Iterable[Column]) -> tuple[Field, ...]:
    return tuple(Field(c.name, sql_type(c.type), c.said, c.unit, c.nullable) for c in columns)


def _study_tables() -> list[Entry]:
    return _entries(STUDY_TABLES.values())


def _views() -> list[Entry]:
    return [
        Entry(view.name, view.meaning, (), _fields(VIEW_COLUMNS[view.name]), view.create.strip())
        for view in VIEWS
    ]


def _annotation_tables() -> list[Entry]:
    found = []
    for name, schema in SCHEMAS.items():
        row, meanings = ANNOTATIONS[name]
        fields = []
        for column in schema:
            kind = "TIMESTAMP" if pa.types.is_timestamp(column.type) else sql_type(column.type)
            meaning, unit = meanings[column.name], UNITS.get(column.name, "")
            fields.append(Field(column.name, kind, meaning, unit, column.nullable))
        found.append(Entry(name, f"One row per {row}", (), tuple(fields)))
    return found
