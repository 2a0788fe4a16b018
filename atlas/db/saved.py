"""Questions that people keep: searches and SQL queries under a name, and the queries asked of late.

A saved question belongs to its author; a shared one is seen by all. Saving under the same name again replaces
what was there.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import delete, or_, select

from atlas.access import demand
from atlas.db.notes import check_length, check_name
from atlas.db.saved_models import KINDS, SavedQuestion
from atlas.db.session import reading, writing
from atlas.errors import one_of
from atlas.settings import Settings

NAME_LENGTH, BODY_LENGTH = 200, 100_000
REMEMBERED = 50
"""Queries of each person's history."""


@dataclass(frozen=True)
class Saved:
    """A question: SQL, or the address of a search behind its question mark."""

    author: str
    name: str
    body: str
    shared: bool
    changed_at: datetime


def _saved(row: SavedQuestion) -> Saved:
    return Saved(row.author, row.name, row.body, row.shared, row.changed_at)


def save_question(
    settings: Settings, kind: str, author: str, name: str, body: str, *, shared: bool = False
) -> Saved:
    """Keep a question under a name; ConfigError for a name or a text that is empty or too long."""
    one_of("kind of question", kind, KINDS)
    demand("annotate", annotator=author)
    check_name("annotator", author)
    name = " ".join(name.split())
    check_length("name", name, NAME_LENGTH, least=1)
    check_length("question", body, BODY_LENGTH, least=1)
    row = SavedQuestion(
        kind=kind, author=author, name=name, body=body, shared=shared, changed_at=datetime.now(UTC)
    )
    with writing(settings) as session:
        return _saved(session.merge(row))


def list_questions(settings: Settings, kind: str, author: str) -> list[Saved]:
    """One's own questions and those that others share: own ones first, then by name."""
    one_of("kind of question", kind, KINDS)
    seen = or_(SavedQuestion.author == author, SavedQuestion.shared)
    with reading(settings) as session:
        rows = session.scalars(select(SavedQuestion).where(SavedQuestion.kind == kind, seen))
        found = [_saved(row) for row in rows]
    return sorted(found, key=lambda one: (one.author != author, one.name.lower(), one.name, one.author))


def delete_question(settings: Settings, kind: str, author: str, name: str) -> bool:
    """Throw away one's own question; whether there was one."""
    demand("annotate", annotator=author)
    with writing(settings) as session:
        done = session.execute(
            delete(SavedQuestion).where(
                SavedQuestion.kind == kind, SavedQuestion.author == author, SavedQuestion.name == name
            )
        )
        return bool(done.rowcount)  # type: ignore[attr-defined]


def note_query(settings: Settings, author: str, sql: str) -> None:
    """Put a SQL query on top of its author's history; the oldest beyond 50 are forgotten."""
    name = hashlib.sha256(sql.encode()).hexdigest()[:16]
    save_question(settings, "sql_history", author, name, sql)
    own = (SavedQuestion.kind == "sql_history", SavedQuestion.author == author)
    with writing(settings) as session:
        newest = select(SavedQuestion.name).where(*own).order_by(SavedQuestion.changed_at.desc())
        old = list(session.scalars(newest.offset(REMEMBERED)))
        if old:
            session.execute(delete(SavedQuestion).where(*own, SavedQuestion.name.in_(old)))


def history(settings: Settings, author: str) -> list[Saved]:
    """One's own queries, the last one first."""
    own = (SavedQuestion.kind == "sql_history", SavedQuestion.author == author)
    with reading(settings) as session:
        rows = session.scalars(select(SavedQuestion).where(*own).order_by(SavedQuestion.changed_at.desc()))
        return [_saved(row) for row in rows]
