"""The verdict agreed on where annotators differ: a record of its own, beside what each of them wrote.

A new decision never replaces an old one: it is the next version for its head or feature, and says on top of
which version it was made, so that two adjudicators cannot pass each other unseen.
"""

from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from atlas.access import demand
from atlas.db.models import INTERPRETABILITY, SEMANTICITY
from atlas.db.notes import (
    LABEL_LENGTH,
    NOTES_LENGTH,
    ROLE_LENGTH,
    check_length,
    check_name,
    checked_words,
)
from atlas.db.places import FeaturePlace, HeadPlace, Place
from atlas.db.review_models import Adjudication as Row
from atlas.db.session import reading, writing
from atlas.errors import ConflictError, one_of
from atlas.settings import Settings

ACTION = "adjudicate"


@dataclass(frozen=True)
class Decision:
    """What was agreed on for a head or a feature, by whom and why."""

    place: Place
    adjudicator: str
    label: str = ""
    groupings: tuple[str, ...] = ()
    semanticity: str | None = None
    role: str = ""
    interpretability: str | None = None
    reason: str = ""
    version: int = 0
    decided_at: datetime | None = None


def _decision(row: Row) -> Decision:
    place: Place = (
        HeadPlace(row.model or "", row.layer or 0, row.head or 0)
        if row.kind == "head"
        else FeaturePlace(row.sae or "", row.feature or 0)
    )
    names = [name for name in Decision.__dataclass_fields__ if name != "place"]
    fields = {name: getattr(row, name) for name in names}
    return Decision(place, **{**fields, "groupings": tuple(row.groupings)})


def _check(one: Decision) -> None:
    one.place.check()
    check_name("annotator", one.adjudicator)
    check_length("label", one.label, LABEL_LENGTH)
    check_length("role", one.role, ROLE_LENGTH)
    check_length("reason", one.reason, NOTES_LENGTH)
    one_of("semanticity", one.semanticity, (*SEMANTICITY, None))
    one_of("interpretability", one.interpretability, (*INTERPRETABILITY, None))


def decide(settings: Settings, one: Decision, expected_version: int) -> Decision:
    """Store an agreed verdict as the version after ``expected_version`` (0 = the first) and return it.

    Raises ConfigError for a value that is not allowed, AccessError for somebody who may not adjudicate,
    ConflictError when somebody else decided meanwhile.
    """
    demand(ACTION, annotator=one.adjudicator)
    one = replace(one, groupings=checked_words("groupings", one.groupings))
    _check(one)
    fields: dict[str, Any] = {k: v for k, v in asdict(one).items() if k != "place"}
    fields |= {
        "groupings": list(one.groupings),
        "version": expected_version + 1,
        "decided_at": datetime.now(UTC),
    }
    newest = load_decision(settings, one.place)
    if (newest.version if newest else 0) != expected_version:
        raise _meanwhile(one, expected_version)
    try:
        with writing(settings) as session:
            session.execute(insert(Row).values(**one.place.key, place=one.place.text, **fields))
    except IntegrityError:
        raise _meanwhile(one, expected_version) from None
    return load_decision(settings, one.place) or one


def _meanwhile(one: Decision, expected: int) -> ConflictError:
    return ConflictError(
        f"{one.place.text} was decided meanwhile: you decided on top of version {expected}; nothing was saved"
    )


def decisions(settings: Settings, place: Place) -> list[Decision]:
    """Every verdict that was agreed on for a head or a feature, oldest first."""
    where = (Row.kind == place.kind, Row.place == place.text)
    with reading(settings) as session:
        return [_decision(r) for r in session.scalars(select(Row).where(*where).order_by(Row.version))]


def load_decision(settings: Settings, place: Place) -> Decision | None:
    """The verdict that holds for a head or a feature; None where none was agreed on."""
    return next(reversed(decisions(settings, place)), None)


def head_decisions(settings: Settings, model: str) -> dict[tuple[int, int], Decision]:
    """The verdict that holds for each head of a model on which there is one."""
    query = (
        select(Row).where(Row.kind == "head", Row.model == model).order_by(Row.layer, Row.head, Row.version)
    )
    with reading(settings) as session:
        return {(row.layer or 0, row.head or 0): _decision(row) for row in session.scalars(query)}
