"""Back up what people wrote as JSON lines, and put it into any database again.

One object per line with ``table`` and the table's columns; times in ISO 8601, UTC. Every table is in it but
those named in :data:`LEFT_OUT`, which hold no words of people: runs, logins, passwords. Loading never
overwrites: a row that is already there with the same content is passed over, one that differs is a conflict
and nothing at all is loaded.
"""

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Column, ColumnElement, Table, UniqueConstraint, and_, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from atlas.access import demand
from atlas.db.models import Base, UtcDateTime
from atlas.db.notes import FeatureAnnotation, HeadAnnotation, check_feature, check_head
from atlas.db.session import reading, writing
from atlas.errors import ConfigError, ConflictError
from atlas.judging import FeatureVerdict
from atlas.settings import Settings

LEFT_OUT = (
    "runs",
    "run_steps",
    "step_logs",
    "workers",
    "named_locks",
    "users",
    "login_sessions",
    "login_attempts",
)
"""What is being computed and who may log in: not what people wrote, and some of it secret."""
_FIRST = ("head_annotations", "feature_annotations", "annotation_history")
_NO_UNIQUE_KEY = {
    "annotation_history": ("kind", "model", "layer", "head", "sae", "feature", "annotator", "version"),
    "comments": ("kind", "model", "layer", "head", "sae", "feature", "author", "created_at"),
}
_ADDED_LATER: dict[str, dict[str, Any]] = {"head_annotations": {"verdicts": []}}
"""Columns that a dump of an older version lacks, and what stands for them."""


def note_tables() -> dict[str, Table]:
    """The tables of a dump by name: annotations first, and each after those that it refers to."""
    names = dict.fromkeys([*_FIRST, *(table.name for table in Base.metadata.sorted_tables)])
    return {name: Base.metadata.tables[name] for name in names if name not in LEFT_OUT}


def _columns(table: Table) -> list[Column[Any]]:
    """All but the row number, which every database gives anew."""
    return [column for column in table.columns if column.name != "id"]


def _key(table: Table) -> list[Column[Any]]:
    """The columns that tell whether a row is there already."""
    if table.name in _NO_UNIQUE_KEY:
        return [table.columns[name] for name in _NO_UNIQUE_KEY[table.name]]
    unique = [c for c in table.constraints if isinstance(c, UniqueConstraint)]
    return list((unique[0] if unique else table.primary_key).columns)


def _written(value: object) -> object:
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value


def dump(settings: Settings) -> Iterator[str]:
    """All that people wrote and its history, one JSON object per line, in a stable order."""
    with reading(settings) as session:
        for name, table in note_tables().items():
            columns = _columns(table)
            order = [table.columns.id] if name in _NO_UNIQUE_KEY else _key(table)
            for row in session.execute(select(*columns).order_by(*order)):
                values = {c.name: _written(v) for c, v in zip(columns, row, strict=True)}
                yield json.dumps({"table": name, **values}, ensure_ascii=False)


def _read(column: Column[Any], value: Any) -> Any:
    """A value as the column holds it; ValueError for one of another kind."""
    kind = datetime if isinstance(column.type, UtcDateTime) else column.type.python_type
    if value is None:
        if column.nullable:
            return None
        raise ValueError(f"{column.name} is empty")
    if kind is datetime:
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError(f"{column.name} has no time zone")
        return moment
    if kind is dict:
        fitting = isinstance(value, dict | list)
    elif kind is float:
        fitting = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fitting = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fitting:
        raise ValueError(f"{column.name} {value!r} is not of type {kind.__name__}")
    return value


def _parse(number: int, line: str) -> tuple[Table, dict[str, Any]]:
    try:
        values = json.loads(line)
        name = values.pop("table")
        table = note_tables()[name]
        columns = {column.name: column for column in _columns(table)}
        values = {**_ADDED_LATER.get(name, {}), **values}
        if set(values) != set(columns):
            raise ValueError(f"columns {sorted(set(values) ^ set(columns))} are missing or unknown")
        values = {key: _read(columns[key], value) for key, value in values.items()}
        _check(name, values)
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"line {number} is no annotation of `atlas db dump`: {error}") from error
    return table, values


def _check(name: str, values: dict[str, Any]) -> None:
    """What the forms of the app check; the other tables have the database's own constraints."""
    if name == "head_annotations":
        verdicts = tuple(FeatureVerdict(**one) for one in values["verdicts"])
        check_head(HeadAnnotation(**{**values, "verdicts": verdicts}))
    elif name == "feature_annotations":
        check_feature(FeatureAnnotation(**values))


def _same_key(table: Table, values: dict[str, Any]) -> ColumnElement[bool]:
    """Equal in every key column, where NULL equals NULL."""
    return and_(*(column.is_not_distinct_from(values[column.name]) for column in _key(table)))


def _put(session: Session, number: int, table: Table, values: dict[str, Any]) -> bool:
    found = session.execute(select(*_columns(table)).where(_same_key(table, values))).one_or_none()
    if found is None:
        try:
            session.execute(insert(table).values(**values))
        except IntegrityError as error:
            raise ConfigError(f"line {number} breaks a rule of {table.name}: {error.orig}") from None
        return True
    different = [name for name, value in values.items() if getattr(found, name) != value]
    if different:
        where = " ".join(str(values[c.name]) for c in _key(table) if values[c.name] is not None)
        raise ConflictError(
            f"line {number}: {table.name} {where} is already there with another {', '.join(different)}; "
            "nothing was loaded"
        )
    return False


def load(settings: Settings, lines: Iterable[str]) -> int:
    """Put dumped lines into the database, all or nothing, and return how many rows were new.

    Raises ConfigError for a line that :func:`dump` did not write, ConflictError for a row that is already
    there with another content.
    """
    demand("restore")
    new = 0
    with writing(settings) as session:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                new += _put(session, number, *_parse(number, line))
    return new
