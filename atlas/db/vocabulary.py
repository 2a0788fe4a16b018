"""The words for groupings that are in use for a model, and which of them were merged.

A merge says that a word stands for another one. What people wrote stays as they wrote it, no version changes,
and a merge can be taken back; whatever counts or compares groupings reads words through :func:`same_words`.
"""

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import SequenceMatcher

from sqlalchemy import delete, insert, select

from atlas.access import demand
from atlas.db.models import FeatureNote, HeadNote
from atlas.db.notes import check_name, checked_words
from atlas.db.review_models import GroupingMerge
from atlas.db.session import reading, writing
from atlas.errors import ConfigError
from atlas.settings import Settings

_ALIKE = 0.85
"""Similarity (difflib ratio of the folded words) from which two words are shown as perhaps the same."""


@dataclass(frozen=True)
class Word:
    """A grouping in use: how many notes have it, and the words that were merged into it."""

    word: str
    n: int
    merged: tuple[str, ...] = ()


def same_words(settings: Settings, model: str) -> dict[str, str]:
    """For every merged word of a model, the word that it stands for in the end."""
    with reading(settings) as session:
        rows = session.execute(
            select(GroupingMerge.word, GroupingMerge.stands_for).where(GroupingMerge.model == model)
        ).all()
    direct = {row.word: row.stands_for for row in rows}
    return {word: resolve(word, direct) for word in sorted(direct)}


def resolve(word: str, merges: dict[str, str]) -> str:
    """The word at the end of a chain of merges.

    >>> resolve("bigrams", {"bigrams": "bi-gram", "bi-gram": "bigram"}), resolve("other", {})
    ('bigram', 'other')
    """
    seen = set()
    while word in merges and word not in seen:
        seen.add(word)
        word = merges[word]
    return word


def vocabulary(settings: Settings, model: str) -> tuple[Word, ...]:
    """Every grouping in use for a model after merging, the most used first, then by name.

    A note counts once for a word, however many of its words were merged into it.
    """
    same = same_words(settings, model)
    with reading(settings) as session:
        rows = list(session.scalars(select(HeadNote.groupings).where(HeadNote.model == model)))
    counts = Counter(word for words in rows for word in {same.get(w, w) for w in words})
    merged: dict[str, list[str]] = {}
    for word, other in same.items():
        merged.setdefault(other, []).append(word)
    found = [Word(word, n, tuple(merged.get(word, ()))) for word, n in counts.items()]
    found += [Word(word, 0, tuple(words)) for word, words in merged.items() if word not in counts]
    return tuple(sorted(found, key=lambda one: (-one.n, one.word)))


def known_groupings(settings: Settings, model: str) -> tuple[str, ...]:
    """The words of :func:`vocabulary`, in its order."""
    return tuple(one.word for one in vocabulary(settings, model))


def known_tags(settings: Settings, sae: str) -> tuple[str, ...]:
    """The words that features of an SAE were tagged with, the most used first, then by name."""
    with reading(settings) as session:
        rows = session.scalars(select(FeatureNote.tags).where(FeatureNote.sae == sae))
        counts = Counter(word for words in rows for word in words)
    return tuple(sorted(counts, key=lambda word: (-counts[word], word)))


def merge(settings: Settings, model: str, word: str, stands_for: str, who: str) -> None:
    """From now on ``word`` stands for ``stands_for`` (its old merge, if any, is replaced).

    Raises ConfigError where the two are the same already, so that no word ever stands for itself.
    """
    demand("annotate", annotator=who)
    check_name("model", model)
    check_name("annotator", who)
    word, stands_for = checked_words("groupings", [word])[0], checked_words("groupings", [stands_for])[0]
    target = resolve(stands_for, {k: v for k, v in same_words(settings, model).items() if k != word})
    if target == word:
        raise ConfigError(f"grouping {stands_for!r} already stands for {word!r}; allowed: another word")
    row = {"model": model, "word": word, "stands_for": target, "merged_by": who}
    with writing(settings) as session:
        session.execute(delete(GroupingMerge).where(GroupingMerge.model == model, GroupingMerge.word == word))
        session.execute(insert(GroupingMerge).values(**row, merged_at=datetime.now(UTC)))


def unmerge(settings: Settings, model: str, word: str, who: str) -> None:
    """Let a word stand for itself again; ConfigError where it was not merged."""
    demand("annotate", annotator=who)
    where = (GroupingMerge.model == model, GroupingMerge.word == word)
    with writing(settings) as session:
        if session.execute(delete(GroupingMerge).where(*where)).rowcount != 1:  # type: ignore[attr-defined]
            raise ConfigError(f"grouping {word!r} was not merged; nothing to take back")


def _folded(word: str) -> str:
    letters = "".join(c for c in word.casefold() if c.isalnum())
    return letters.removesuffix("s")


def alike(words: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Pairs of words that may mean the same: equal but for case, blanks, marks, a plural s, or a few letters.

    Each pair has the word that comes first in ``words`` second, as the one to merge into.

    >>> alike(("bigram", "local context", "Bi-grams", "lokal context", "of"))
    (('Bi-grams', 'bigram'), ('lokal context', 'local context'))
    """
    folded = [_folded(word) for word in words]
    pairs = []
    for j, b in enumerate(folded):
        for i, a in enumerate(folded[:j]):
            if a == b or SequenceMatcher(None, a, b).ratio() >= _ALIKE:
                pairs.append((words[j], words[i]))
                break
    return tuple(pairs)
