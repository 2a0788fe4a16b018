"""Put notes from a file into the database: all or nothing, every change a new version in the history."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sqlalchemy import select
from sqlalchemy.orm import Session

from atlas.access import actor, demand
from atlas.db.annotations import put_feature, put_head
from atlas.db.exchange import Note
from atlas.db.models import FeatureNote, HeadNote
from atlas.db.notes import HeadAnnotation, checked_verdicts, checked_words
from atlas.db.session import writing
from atlas.errors import ConflictError
from atlas.settings import Settings

_TAKEN_OVER = ("version", "created_at", "updated_at")


@dataclass(frozen=True)
class Loaded:
    """How many notes were new, changed, and there already as they are."""

    new: int
    changed: int
    same: int


def put_notes(settings: Settings, notes: Sequence[Note], *, replace_existing: bool = False) -> Loaded:
    """Save notes on top of what is stored; a note with the same content is passed over.

    Everybody may put in their own notes, an admin also those of others. Raises ConflictError, and saves
    nothing at all, for a note that is there with another content, unless ``replace_existing``: then the
    file's content becomes its next version, and the old one stays in the history.
    """
    who = actor()
    for name in sorted({note.annotator for note in notes}):
        demand("annotate" if name == who.name else "imports")
    counts = {"new": 0, "changed": 0, "same": 0}
    with writing(settings) as session:
        for note in notes:
            row = _stored(session, note)
            version = 0 if row is None else row.version
            if row is not None and _same(note, row):
                counts["same"] += 1
                continue
            if row is not None and not replace_existing:
                raise ConflictError(
                    f"{note.subject} is there already with another content; nothing was saved"
                )
            put = put_head if isinstance(note, HeadAnnotation) else put_feature
            if put(session, replace(note, version=0), version) is None:  # type: ignore[arg-type]
                raise ConflictError(f"{note.subject} was changed meanwhile; nothing was saved")
            session.expire_all()
            counts["changed" if version else "new"] += 1
    return Loaded(**counts)


def _stored(session: Session, note: Note) -> HeadNote | FeatureNote | None:
    """The row that a note would be saved over."""
    if isinstance(note, HeadAnnotation):
        at = (HeadNote.model == note.model, HeadNote.layer == note.layer, HeadNote.head == note.head)
        query = select(HeadNote).where(*at, HeadNote.annotator == note.annotator)
        return session.scalars(query).one_or_none()
    where = (FeatureNote.sae == note.sae, FeatureNote.feature == note.feature)
    features = select(FeatureNote).where(*where, FeatureNote.annotator == note.annotator)
    return session.scalars(features).one_or_none()


def _same(note: Note, row: HeadNote | FeatureNote) -> bool:
    """Whether a stored row says what a note says."""
    for name in note.__dataclass_fields__:
        if name in _TAKEN_OVER:
            continue
        value, stored = getattr(note, name), getattr(row, name)
        if name in ("groupings", "tags"):
            value = list(checked_words(name, value))
        elif name == "verdicts":
            value = [vars(one) for one in checked_verdicts(value)]
        if value != stored:
            return False
    return True
