"""Save and load what people wrote, so that nobody's words are lost.

Every annotation carries a version. A save says which version it was written on top of (0 = none yet); when
somebody saved in between, it is refused with both texts at hand (optimistic concurrency). Every save also
adds a row to the history, in the same transaction. Annotators write beside each other: a head has one
annotation per annotator.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from atlas.access import demand
from atlas.db.models import FeatureNote, HeadNote, NoteHistory
from atlas.db.notes import (
    FeatureAnnotation,
    HeadAnnotation,
    check_feature,
    check_head,
    check_name,
    checked_verdicts,
    checked_words,
)
from atlas.db.session import reading, writing
from atlas.errors import ConflictError
from atlas.judging import FeatureVerdict
from atlas.settings import Settings

_HEAD_KEY = ("model", "layer", "head", "annotator")
_FEATURE_KEY = ("sae", "feature", "annotator")


class StaleAnnotationError(ConflictError):
    """A save on top of a version that is no longer the newest.

    ``yours`` is what was to be saved, ``theirs`` what the database holds now (None if nothing).
    """

    def __init__(
        self,
        yours: HeadAnnotation | FeatureAnnotation,
        expected: int,
        theirs: HeadAnnotation | FeatureAnnotation | None,
    ) -> None:
        self.yours, self.theirs, self.expected = yours, theirs, expected
        found = 0 if theirs is None else theirs.version
        super().__init__(
            f"{yours.subject} was changed meanwhile: you wrote on top of version {expected}, "
            f"it is now at version {found}; nothing was saved"
        )


@dataclass(frozen=True)
class HeadProgress:
    """How far the annotation of one head is."""

    status: str
    label: str
    semanticity: str | None
    confidence: int | None
    star: bool
    groupings: tuple[str, ...]


@dataclass(frozen=True)
class Saved:
    """One save in the history of an annotation."""

    annotator: str
    version: int
    payload: dict[str, Any]
    saved_at: datetime


def _head(row: HeadNote) -> HeadAnnotation:
    fields = {name: getattr(row, name) for name in HeadAnnotation.__dataclass_fields__}
    verdicts = tuple(FeatureVerdict(**one) for one in row.verdicts)
    return HeadAnnotation(**{**fields, "groupings": tuple(row.groupings), "verdicts": verdicts})


def _feature(row: FeatureNote) -> FeatureAnnotation:
    fields = {name: getattr(row, name) for name in FeatureAnnotation.__dataclass_fields__}
    return FeatureAnnotation(**{**fields, "tags": tuple(row.tags)})


def _where(model: type[HeadNote | FeatureNote], key: dict[str, Any]) -> ColumnElement[bool]:
    return and_(*(getattr(model, name) == value for name, value in key.items()))


def _store(
    session: Session,
    model: type[HeadNote | FeatureNote],
    values: dict[str, Any],
    key: dict[str, Any],
    expected: int,
) -> bool:
    """Insert or update one row if its version is still the expected one; False if it is not."""
    now = datetime.now(UTC)
    values = {**values, "version": expected + 1, "updated_at": now}
    values.pop("created_at")
    if expected == 0:
        try:
            with session.begin_nested():
                session.execute(insert(model).values(**values, created_at=now))
        except IntegrityError:
            return False
    else:
        same = and_(_where(model, key), model.version == expected)
        if session.execute(update(model).where(same).values(**values)).rowcount != 1:  # type: ignore[attr-defined]
            return False
    payload = {k: v for k, v in values.items() if k not in (*key, "version", "updated_at")}
    kind = "head" if model is HeadNote else "feature"
    session.add(NoteHistory(kind=kind, **key, version=expected + 1, payload=payload, saved_at=now))
    return True


def put_head(session: Session, note: HeadAnnotation, expected_version: int) -> HeadAnnotation | None:
    """:func:`save_head` within a transaction of the caller's; None where the version is another."""
    note = replace(
        note,
        groupings=checked_words("groupings", note.groupings),
        verdicts=checked_verdicts(note.verdicts),
    )
    check_head(note)
    key = {name: getattr(note, name) for name in _HEAD_KEY}
    values = {**asdict(note), "groupings": list(note.groupings)}
    if not _store(session, HeadNote, values, key, expected_version):
        return None
    return _head(session.scalars(select(HeadNote).where(_where(HeadNote, key))).one())


def save_head(settings: Settings, note: HeadAnnotation, expected_version: int) -> HeadAnnotation:
    """Store a head's annotation on top of ``expected_version`` and return it as stored.

    Raises ConfigError for a value that is not allowed, AccessError for a name that is not one's own,
    StaleAnnotationError (a ConflictError) when the stored version is another.
    """
    demand("annotate", annotator=note.annotator)
    with writing(settings) as session:
        saved = put_head(session, note, expected_version)
    if saved is not None:
        return saved
    theirs = load_head(settings, note.model, note.layer, note.head, note.annotator)
    raise StaleAnnotationError(note, expected_version, theirs)


