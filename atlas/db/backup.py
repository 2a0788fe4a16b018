"""Back up annotations as JSON lines, and put them into any database again.

One object per line with ``table`` and the table's columns; times in ISO 8601, UTC. Loading never overwrites:
an annotation that is already there with the same content is passed over, one that differs is a conflict and
nothing at all is loaded.
"""

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, insert, select
from sqlalchemy.orm import Session

from atlas.db.models import Base, FeatureNote, HeadNote, NoteHistory
from atlas.db.notes import FeatureAnnotation, HeadAnnotation, check_feature, check_head
from atlas.db.session import reading, writing
from atlas.errors import ConfigError, ConflictError
from atlas.settings import Settings

_TABLES: dict[str, tuple[type[Base], tuple[str, ...]]] = {
    "head_annotations": (HeadNote, ("model", "layer", "head", "annotator")),
    "feature_annotations": (FeatureNote, ("sae", "feature", "annotator")),
    "annotation_history": (
        NoteHistory,
        ("kind", "model", "layer", "head", "sae", "feature", "annotator", "version"),
    ),
}
_TIMES = ("created_at", "updated_at", "saved_at")


def _columns(table: str) -> list[str]:
    return [c.name for c in _TABLES[table][0].__table__.columns if c.name != "id"]


def _written(value: object) -> object:
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value


def dump(settings: Settings) -> Iterator[str]:
    """Every annotation and its history, one JSON object per line, in a stable order."""
    with reading(settings) as session:
        for table, (source, key) in _TABLES.items():
            names = _columns(table)
            order = [source.__table__.c.id] if source is NoteHistory else [getattr(source, k) for k in key]
            for row in session.execute(select(*(getattr(source, n) for n in names)).order_by(*order)):
                values = {n: _written(v) for n, v in zip(names, row, strict=True)}
                yield json.dumps({"table": table, **values}, ensure_ascii=False)


def _parse(number: int, line: str) -> tuple[str, dict[str, Any]]:
    try:
        values = json.loads(line)
        table = values.pop("table")
        names = _columns(table)
        for name in _TIMES:
            if name in names:
                values[name] = datetime.fromisoformat(values[name])
                if values[name].tzinfo is None:
                    raise ValueError(f"{name} has no time zone")
        if set(values) != set(names):
            raise ValueError(f"columns {sorted(set(values) ^ set(names))} are missing or unknown")
        _check(table, values)
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"line {number} is no annotation of `atlas db dump`: {error}") from error
    return table, values


def _check(table: str, values: dict[str, Any]) -> None:
    if table == "head_annotations":
        check_head(HeadAnnotation(**values))
    elif table == "feature_annotations":
        check_feature(FeatureAnnotation(**values))


def _same_key(source: type[Base], key: Iterable[str], values: dict[str, Any]) -> ColumnElement[bool]:
    """Equal in every key column, where NULL equals NULL."""
    return and_(*(getattr(source, name).is_not_distinct_from(values[name]) for name in key))


def _put(session: Session, number: int, table: str, values: dict[str, Any]) -> bool:
    source, key = _TABLES[table]
    found = session.scalars(select(source).where(_same_key(source, key, values))).one_or_none()
    if found is None:
        session.execute(insert(source).values(**values))
        return True
    different = [name for name, value in values.items() if getattr(found, name) != value]
    if different:
        where = " ".join(str(values[name]) for name in key if values[name] is not None)
        raise ConflictError(
            f"line {number}: {table} {where} is already there with another {', '.join(different)}; "
            "nothing was loaded"
        )
    return False


def load(settings: Settings, lines: Iterable[str]) -> int:
    """Put dumped lines into the database, all or nothing, and return how many rows were new.

    Raises ConfigError for a line that :func:`dump` did not write, ConflictError for an annotation that is
    already there with another content.
    """
    new = 0
    with writing(settings) as session:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                new += _put(session, number, *_parse(number, line))
    return new
