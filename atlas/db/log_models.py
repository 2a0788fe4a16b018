"""The table of what steps said while they ran, declared on the metadata of :mod:`atlas.db.models`."""

from datetime import datetime

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from atlas.db.models import Base, among

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class StepLine(Base):
    """One line of a step's log. Only the last lines of each step are kept."""

    __tablename__ = "step_logs"
    __table_args__ = (
        CheckConstraint(among("level", LEVELS), name="level"),
        Index(None, "run_id", "step", "id"),
    )
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    run_id: Mapped[str] = mapped_column(String(40), ForeignKey("runs.id", ondelete="CASCADE"))
    step: Mapped[str] = mapped_column(String(200))
    at: Mapped[datetime]
    level: Mapped[str] = mapped_column(String(20))
    worker: Mapped[str] = mapped_column(String(200))
    line: Mapped[str]
