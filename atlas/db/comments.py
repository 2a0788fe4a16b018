"""Comments on heads and features: a talk beside the annotations, in the order in which it was said.

A comment's text never changes. Its author can withdraw it; the row stays, the text is shown no more.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import and_, select, update

from atlas.access import demand
from atlas.db.notes import check_length, check_name
from atlas.db.places import Place
from atlas.db.review_models import Comment as Row
from atlas.db.session import reading, writing
from atlas.errors import ConfigError
from atlas.settings import Settings

COMMENT_LENGTH = 4_000


@dataclass(frozen=True)
class Comment:
    """One thing that somebody said; ``body`` is empty where it was withdrawn."""

    id: int
    author: str
    body: str
    created_at: datetime
    withdrawn: bool


def _comment(row: Row) -> Comment:
    gone = row.withdrawn_at is not None
    return Comment(row.id, row.author, "" if gone else row.body, row.created_at, gone)


def add_comment(settings: Settings, place: Place, author: str, body: str) -> Comment:
    """Say something about a head or a feature; ConfigError for an empty or too long text."""
    demand("annotate", annotator=author)
    place.check()
    check_name("annotator", author)
    body = body.strip()
    check_length("comment", body, COMMENT_LENGTH, least=1)
    row = Row(**place.key, author=author, body=body, created_at=datetime.now(UTC), withdrawn_at=None)
    with writing(settings) as session:
        session.add(row)
        session.flush()
        return _comment(row)


def list_comments(settings: Settings, place: Place) -> list[Comment]:
    """Everything said about a head or a feature, oldest first."""
    where = and_(*(getattr(Row, name) == value for name, value in place.key.items()))
    with reading(settings) as session:
        return [_comment(row) for row in session.scalars(select(Row).where(where).order_by(Row.id))]


def withdraw_comment(settings: Settings, comment: int, author: str) -> None:
    """Take back one's own comment; ConfigError for another's, or one that is not there."""
    demand("annotate", annotator=author)
    own = and_(Row.id == comment, Row.author == author, Row.withdrawn_at.is_(None))
    with writing(settings) as session:
        done = session.execute(update(Row).where(own).values(withdrawn_at=datetime.now(UTC)))
        if done.rowcount != 1:  # type: ignore[attr-defined]
            raise ConfigError(f"{author} has no comment {comment} to withdraw; allowed: one's own")
