"""The run and annotation database: its tables, as SQLAlchemy classes.

These rows are the working side of Head Atlas: what people wrote and what is being computed. Everything
that was computed lies in releases. Only :mod:`atlas.db` sees these classes; its functions take and give
plain frozen dataclasses. The same tables, in the same order, are built by the migrations in
``migrations/``, and a test compares the two on SQLite and on PostgreSQL.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from atlas.judging import SEMANTICITY_CLASSES

SEMANTICITY = SEMANTICITY_CLASSES
INTERPRETABILITY = ("interpretable", "partly", "uninterpretable")
NOTE_STATUS = ("draft", "done")
RUN_STATUS = ("pending", "running", "done", "failed", "cancelled")
ROLES = ("reader", "annotator", "admin")
STEP_STATUS = ("pending", "ready", "running", "done", "failed", "cancelled", "skipped")

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite forgets time zones, so UTC is put back when a row is read."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Turn any aware time into UTC before it is stored."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Give every stored time its zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def among(column: str, allowed: tuple[str, ...]) -> str:
    """SQL that holds when a column is NULL or one of the allowed words."""
    return f"{column} IN ({', '.join(repr(word) for word in allowed)})"


class Base(DeclarativeBase):
    """The parent of every table; constraints get the same names on every database."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON, list[str]: JSON, str: Text}  # noqa: RUF012


class HeadNote(Base):
    """What one annotator wrote about one head."""

    __tablename__ = "head_annotations"
    __table_args__ = (
        UniqueConstraint("model", "layer", "head", "annotator"),
        CheckConstraint(among("semanticity", SEMANTICITY), name="semanticity"),
        CheckConstraint(among("status", NOTE_STATUS), name="status"),
        CheckConstraint("confidence BETWEEN 1 AND 5", name="confidence"),
        CheckConstraint("layer >= 0 AND head >= 0", name="indices"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(String(200))
    layer: Mapped[int]
    head: Mapped[int]
    annotator: Mapped[str] = mapped_column(String(80))
    label: Mapped[str]
    groupings: Mapped[list[str]]
    semanticity: Mapped[str | None] = mapped_column(String(40))
    confidence: Mapped[int | None]
    role: Mapped[str]
    star: Mapped[bool]
    novel: Mapped[bool]
    notes: Mapped[str]
    verdicts: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    status: Mapped[str] = mapped_column(String(20))
    version: Mapped[int]
    seconds_spent: Mapped[float]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class FeatureNote(Base):
    """What one annotator wrote about one feature."""

    __tablename__ = "feature_annotations"
    __table_args__ = (
        UniqueConstraint("sae", "feature", "annotator"),
        CheckConstraint(among("interpretability", INTERPRETABILITY), name="interpretability"),
        CheckConstraint("feature >= 0", name="feature"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    sae: Mapped[str] = mapped_column(String(300))
    feature: Mapped[int]
    annotator: Mapped[str] = mapped_column(String(80))
    label: Mapped[str]
    tags: Mapped[list[str]]
    interpretability: Mapped[str | None] = mapped_column(String(40))
    notes: Mapped[str]
    version: Mapped[int]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class NoteHistory(Base):
    """One row per save of an annotation, never changed afterwards."""

    __tablename__ = "annotation_history"
    __table_args__ = (
        CheckConstraint(among("kind", ("head", "feature")), name="kind"),
        Index(None, "model", "layer", "head"),
        Index(None, "sae", "feature"),
    )
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    model: Mapped[str | None] = mapped_column(String(200))
    layer: Mapped[int | None]
    head: Mapped[int | None]
    sae: Mapped[str | None] = mapped_column(String(300))
    feature: Mapped[int | None]
    annotator: Mapped[str] = mapped_column(String(80))
    version: Mapped[int]
    payload: Mapped[dict[str, Any]]
    saved_at: Mapped[datetime]


class Run(Base):
    """One build that was asked for."""

    __tablename__ = "runs"
    __table_args__ = (
        CheckConstraint(among("status", RUN_STATUS), name="status"),
        CheckConstraint(among("executor", ("local", "queue")), name="executor"),
        # The same plan is never under way twice: a second request joins the first.
        Index(
            "uq_runs_active_digest",
            "digest",
            unique=True,
            sqlite_where=text("status IN ('pending', 'running')"),
            postgresql_where=text("status IN ('pending', 'running')"),
        ),
    )
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(200))
    executor: Mapped[str] = mapped_column(String(20))
    config_json: Mapped[str]
    status: Mapped[str] = mapped_column(String(20))
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    error: Mapped[str | None]
    cancel_requested: Mapped[bool]
    started_by: Mapped[str | None] = mapped_column(String(80))
    cancelled_by: Mapped[str | None] = mapped_column(String(80))


class RunStep(Base):
    """One step of a run: its place in the plan, who holds it, how far it is."""

    __tablename__ = "run_steps"
    __table_args__ = (
        CheckConstraint(among("status", STEP_STATUS), name="status"),
        Index(None, "status", "lease_until"),
    )
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    position: Mapped[int]
    kind: Mapped[str] = mapped_column(String(60))
    digest: Mapped[str] = mapped_column(String(64))
    queue: Mapped[str] = mapped_column(String(20))
    needs: Mapped[list[str]]
    status: Mapped[str] = mapped_column(String(20))
    done: Mapped[int] = mapped_column(BigInteger)
    total: Mapped[int] = mapped_column(BigInteger)
    rate: Mapped[float | None]
    message: Mapped[str]
    error: Mapped[str | None]
    attempts: Mapped[int]
    lease_owner: Mapped[str | None] = mapped_column(String(200))
    lease_until: Mapped[datetime | None]
    enqueued_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    peak_rss_mb: Mapped[float | None]


class User(Base):
    """Somebody who may log in to the app."""

    __tablename__ = "users"
    __table_args__ = (CheckConstraint(among("role", ROLES), name="role"),)
    name: Mapped[str] = mapped_column(String(80), primary_key=True)
    role: Mapped[str] = mapped_column(String(20))
    password: Mapped[str | None]
    created_at: Mapped[datetime]
    changed_at: Mapped[datetime]


class LoginSession(Base):
    """A browser that logged in; known by the digest of its token, which only the browser has."""

    __tablename__ = "login_sessions"
    __table_args__ = (Index(None, "name"),)
    token_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(80), ForeignKey("users.name", ondelete="CASCADE"))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]


class LoginAttempt(Base):
    """A password that was tried, counted for a few minutes so that guessing is slow."""

    __tablename__ = "login_attempts"
    __table_args__ = (Index(None, "at"),)
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    name: Mapped[str] = mapped_column(String(80))
    address: Mapped[str] = mapped_column(String(80))
    at: Mapped[datetime]
