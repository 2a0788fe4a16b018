"""Annotators side by side: how far they agree on each field, and on which heads they differ most.

Only notes that are done count, and groupings are read after merging. A unit is a head (for verdicts: a
feature inside a head); an annotator is one observer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import nan

from atlas.agreement import (
    Distance,
    Value,
    cohen_kappa,
    disagreement,
    fleiss_kappa,
    interval,
    jaccard,
    krippendorff_alpha,
    nominal,
    percent_agreement,
)
from atlas.db.annotations import list_heads
from atlas.db.notes import HeadAnnotation
from atlas.db.vocabulary import same_words
from atlas.judging import GROUP
from atlas.settings import Settings

Head = tuple[int, int]
Units = Mapping[object, Mapping[str, Value]]
"""What each annotator says about each unit."""


@dataclass(frozen=True)
class Field:
    """A field that is compared: how its values are read from a note, and how far apart two of them are."""

    name: str
    meaning: str
    value: Callable[[HeadAnnotation, Mapping[str, str]], Value | None]
    distance: Distance = nominal


def _groups(note: HeadAnnotation, same: Mapping[str, str]) -> Value | None:
    return frozenset(same.get(word, word) for word in note.groupings) or None


FIELDS = (
    Field("semanticity", "class of semanticity", lambda note, _: note.semanticity),
    Field("groupings", "groupings, by their Jaccard distance", _groups, jaccard),
    Field("role", "role", lambda note, same: same.get(note.role, note.role) or None),
    Field("confidence", "confidence, by squared difference", lambda note, _: note.confidence, interval),
    Field("star", "star", lambda note, _: note.star),
    Field("novel", "novelty", lambda note, _: note.novel),
)
VERDICT = Field("verdicts", "verdicts on single features: group, odd one out, cannot say", lambda *_: None)


@dataclass(frozen=True)
class Agreement:
    """How far annotators agree on one field; NaN where a measure does not apply or nothing follows.

    ``cohen`` is given for exactly two annotators, ``fleiss`` over the units that all of them judged; neither
    for fields whose distance is not equal-or-not.
    """

    field: Field
    units: int
    """Units with two judgements or more."""
    judgements: int
    equal: float
    alpha: float
    cohen: float
    fleiss: float


def done_heads(settings: Settings, model: str) -> dict[Head, dict[str, HeadAnnotation]]:
    """The finished notes about each head, by annotator."""
    found: dict[Head, dict[str, HeadAnnotation]] = {}
    for note in list_heads(settings, model):
        if note.status == "done":
            found.setdefault((note.layer, note.head), {})[note.annotator] = note
    return found


def _field_units(
    notes: Mapping[Head, Mapping[str, HeadAnnotation]], field: Field, same: Mapping[str, str]
) -> Units:
    values = {head: {who: field.value(n, same) for who, n in by.items()} for head, by in notes.items()}
    return {head: {who: v for who, v in by.items() if v is not None} for head, by in values.items()}


def _verdict_units(notes: Mapping[Head, Mapping[str, HeadAnnotation]], same: Mapping[str, str]) -> Units:
    found: dict[object, dict[str, Value]] = {}
    for head, by in notes.items():
        for who, note in by.items():
            for one in note.verdicts:
                said = (
                    ("group", same.get(one.group, one.group)) if one.verdict == GROUP else (one.verdict, "")
                )
                found.setdefault((*head, one.sae, one.feature), {})[who] = said
    return found


def measure(field: Field, units: Units) -> Agreement:
    """Every measure of agreement that applies to a field."""
    several = [by for by in units.values() if len(by) > 1]
    values = [tuple(by.values()) for by in several]
    who = sorted({name for by in several for name in by})
    shared = [by for by in several if len(by) == len(who)]
    cohen = fleiss = nan
    if field.distance is nominal and shared:
        classes = list(dict.fromkeys(value for by in shared for value in by.values()))
        fleiss = fleiss_kappa([[list(by.values()).count(c) for c in classes] for by in shared])
        if len(who) == 2:
            cohen = cohen_kappa([by[who[0]] for by in shared], [by[who[1]] for by in shared])
    alpha = krippendorff_alpha(values, field.distance)
    total = sum(map(len, values))
    return Agreement(field, len(values), total, percent_agreement(values), alpha, cohen, fleiss)


def agreement(
    settings: Settings, model: str, annotators: Sequence[str] | None = None
) -> tuple[Agreement, ...]:
    """How far annotators (all, or some) agree on each field, verdicts on features last."""
    notes = _only(done_heads(settings, model), annotators)
    same = same_words(settings, model)
    found = [measure(field, _field_units(notes, field, same)) for field in FIELDS]
    return (*found, measure(VERDICT, _verdict_units(notes, same)))


def _only(
    notes: Mapping[Head, Mapping[str, HeadAnnotation]], annotators: Sequence[str] | None
) -> dict[Head, dict[str, HeadAnnotation]]:
    if annotators is None:
        return {head: dict(by) for head, by in notes.items()}
    return {head: {w: n for w, n in by.items() if w in annotators} for head, by in notes.items()}


@dataclass(frozen=True)
class Disputed:
    """A head that several people finished: their notes, and how far these are apart (0: not at all)."""

    head: Head
    notes: tuple[HeadAnnotation, ...]
    distance: float
    fields: tuple[str, ...]
    """The fields in which any two differ."""


def disputed_heads(
    settings: Settings, model: str, annotators: Sequence[str] | None = None
) -> tuple[Disputed, ...]:
    """Heads with two finished notes or more, those that are furthest apart first (ties: reading order).

    The distance is the mean of that of the class of semanticity (0 or 1), the groupings (Jaccard) and the
    role (0 or 1), each over all pairs of annotators who gave it, and over those fields that two of them gave.
    """
    same = same_words(settings, model)
    found = []
    for head, by in sorted(_only(done_heads(settings, model), annotators).items()):
        if len(by) < 2:
            continue
        notes = tuple(by[who] for who in sorted(by))
        parts = {}
        for field in FIELDS:
            values = [v for note in notes if (v := field.value(note, same)) is not None]
            if len(values) > 1:
                parts[field.name] = disagreement(values, field.distance)
        judged = [parts[name] for name in ("semanticity", "groupings", "role") if name in parts]
        distance = sum(judged) / len(judged) if judged else 0.0
        found.append(Disputed(head, notes, distance, tuple(name for name, d in parts.items() if d > 0)))
    return tuple(sorted(found, key=lambda one: (-one.distance, one.head)))


def pairwise_kappa(
    settings: Settings, model: str, field: str = "semanticity"
) -> dict[tuple[str, str], float]:
    """Cohen's kappa of every two annotators on the heads that both finished; NaN where nothing follows."""
    chosen = next(one for one in FIELDS if one.name == field)
    units = _field_units(done_heads(settings, model), chosen, same_words(settings, model))
    who = sorted({name for by in units.values() for name in by})
    found = {}
    for a, b in combinations(who, 2):
        both = [by for by in units.values() if a in by and b in by]
        if both:
            found[a, b] = cohen_kappa([by[a] for by in both], [by[b] for by in both])
    return found
