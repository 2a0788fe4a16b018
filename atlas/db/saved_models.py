"""The table of saved questions; declared beside :mod:`atlas.db.models`, on the same metadata."""

from datetime import datetime

from sqlalchemy import CheckConstraint, String
from sqlalchemy.orm import Mapped, mapped_column

from atlas.db.models import Base, among

KINDS = ("search", "sql", "sql_history")


class SavedQuestion(Base):
    """A search or a SQL query that somebody keeps under a name, for themselves or for all."""

    __tablename__ = "saved_questions"
    __table_args__ = (CheckConstraint(among("kind", KINDS), name="kind"),)
    kind: Mapped[str] = mapped_column(String(20), primary_key=True)
    author: Mapped[str] = mapped_column(String(80), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    body: Mapped[str]
    shared: Mapped[bool]
    changed_at: Mapped[datetime]
