"""Does a feature fire on what one thinks it does? A guess (a proxy) measured against its activations.

A proxy says of every token of the text whether the guess holds there. Of the tokens on which a feature fires
and those on which the proxy holds,

    precision     = tokens with both / tokens on which it fires
    sensitivity   = tokens with both / tokens on which the proxy holds
    specificity   at an activation: the share of the tokens with about this activation on which it holds
    mass          = sum of activations where it holds / sum of activations        (expected value)

The specificity and expected-value plots draw the last two by activation. False positives fire where the
proxy does not hold, false negatives are silent where it does. Source: seed 002 (the paper), row C3, after
Bricken et al. 2023, "Towards Monosemanticity".
"""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import regex

from atlas.errors import QueryError
from atlas.store.queries.texts import Texts

Truth = Mapping[int, frozenset[int]]
"""By block, the positions at which a proxy holds."""
MOST_PATTERN = 2_000
SECONDS = 3.0
"""How long a regular expression may search."""
Z = 1.959964
"""Normal quantile of a 95 % interval."""


@dataclass(frozen=True)
class Counts:
    """Tokens and activation of a feature, split by whether a proxy holds."""

    n_fires: int = 0
    n_both: int = 0
    mass: float = 0.0
    mass_both: float = 0.0
    n_tokens: int | None = None
    """Tokens looked at, whether it fires or not; None where only firing tokens are known."""
    n_true: int | None = None
    """Tokens on which the proxy holds; None likewise."""

    @property
    def precision(self) -> float | None:
        """Share of the firing tokens on which the proxy holds.

        >>> Counts(n_fires=4, n_both=3).precision
        0.75
        """
        return self.n_both / self.n_fires if self.n_fires else None

    @property
    def sensitivity(self) -> float | None:
        """Share of the tokens on which the proxy holds that the feature fires on; None where unknown.

        >>> Counts(n_fires=4, n_both=3, n_tokens=100, n_true=12).sensitivity
        0.25
        """
        return self.n_both / self.n_true if self.n_true else None

    @property
    def mass_share(self) -> float | None:
        """Share of the summed activation that lies where the proxy holds (expected value).

        >>> Counts(n_fires=2, n_both=1, mass=4.0, mass_both=3.0).mass_share
        0.75
        """
        return self.mass_both / self.mass if self.mass > 0 else None

    @property
    def base_rate(self) -> float | None:
        """Share of all tokens on which the proxy holds."""
        return None if self.n_true is None or not self.n_tokens else self.n_true / self.n_tokens


