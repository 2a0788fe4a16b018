"""From verdicts on single features to what a head is: group counts and the class of semanticity.

A head's top features are judged one by one: each belongs to a group that its judge named, is an odd one out,
or cannot be told. The group counts ("H0.5: duplicate token from 9/10 features") and the classes of the table
of plausibly monosemantic heads follow from these verdicts (seed 001, "Overview of Attention Heads" and
"Discovering Plausibly Monosemantic Heads").
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from atlas.errors import ConfigError, one_of

GROUP, ODD, UNSURE = "group", "odd", "unsure"
VERDICTS = (GROUP, ODD, UNSURE)
EXCEPTIONS = 2
"""Features that may fall outside the one category of a nearly monosemantic head (seed 001: one or two)."""
SEMANTICITY_CLASSES = ("monosemantic", "nearly_monosemantic", "bisemantic", "polysemantic", "unclear")
TOP = 10
"""How many features of a head are judged (seed 001: the top 10)."""


@dataclass(frozen=True)
class FeatureVerdict:
    """What one annotator says about one feature inside one head."""

    sae: str
    feature: int
    verdict: str
    """One of VERDICTS."""
    group: str = ""
    """The group that it belongs to, where ``verdict`` is ``group``; empty otherwise."""


def check_verdict(one: FeatureVerdict) -> None:
    """ConfigError unless the verdict is known and names a group exactly where it has to.

    >>> check_verdict(FeatureVerdict("m/L00.z.topk-64", 3, "odd", "bigram"))
    Traceback (most recent call last):
    ...
    atlas.errors.ConfigError: verdict 'odd' on feature 3 names group 'bigram'; allowed: none
    """
    one_of("verdict", one.verdict, VERDICTS)
    if one.verdict == GROUP and not one.group:
        raise ConfigError(f"verdict 'group' on feature {one.feature} names no group; allowed: a word")
    if one.verdict != GROUP and one.group:
        raise ConfigError(
            f"verdict {one.verdict!r} on feature {one.feature} names group {one.group!r}; allowed: none"
        )


def group_counts(
    verdicts: Iterable[FeatureVerdict], same: Mapping[str, str] | None = None
) -> tuple[tuple[str, int], ...]:
    """How many judged features of a head belong to each group, the largest first (ties: by name).

    ``same`` maps words that were merged to the word they stand for. Dimensionless counts; seed 001 states
    them as "9/10 features".

    >>> told = [FeatureVerdict("s", i, "group", g) for i, g in enumerate(["of", "of", "on", "of"])]
    >>> group_counts([*told, FeatureVerdict("s", 9, "odd")])
    (('of', 3), ('on', 1))
    >>> group_counts(told, {"on": "of"})
    (('of', 4),)
    """
    same = same or {}
    counts = Counter(same.get(v.group, v.group) for v in verdicts if v.verdict == GROUP)
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _class(counts: Sequence[int], rest: int) -> str:
    """The class of groups of these sizes (largest first) with ``rest`` features in no group."""
    n = sum(counts) + rest
    first = counts[0] if counts else 0
    second = counts[1] if len(counts) > 1 else 0
    if first == n and n > 1:
        return "monosemantic"
    if n - first <= EXCEPTIONS and 2 * first > n:
        return "nearly_monosemantic"
    if first + second == n and second > 1:
        return "bisemantic"
    return "polysemantic"


def semanticity(verdicts: Iterable[FeatureVerdict], same: Mapping[str, str] | None = None) -> str | None:
    """The class of seed 001's table that verdicts on a head's features add up to; None where there are none.

    With n features judged, the largest group of n1 and the second of n2:

    - ``monosemantic``: n1 = n > 1;
    - ``nearly_monosemantic``: all but one or two, n - n1 <= 2, and n1 > n / 2;
    - ``bisemantic``: n1 + n2 = n with n2 > 1;
    - ``polysemantic``: everything else.

    The first that holds counts, so 8 + 2 is nearly monosemantic. A feature that cannot be told might belong
    to the largest group or to none: where these two readings of all such features give different classes, the
    head is ``unclear``. ``same`` is as in :func:`group_counts`. In the seed 14, 8 and 4 of 144 heads.

    >>> told = lambda *groups: [FeatureVerdict("s", i, "group", g) for i, g in enumerate(groups)]
    >>> semanticity(told(*["of"] * 10)), semanticity(told(*["of"] * 8, "on", "on"))
    ('monosemantic', 'nearly_monosemantic')
    >>> semanticity(told(*["of"] * 6, *["on"] * 4)), semanticity(told(*["of"] * 6, *["on"] * 3, "up"))
    ('bisemantic', 'polysemantic')
    >>> semanticity([*told(*["of"] * 9), FeatureVerdict("s", 9, "unsure")])
    'unclear'
    >>> semanticity([*told(*"abcde"), FeatureVerdict("s", 9, "unsure")]), semanticity([])
    ('polysemantic', None)
    """
    told = list(verdicts)
    if not told:
        return None
    counts = [n for _, n in group_counts(told, same)]
    odd = sum(v.verdict == ODD for v in told)
    unsure = sum(v.verdict == UNSURE for v in told)
    apart = _class(counts, odd + unsure)
    together = _class([counts[0] + unsure, *counts[1:]] if counts else [unsure], odd)
    return apart if apart == together else "unclear"


@dataclass(frozen=True)
class ClassCount:
    """One row of the table of semanticity: how many of all heads are of a class."""

    semanticity: str
    n: int
    of: int

    @property
    def share(self) -> float:
        """The class's share of the heads that were judged; NaN where none was."""
        return self.n / self.of if self.of else float("nan")


def semanticity_table(classes: Iterable[str | None]) -> tuple[ClassCount, ...]:
    """The table of mono-, nearly mono- and bisemantic heads: count and share of each class (seed 001).

    Heads that were not judged (None) are in no row and not in the whole.

    >>> table = semanticity_table(["bisemantic", None, "unclear"])
    >>> [(row.semanticity, row.n, row.share) for row in table if row.n]
    [('bisemantic', 1, 0.5), ('unclear', 1, 0.5)]
    """
    counts = Counter(one for one in classes if one is not None)
    of = counts.total()
    return tuple(ClassCount(name, counts[name], of) for name in SEMANTICITY_CLASSES)
