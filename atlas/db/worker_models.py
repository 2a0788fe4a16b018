"""The table of workers; declared beside :mod:`atlas.db.models`, on the same metadata."""

from datetime import datetime

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from atlas.db.models import Base


class Worker(Base):
    """One worker that has said it is there; its row goes when it ends in good order."""

    __tablename__ = "workers"
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    host: Mapped[str] = mapped_column(String(200))
    pid: Mapped[int]
    queues: Mapped[list[str]]
    device: Mapped[str] = mapped_column(String(200))
    concurrency: Mapped[int]
    version: Mapped[str] = mapped_column(String(40))
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime]