def load_head(settings: Settings, model: str, layer: int, head: int, annotator: str) -> HeadAnnotation | None:
    """One annotator's annotation of one head; None if there is none."""
    key = dict(zip(_HEAD_KEY, (model, layer, head, annotator), strict=True))
    with reading(settings) as session:
        row = session.scalars(select(HeadNote).where(_where(HeadNote, key))).one_or_none()
        return None if row is None else _head(row)


def list_heads(
    settings: Settings,
    model: str,
    *,
    annotator: str | None = None,
    layer: int | None = None,
    head: int | None = None,
) -> list[HeadAnnotation]:
    """A model's head annotations, all or of one annotator, layer or head, in the order of the key."""
    wanted = {"annotator": annotator, "layer": layer, "head": head}
    key = {"model": model, **{name: value for name, value in wanted.items() if value is not None}}
    query = select(HeadNote).where(_where(HeadNote, key))
    with reading(settings) as session:
        rows = session.scalars(query.order_by(HeadNote.layer, HeadNote.head, HeadNote.annotator))
        return [_head(row) for row in rows]


def head_progress(settings: Settings, model: str, annotator: str) -> dict[tuple[int, int], HeadProgress]:
    """For every head that an annotator has begun, how far it is; the others are absent."""
    return {
        (note.layer, note.head): HeadProgress(
            note.status, note.label, note.semanticity, note.confidence, note.star, note.groupings
        )
        for note in list_heads(settings, model, annotator=annotator)
    }


def annotators(settings: Settings, model: str) -> tuple[str, ...]:
    """Everybody who has annotated a head of a model, by name."""
    query = select(HeadNote.annotator).where(HeadNote.model == model).distinct()
    with reading(settings) as session:
        return tuple(sorted(session.scalars(query)))


def put_feature(session: Session, note: FeatureAnnotation, expected_version: int) -> FeatureAnnotation | None:
    """:func:`save_feature` within a transaction of the caller's; None where the version is another."""
    note = replace(note, tags=checked_words("tags", note.tags))
    check_feature(note)
    key = {name: getattr(note, name) for name in _FEATURE_KEY}
    values = {**asdict(note), "tags": list(note.tags)}
    if not _store(session, FeatureNote, values, key, expected_version):
        return None
    return _feature(session.scalars(select(FeatureNote).where(_where(FeatureNote, key))).one())


def save_feature(settings: Settings, note: FeatureAnnotation, expected_version: int) -> FeatureAnnotation:
    """Store a feature's annotation on top of ``expected_version``; raises as :func:`save_head` does."""
    demand("annotate", annotator=note.annotator)
    with writing(settings) as session:
        saved = put_feature(session, note, expected_version)
    if saved is not None:
        return saved
    theirs = load_feature(settings, note.sae, note.feature, note.annotator)
    raise StaleAnnotationError(note, expected_version, theirs)


def load_feature(settings: Settings, sae: str, feature: int, annotator: str) -> FeatureAnnotation | None:
    """One annotator's annotation of one feature; None if there is none."""
    key = dict(zip(_FEATURE_KEY, (sae, feature, annotator), strict=True))
    with reading(settings) as session:
        row = session.scalars(select(FeatureNote).where(_where(FeatureNote, key))).one_or_none()
        return None if row is None else _feature(row)


def list_features(
    settings: Settings, sae: str, *, feature: int | None = None, annotator: str | None = None
) -> list[FeatureAnnotation]:
    """The annotations of an SAE's features, of all or of one, by feature and annotator."""
    given = {"sae": sae, "feature": feature, "annotator": annotator}
    key = {name: value for name, value in given.items() if value is not None}
    query = select(FeatureNote).where(_where(FeatureNote, key))
    with reading(settings) as session:
        return [
            _feature(r) for r in session.scalars(query.order_by(FeatureNote.feature, FeatureNote.annotator))
        ]


def _history(settings: Settings, key: dict[str, Any], annotator: str | None) -> list[Saved]:
    if annotator is not None:
        check_name("annotator", annotator)
        key = {**key, "annotator": annotator}
    query = select(NoteHistory).where(*(getattr(NoteHistory, name) == value for name, value in key.items()))
    make: Callable[[NoteHistory], Saved] = lambda r: Saved(r.annotator, r.version, r.payload, r.saved_at)  # noqa: E731
    with reading(settings) as session:
        return [make(row) for row in session.scalars(query.order_by(NoteHistory.id))]


def head_history(
    settings: Settings, model: str, layer: int, head: int, annotator: str | None = None
) -> list[Saved]:
    """Every save of a head's annotations, oldest first; of one annotator, or (None) of all."""
    key = {"kind": "head", "model": model, "layer": layer, "head": head}
    return _history(settings, key, annotator)


def feature_history(settings: Settings, sae: str, feature: int, annotator: str | None = None) -> list[Saved]:
    """Every save of a feature's annotations, oldest first; of one annotator, or (None) of all."""
    return _history(settings, {"kind": "feature", "sae": sae, "feature": feature}, annotator)
