"""Tables of what several people make of annotations: comments, agreed verdicts, one vocabulary, surveys.

Declared beside :mod:`atlas.db.models`, on the same metadata; the same rules hold here.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    String,
    UniqueConstraint,
)
from sqlalchemy.orm import Mapped, mapped_column

from atlas.db.models import INTERPRETABILITY, SEMANTICITY, Base, among

KINDS = ("head", "feature")
_ROW_NUMBER = BigInteger().with_variant(Integer, "sqlite")


class Comment(Base):
    """What somebody said about a head or a feature; text never changes, and can be withdrawn."""

    __tablename__ = "comments"
    __table_args__ = (
        CheckConstraint(among("kind", KINDS), name="kind"),
        Index(None, "model", "layer", "head"),
        Index(None, "sae", "feature"),
    )
    id: Mapped[int] = mapped_column(_ROW_NUMBER, primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    model: Mapped[str | None] = mapped_column(String(200))
    layer: Mapped[int | None]
    head: Mapped[int | None]
    sae: Mapped[str | None] = mapped_column(String(300))
    feature: Mapped[int | None]
    author: Mapped[str] = mapped_column(String(80))
    body: Mapped[str]
    created_at: Mapped[datetime]
    withdrawn_at: Mapped[datetime | None]


class Adjudication(Base):
    """The verdict that was agreed on for a head or a feature; each new one is a row of its own."""

    __tablename__ = "adjudications"
    __table_args__ = (
        UniqueConstraint("kind", "place", "version"),
        CheckConstraint(among("kind", KINDS), name="kind"),
        CheckConstraint(among("semanticity", SEMANTICITY), name="semanticity"),
        CheckConstraint(among("interpretability", INTERPRETABILITY), name="interpretability"),
    )
    id: Mapped[int] = mapped_column(_ROW_NUMBER, primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    place: Mapped[str] = mapped_column(String(340))
    """Model and head, or SAE and feature, in one text, so that a version is unique for it."""
    model: Mapped[str | None] = mapped_column(String(200))
    layer: Mapped[int | None]
    head: Mapped[int | None]
    sae: Mapped[str | None] = mapped_column(String(300))
    feature: Mapped[int | None]
    adjudicator: Mapped[str] = mapped_column(String(80))
    label: Mapped[str]
    groupings: Mapped[list[str]]
    semanticity: Mapped[str | None] = mapped_column(String(40))
    role: Mapped[str]
    interpretability: Mapped[str | None] = mapped_column(String(40))
    reason: Mapped[str]
    version: Mapped[int]
    decided_at: Mapped[datetime]


class GroupingMerge(Base):
    """A word for a grouping that means the same as another one; what people wrote stays as it is."""

    __tablename__ = "grouping_merges"
    model: Mapped[str] = mapped_column(String(200), primary_key=True)
    word: Mapped[str] = mapped_column(String(60), primary_key=True)
    stands_for: Mapped[str] = mapped_column(String(60))
    merged_by: Mapped[str] = mapped_column(String(80))
    merged_at: Mapped[datetime]


class Survey(Base):
    """A random sample of features that people judge blind; the sample never changes."""

    __tablename__ = "surveys"
    __table_args__ = (CheckConstraint("n_each >= 1", name="n_each"),)
    name: Mapped[str] = mapped_column(String(120), primary_key=True)
    model: Mapped[str] = mapped_column(String(200))
    release: Mapped[str] = mapped_column(String(200))
    n_each: Mapped[int]
    seed: Mapped[int]
    alive: Mapped[dict[str, Any]]
    """Of each SAE, how many features the sample was drawn from."""
    sample: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    created_by: Mapped[str] = mapped_column(String(80))
    created_at: Mapped[datetime]


class SurveyRating(Base):
    """How one annotator judged one feature of a survey."""

    __tablename__ = "survey_ratings"
    __table_args__ = (CheckConstraint(among("rating", (*INTERPRETABILITY, "skipped")), name="rating"),)
    survey: Mapped[str] = mapped_column(
        String(120), ForeignKey("surveys.name", ondelete="CASCADE"), primary_key=True
    )
    sae: Mapped[str] = mapped_column(String(300), primary_key=True)
    feature: Mapped[int] = mapped_column(primary_key=True)
    annotator: Mapped[str] = mapped_column(String(80), primary_key=True)
    rating: Mapped[str] = mapped_column(String(40))
    label: Mapped[str]
    seconds_spent: Mapped[float]
    version: Mapped[int]
    rated_at: Mapped[datetime]
