"""The table of named locks, declared beside :mod:`atlas.db.models` on the same metadata."""

from datetime import datetime

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from atlas.db.models import Base


class NamedLock(Base):
    """Something that one process of all machines does at a time, and until when it may."""

    __tablename__ = "named_locks"
    name: Mapped[str] = mapped_column(String(300), primary_key=True)
    owner: Mapped[str] = mapped_column(String(200))
    until: Mapped[datetime]
