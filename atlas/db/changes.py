"""What changed between two saves of an annotation, and a history short enough to read."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

from atlas.db.annotations import Saved
from atlas.db.notes import FeatureAnnotation, HeadAnnotation
from atlas.judging import FeatureVerdict

N = TypeVar("N", HeadAnnotation, FeatureAnnotation)
_IGNORED = ("seconds_spent", "created_at")
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
BURST = timedelta(seconds=90)
"""Saves of one field within this time of each other are one piece of typing."""


@dataclass(frozen=True)
class Change:
    """One field that changed: pieces of text with ``=`` (kept), ``-`` (gone) or ``+`` (new) in front."""

    field: str
    pieces: tuple[tuple[str, str], ...]


def told(value: object) -> str:
    """A stored value as one text.

    >>> told(["a", "b"]), told(None), told(True)
    ('a, b', '', 'yes')
    >>> told([{"sae": "m/L05.z", "feature": 7, "verdict": "group", "group": "of"}])
    '7: of'
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return f"{value['feature']}: {value['group'] or value['verdict']}"
    if isinstance(value, list | tuple):
        return ", ".join(told(one) for one in value)
    return str(value)


def pieces(before: str, after: str) -> tuple[tuple[str, str], ...]:
    """Two texts as pieces that stayed, went and came, by words.

    >>> pieces("copies names", "copies rare names")
    (('=', 'copies '), ('+', 'rare '), ('=', 'names'))
    """
    a, b = _WORDS.findall(before), _WORDS.findall(after)
    found: list[tuple[str, str]] = []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal":
            found.append(("=", "".join(a[i:j])))
            continue
        found += [(mark, "".join(part)) for mark, part in (("-", a[i:j]), ("+", b[k:m])) if part]
    return tuple(found)


def changes(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> tuple[Change, ...]:
    """The fields in which two saves differ, in the order of the later one; time spent does not count."""
    before = before or {}
    found = []
    for field, value in after.items():
        if field in _IGNORED:
            continue
        old, new = told(before.get(field)), told(value)
        if old != new and not (field not in before and new in ("", "no")):
            found.append(Change(field, pieces(old, new)))
    return tuple(found)


def condensed(history: Sequence[Saved]) -> list[Saved]:
    """A history in which saves while one field was being typed count as one: the last of each burst is kept.

    Two neighbouring saves belong together when both changed the same single field within :data:`BURST`.
    """
    fields = [_changed(before, after) for before, after in pairwise([None, *history])]
    kept = []
    for i, save in enumerate(history):
        later = history[i + 1] if i + 1 < len(history) else None
        same = later is not None and len(fields[i]) == 1 and fields[i] == fields[i + 1]
        if not (same and later is not None and later.saved_at - save.saved_at <= BURST):
            kept.append(save)
    return kept


def _changed(before: Saved | None, after: Saved | None) -> tuple[str, ...]:
    if after is None:
        return ()
    return tuple(change.field for change in changes(before.payload if before else None, after.payload))


def as_it_was(note: N, save: Saved) -> N:
    """A note with everything that one of its saves held, but for the time spent, which only grows."""
    known = set(note.__dataclass_fields__) - set(_IGNORED)
    fields = {name: value for name, value in save.payload.items() if name in known}
    for name in ("groupings", "tags"):
        if name in fields:
            fields[name] = tuple(fields[name])
    if isinstance(note, HeadAnnotation):
        fields["verdicts"] = tuple(FeatureVerdict(**one) for one in fields.get("verdicts", ()))
    return replace(note, **fields)


def earlier(history: Iterable[Saved], version: int) -> Saved | None:
    """The newest save before a version; None where there is none."""
    older = [save for save in history if save.version < version]
    return max(older, key=lambda save: save.version, default=None)
