"""What an annotation is: its fields, what each may hold, and the check made before it is stored."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from atlas.db.models import INTERPRETABILITY, NOTE_STATUS, SEMANTICITY
from atlas.errors import ConfigError, one_of
from atlas.judging import FeatureVerdict, check_verdict

LABEL_LENGTH = 120
ROLE_LENGTH = 200
NOTES_LENGTH = 20_000
WORD_LENGTH = 60
MOST_WORDS = 20
MOST_VERDICTS = 200
NAME_LENGTHS = {"model": 200, "sae": 300, "annotator": 80}


@dataclass(frozen=True)
class HeadAnnotation:
    """One annotator's judgement of one head (fields as in ``docs/annotations.md``)."""

    model: str
    layer: int
    head: int
    annotator: str
    label: str = ""
    """One short line: what the head does."""
    groupings: tuple[str, ...] = ()
    """The families that its top features fall into, in the annotator's own words."""
    semanticity: str | None = None
    """How many unrelated things it does: one of SEMANTICITY; None = not judged."""
    confidence: int | None = None
    """1 (a guess) to 5 (sure); None = not given."""
    role: str = ""
    """A known role, such as induction or previous token."""
    star: bool = False
    """Worth showing to others."""
    novel: bool = False
    """A grouping not seen in an earlier head."""
    notes: str = ""
    """Free text in Markdown."""
    verdicts: tuple[FeatureVerdict, ...] = ()
    """What was said of single features inside this head, in the order of SAE and feature."""
    status: str = "draft"
    """draft, or done."""
    seconds_spent: float = 0.0
    """Time spent on this head so far, in seconds."""
    version: int = 0
    """How often it was saved; 0 = never."""
    created_at: datetime | None = None
    updated_at: datetime | None = None

    @property
    def subject(self) -> str:
        """What this is about, in a few words."""
        return f"{self.model} L{self.layer}H{self.head} by {self.annotator}"


@dataclass(frozen=True)
class FeatureAnnotation:
    """One annotator's judgement of one feature."""

    sae: str
    feature: int
    annotator: str
    label: str = ""
    tags: tuple[str, ...] = ()
    interpretability: str | None = None
    """One of INTERPRETABILITY; None = not judged."""
    notes: str = ""
    version: int = 0
    created_at: datetime | None = None
    updated_at: datetime | None = None

    @property
    def subject(self) -> str:
        """What this is about, in a few words."""
        return f"{self.sae} feature {self.feature} by {self.annotator}"


def check_length(what: str, value: str, most: int, least: int = 0) -> None:
    """ConfigError for a text that is too long or short, or that no database stores."""
    if not least <= len(value) <= most:
        raise ConfigError(f"{what} has {len(value)} characters; allowed: {least} to {most}")
    if "\0" in value:
        raise ConfigError(f"{what} holds a NUL character, which no database stores; remove it")


def _words(what: str, values: Sequence[str]) -> tuple[str, ...]:
    """Strip each word and drop repeats, in order."""
    words = tuple(dict.fromkeys(" ".join(value.split()) for value in values))
    if len(words) > MOST_WORDS:
        raise ConfigError(f"{what} has {len(words)} entries; allowed: at most {MOST_WORDS}")
    for word in words:
        check_length(f"{what} entry {word[:WORD_LENGTH]!r}", word, WORD_LENGTH, least=1)
    return words


def check_index(what: str, value: int, most: int) -> None:
    """ConfigError unless a layer, head or feature number is in [0, most]."""
    if not 0 <= value <= most:
        raise ConfigError(f"{what} {value} is not allowed; allowed: 0 to {most}")


def check_name(what: str, value: str) -> None:
    """ConfigError unless a model, sae or annotator name has an allowed length and is not blank."""
    check_length(what, value, NAME_LENGTHS[what], least=1)
    if value != value.strip():
        raise ConfigError(f"{what} {value!r} begins or ends with a space; allowed: without")


def checked_words(what: str, values: Sequence[str]) -> tuple[str, ...]:
    """Groupings or tags as they are stored: blanks squeezed, repeats dropped, lengths checked.

    >>> checked_words("groupings", ["induction", " long  prefix ", "induction"])
    ('induction', 'long prefix')
    """
    return _words(what, values)


def checked_verdicts(verdicts: Sequence[FeatureVerdict]) -> tuple[FeatureVerdict, ...]:
    """Verdicts as they are stored: one per feature, in the order of SAE and feature, group names squeezed.

    Raises ConfigError for two verdicts on one feature, too many, or one that is not allowed.
    """
    if len(verdicts) > MOST_VERDICTS:
        raise ConfigError(f"verdicts has {len(verdicts)} entries; allowed: at most {MOST_VERDICTS}")
    found: dict[tuple[str, int], FeatureVerdict] = {}
    for one in verdicts:
        check_name("sae", one.sae)
        check_index("feature", one.feature, 2**31 - 1)
        group = " ".join(one.group.split())
        check_length(f"group {group[:WORD_LENGTH]!r}", group, WORD_LENGTH)
        check_verdict(replace(one, group=group))
        if (one.sae, one.feature) in found:
            raise ConfigError(f"feature {one.feature} of {one.sae} has two verdicts; allowed: one")
        found[one.sae, one.feature] = replace(one, group=group)
    return tuple(found[key] for key in sorted(found))


def check_head(note: HeadAnnotation) -> None:
    """ConfigError naming the first field that holds what is not allowed."""
    check_name("model", note.model)
    check_name("annotator", note.annotator)
    check_index("layer", note.layer, 2**15 - 1)
    check_index("head", note.head, 2**15 - 1)
    check_length("label", note.label, LABEL_LENGTH)
    check_length("role", note.role, ROLE_LENGTH)
    check_length("notes", note.notes, NOTES_LENGTH)
    one_of("semanticity", note.semanticity, (*SEMANTICITY, None))
    one_of("confidence", note.confidence, (1, 2, 3, 4, 5, None))
    one_of("status", note.status, NOTE_STATUS)
    if not 0 <= note.seconds_spent < 1e9:
        raise ConfigError(f"seconds_spent {note.seconds_spent} is not allowed; allowed: 0 to 1e9")


def check_feature(note: FeatureAnnotation) -> None:
    """ConfigError naming the first field that holds what is not allowed."""
    check_name("sae", note.sae)
    check_name("annotator", note.annotator)
    check_index("feature", note.feature, 2**31 - 1)
    check_length("label", note.label, LABEL_LENGTH)
    check_length("notes", note.notes, NOTES_LENGTH)
    one_of("interpretability", note.interpretability, (*INTERPRETABILITY, None))
