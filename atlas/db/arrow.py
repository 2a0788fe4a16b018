"""Annotations as Arrow tables, so that SQL can join them with a release.

The schemas hold also when nothing was written yet, or when no database exists, so that a query over
``head_annotations`` never fails for want of notes. Times are UTC without a zone, in microseconds.
"""

import json

import pyarrow as pa
from sqlalchemy import select
from sqlalchemy.orm import Session

from atlas.db import arrow_reviews
from atlas.db.models import Base, FeatureNote, HeadNote, NoteHistory
from atlas.db.schema import exists
from atlas.db.session import reading
from atlas.settings import Settings
from atlas.tables import BOOL, F64, I16, I32, I64, STR

_TIME = pa.timestamp("us")
_WORDS = pa.list_(STR)


def _schema(*optional: str, **types: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in optional) for name, kind in types.items()])


SCHEMAS: dict[str, pa.Schema] = {
    "head_annotations": _schema(
        "semanticity",
        "confidence",
        model=STR,
        layer=I16,
        head=I16,
        annotator=STR,
        label=STR,
        groupings=_WORDS,
        semanticity=STR,
        confidence=I16,
        role=STR,
        star=BOOL,
        novel=BOOL,
        notes=STR,
        status=STR,
        version=I32,
        seconds_spent=F64,
        created_at=_TIME,
        updated_at=_TIME,
    ),
    "feature_annotations": _schema(
        "interpretability",
        sae=STR,
        feature=I32,
        annotator=STR,
        label=STR,
        tags=_WORDS,
        interpretability=STR,
        notes=STR,
        version=I32,
        created_at=_TIME,
        updated_at=_TIME,
    ),
    "annotation_history": _schema(
        "model",
        "layer",
        "head",
        "sae",
        "feature",
        id=I64,
        kind=STR,
        model=STR,
        layer=I16,
        head=I16,
        sae=STR,
        feature=I32,
        annotator=STR,
        version=I32,
        payload=STR,
        saved_at=_TIME,
    ),
    **arrow_reviews.SCHEMAS,
}
"""The tables that :func:`arrow_tables` gives, by name; ``payload`` is JSON text."""

_SOURCES: dict[str, tuple[type[Base], tuple[str, ...]]] = {
    "head_annotations": (HeadNote, ("model", "layer", "head", "annotator")),
    "feature_annotations": (FeatureNote, ("sae", "feature", "annotator")),
    "annotation_history": (NoteHistory, ("id",)),
}


def _plain(name: str, value: object) -> object:
    return json.dumps(value, ensure_ascii=False, sort_keys=True) if name == "payload" else value


def _read(session: Session, table: str) -> pa.Table:
    schema = SCHEMAS[table]
    if table in arrow_reviews.SCHEMAS:
        zoned = pa.schema([_zoned(field) for field in schema])
        return pa.Table.from_pylist(arrow_reviews.review_rows(session, table), schema=zoned).cast(schema)
    source, key = _SOURCES[table]
    columns = [getattr(source, name) for name in schema.names]
    rows = session.execute(select(*columns).order_by(*(getattr(source, name) for name in key))).all()
    values = [pa.array([_plain(f.name, row[i]) for row in rows], _at_utc(f)) for i, f in enumerate(schema)]
    return pa.Table.from_arrays(values, schema=pa.schema([_zoned(f) for f in schema])).cast(schema)


def _at_utc(field: pa.Field) -> pa.DataType:
    return pa.timestamp("us", "UTC") if field.type == _TIME else field.type


def _zoned(field: pa.Field) -> pa.Field:
    return field.with_type(_at_utc(field))


def arrow_tables(settings: Settings) -> dict[str, pa.Table]:
    """Every annotation table as it is now, in the order of its key; empty ones where nothing is."""
    if not exists(settings):
        return {name: schema.empty_table() for name, schema in SCHEMAS.items()}
    with reading(settings) as session:
        return {name: _read(session, name) for name in SCHEMAS}