@dataclass(frozen=True)
class Bin:
    """Firing tokens whose activation lies in [low, high): how many, and how many where the proxy holds."""

    low: float
    high: float
    counts: Counts

    @property
    def interval(self) -> tuple[float, float]:
        """A 95 % interval (Wilson) of the specificity."""
        return wilson(self.counts.n_both, self.counts.n_fires)


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of k in n; everything is possible where n is 0.

    >>> [round(bound, 3) for bound in wilson(5, 5)], wilson(0, 0)
    ([0.566, 1.0], (0.0, 1.0))
    """
    if n == 0:
        return 0.0, 1.0
    share, extra = k / n, Z * Z / n
    middle = (share + extra / 2) / (1 + extra)
    reach = Z * sqrt(share * (1 - share) / n + extra / (4 * n)) / (1 + extra)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def count(firings: Iterable[tuple[float, bool]]) -> Counts:
    """Counts of firing tokens, each with its activation and whether the proxy holds.

    >>> count([(2.0, True), (1.0, False)])
    Counts(n_fires=2, n_both=1, mass=3.0, mass_both=2.0, n_tokens=None, n_true=None)
    """
    known = list(firings)
    both = [value for value, holds in known if holds]
    return Counts(len(known), len(both), float(sum(value for value, _ in known)), float(sum(both)))


def by_activation(firings: Sequence[tuple[float, bool]], bins: int = 10) -> list[Bin]:
    """Firing tokens in bins of equal width from 0 to the largest activation; the last one is closed.

    >>> [(b.low, b.high, b.counts.n_fires, b.counts.n_both)
    ...  for b in by_activation([(1.0, False), (3.0, True), (4.0, True)], 2)]
    [(0.0, 2.0, 1, 0), (2.0, 4.0, 2, 2)]
    """
    if not firings:
        return []
    top = max(value for value, _ in firings)
    width = top / bins
    held: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for value, holds in firings:
        held[min(bins - 1, int(value / width))].append((value, holds))
    return [Bin(i * width, (i + 1) * width, count(some)) for i, some in enumerate(held)]


def by_tenth(samples: Mapping[int, Sequence[tuple[float, bool]]], edges: Sequence[float]) -> list[Bin]:
    """Examples drawn from each tenth of the firing tokens (0 the weakest), with the tenths' edges.

    >>> bins = by_tenth({9: [(4.0, True), (3.5, False)]}, [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4])
    >>> (bins[0].low, bins[0].high, bins[0].counts.precision)
    (3, 4, 0.5)
    """
    return [
        Bin(edges[tenth], edges[tenth + 1], count(some)) for tenth, some in sorted(samples.items()) if some
    ]


def over_tenths(bins: Sequence[Bin]) -> tuple[float | None, float | None]:
    """Precision and mass share estimated from samples of tenths: each tenth holds as many firing tokens.

    Precision is the mean of the tenths' shares; mass is weighted by the tenths' mean activations.

    >>> weak = Bin(0, 1, Counts(2, 0, 1.0, 0.0)); strong = Bin(1, 4, Counts(2, 2, 7.0, 7.0))
    >>> over_tenths([weak, strong])
    (0.5, 0.875)
    """
    used = [one.counts for one in bins if one.counts.n_fires]
    if not used:
        return None, None
    precision = sum(c.n_both / c.n_fires for c in used) / len(used)
    mass = sum(c.mass / c.n_fires for c in used)
    both = sum(c.mass_both / c.n_fires for c in used)
    return precision, both / mass if mass > 0 else None


def pattern_truth(texts: Texts, pattern: str, blocks: Collection[int], seconds: float = SECONDS) -> Truth:
    """Where a regular expression holds: at the token that holds the last character of a match.

    Matches do not overlap; the expression sees a whole block without BOS, so it may look back and ahead.
    Empty matches count for nothing. QueryError for one that does not parse, or that takes longer than
    ``seconds``.
    """
    if not 0 < len(pattern) <= MOST_PATTERN:
        raise QueryError(f"the expression has {len(pattern)} characters; allowed: 1 to {MOST_PATTERN:,}")
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise QueryError(f"the expression cannot be read: {error}") from None
    wanted = set(blocks)
    found: dict[int, frozenset[int]] = {}
    rows = [row for row, block in enumerate(texts.blocks.tolist()) if block in wanted]
    end = time.monotonic() + seconds
    for row in rows:
        try:
            left = max(1e-3, end - time.monotonic())
            spans = [m.span() for m in compiled.finditer(texts.text(row), timeout=left)]
        except TimeoutError:
            raise QueryError(
                f"the expression takes longer than {seconds:g} seconds on this text; make it simpler"
            ) from None
        held = texts.positions(row, [last - 1 for first, last in spans if last > first])
        found[int(texts.blocks[row])] = frozenset(held)
    return found


def predicate_sql(predicate: str, blocks: Collection[int]) -> str:
    """The query that gives block and position of the tokens on which a SQL condition holds.

    The condition may name token, previous, next (visible text), position, block and source. For the sandbox:
    what is written here is somebody's own SQL.
    """
    if not predicate.strip():
        raise QueryError("the condition is empty; allowed: a SQL condition such as token = '·the'")
    listed = ", ".join(str(int(block)) for block in sorted(blocks)) or "NULL"
    return f"""WITH tokens AS (
    SELECT d.block, d.i - 1 AS position, v.text AS token, d.source
    FROM (SELECT block, source, unnest(tokens) AS id, generate_subscripts(tokens, 1) AS i
          FROM docs WHERE block IN ({listed})) d JOIN vocab v ON v.token = d.id
), text AS (
    SELECT *, lag(token) OVER w AS previous, lead(token) OVER w AS next FROM tokens
    WINDOW w AS (PARTITION BY block ORDER BY position)
)
SELECT block, position FROM text WHERE position > 0 AND (
{predicate}
)"""  # noqa: S608


def rows_truth(rows: Iterable[tuple[int, int]], blocks: Collection[int]) -> Truth:
    """Truth from the rows that :func:`predicate_sql` gives."""
    found: dict[int, set[int]] = {block: set() for block in blocks}
    for block, position in rows:
        found.setdefault(block, set()).add(position)
    return {block: frozenset(positions) for block, positions in found.items()}


def counts_of_text(
    active: Mapping[int, Sequence[tuple[int, float]]], lengths: Mapping[int, int], truth: Truth
) -> Counts:
    """Counts over whole blocks, BOS left out: ``active`` lists (position, activation) of each block.

    >>> counts_of_text({7: [(1, 2.0), (3, 1.0)]}, {7: 5}, {7: frozenset({1, 2})})
    Counts(n_fires=2, n_both=1, mass=3.0, mass_both=2.0, n_tokens=4, n_true=2)
    """
    known = count(
        (value, position in truth[block]) for block, some in active.items() for position, value in some
    )
    n_tokens = sum(length - 1 for length in lengths.values())
    n_true = sum(len(truth[block] - {0}) for block in lengths)
    return Counts(known.n_fires, known.n_both, known.mass, known.mass_both, n_tokens, n_true)
