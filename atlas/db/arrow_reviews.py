"""What people said about single features inside a head, and to each other, as Arrow tables for SQL."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from sqlalchemy import select
from sqlalchemy.orm import Session

from atlas.db.models import HeadNote
from atlas.db.review_models import Adjudication, Comment, GroupingMerge, Survey, SurveyRating
from atlas.tables import F64, I16, I32, I64, STR

_TIME = pa.timestamp("us")
_WORDS = pa.list_(STR)


def _schema(*optional: str, **types: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in optional) for name, kind in types.items()])


_PLACE = {"model": STR, "layer": I16, "head": I16, "sae": STR, "feature": I32}

SCHEMAS: dict[str, pa.Schema] = {
    "head_verdicts": _schema(
        model=STR, layer=I16, head=I16, annotator=STR, status=STR, sae=STR, feature=I32, verdict=STR,
        grouping=STR,
    ),
    "grouping_merges": _schema(model=STR, word=STR, stands_for=STR, merged_by=STR, merged_at=_TIME),
    "comments": _schema(
        *_PLACE, "withdrawn_at",
        id=I64, kind=STR, **_PLACE, author=STR, body=STR, created_at=_TIME, withdrawn_at=_TIME,
    ),
    "adjudications": _schema(
        *_PLACE, "semanticity", "interpretability",
        id=I64, kind=STR, **_PLACE, adjudicator=STR, label=STR, groupings=_WORDS, semanticity=STR, role=STR,
        interpretability=STR, reason=STR, version=I32, decided_at=_TIME,
    ),
    "survey_features": _schema(
        survey=STR, model=STR, release=STR, sae=STR, feature=I32, position=I32, alive=I32
    ),
    "survey_ratings": _schema(
        survey=STR, sae=STR, feature=I32, annotator=STR, rating=STR, label=STR, seconds_spent=F64,
        version=I32, rated_at=_TIME,
    ),
}  # fmt: skip
"""The tables that :func:`review_rows` fills, by name."""

_PLAIN = {
    "grouping_merges": (GroupingMerge, ("model", "word")),
    "comments": (Comment, ("id",)),
    "adjudications": (Adjudication, ("id",)),
    "survey_ratings": (SurveyRating, ("survey", "sae", "feature", "annotator")),
}


def _verdicts(session: Session) -> Iterator[dict[str, Any]]:
    """One row per verdict, in the order of head, annotator, SAE and feature."""
    order = (HeadNote.model, HeadNote.layer, HeadNote.head, HeadNote.annotator)
    for note in session.scalars(select(HeadNote).order_by(*order)):
        for one in note.verdicts:
            yield {
                "model": note.model, "layer": note.layer, "head": note.head, "annotator": note.annotator,
                "status": note.status, "sae": one["sae"], "feature": one["feature"],
                "verdict": one["verdict"], "grouping": one["group"],
            }  # fmt: skip


def _sampled(session: Session) -> Iterator[dict[str, Any]]:
    """One row per feature of a survey's sample, in the order in which it is shown."""
    for survey in session.scalars(select(Survey).order_by(Survey.name)):
        for position, one in enumerate(survey.sample):
            yield {
                "survey": survey.name, "model": survey.model, "release": survey.release, "sae": one["sae"],
                "feature": one["feature"], "position": position, "alive": survey.alive[one["sae"]],
            }  # fmt: skip


def review_rows(session: Session, table: str) -> list[dict[str, Any]]:
    """The rows of one of :data:`SCHEMAS`, in the order of its key; a withdrawn comment has no text."""
    if table == "head_verdicts":
        return list(_verdicts(session))
    if table == "survey_features":
        return list(_sampled(session))
    source, key = _PLAIN[table]
    names = SCHEMAS[table].names
    order = [getattr(source, name) for name in key]
    rows = session.execute(select(*(getattr(source, name) for name in names)).order_by(*order)).all()
    found = [dict(zip(names, row, strict=True)) for row in rows]
    for row in found:
        if row.get("withdrawn_at") is not None:
            row["body"] = ""
    return found
