"""How far annotators agree, corrected for chance, and intervals for a share.

The measures and what they allow:

==============================  ==========  ===================  ===============
measure                         annotators  missing judgements   values
==============================  ==========  ===================  ===============
:func:`cohen_kappa`             two         pairs left out       classes
:func:`fleiss_kappa`            any number  none                 classes
:func:`krippendorff_alpha`      any number  allowed              any distance
==============================  ==========  ===================  ===============

All are dimensionless, 1 for agreement without exception, 0 for what chance would give, and may be negative.
NaN means that nothing follows from the judgements: too few, or all of them the same value, where chance
agreement is 1 and the measure is 0/0.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from atlas.errors import ConfigError, one_of

Value = Hashable
Distance = Callable[[Value, Value], float]
Z95 = 1.959963984540054
"""The standard normal's 97.5% point: intervals hold 95%."""


def percent_agreement(units: Iterable[Sequence[Value]]) -> float:
    """The share of pairs of judgements of the same unit that are equal; NaN without any pair.

    >>> percent_agreement([("a", "a"), ("a", "b"), ("c",)])
    0.5
    """
    pairs = [a == b for unit in units for a, b in combinations(unit, 2)]
    return sum(pairs) / len(pairs) if pairs else math.nan


def cohen_kappa(
    a: Sequence[Value], b: Sequence[Value], order: Sequence[Value] | None = None, weights: str = "none"
) -> float:
    r"""Agreement of two annotators who judged the same units, beyond chance (Cohen 1960).

    kappa = 1 - sum_ij w_ij o_ij / sum_ij w_ij e_ij with o_ij the share of units that the first put into
    class i and the second into j, e_ij = p_i q_j from each one's own shares, and w_ij = 1 for i != j;
    ``weights`` of ``linear`` (|i - j|) or ``quadratic`` ((i - j)^2) need the classes in their ``order``
    (Cohen 1968).

    50 grant proposals, 20 + 15 equal, the first says yes to 25, the second to 30: (0.7 - 0.5) / (1 - 0.5):

    >>> yes_no = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    >>> round(cohen_kappa(*zip(*yes_no)), 6)
    0.4
    >>> cohen_kappa(["a", "a"], ["a", "a"])
    nan
    """
    if len(a) != len(b):
        raise ConfigError(f"the annotators judged {len(a)} and {len(b)} units; allowed: as many")
    one_of("weights", weights, ("none", "linear", "quadratic"))
    if weights != "none" and order is None:
        raise ConfigError(f"weights {weights!r} need an order of the classes; allowed: none without one")
    if not len(a):
        return math.nan
    names = list(order) if order is not None else list(dict.fromkeys([*a, *b]))
    place = {name: i for i, name in enumerate(names)}
    for value in (*a, *b):
        one_of("class", value, names)
    table = np.zeros((len(names), len(names)))
    for x, y in zip(a, b, strict=True):
        table[place[x], place[y]] += 1.0
    return _kappa(table / len(a), weights)


def _kappa(observed: NDArray[np.float64], weights: str) -> float:
    steps = np.abs(np.subtract.outer(np.arange(len(observed)), np.arange(len(observed))))
    cost = {
        "none": (steps > 0).astype(float),
        "linear": steps.astype(float),
        "quadratic": steps.astype(float) ** 2,
    }
    expected = np.outer(observed.sum(1), observed.sum(0))
    chance = float((cost[weights] * expected).sum())
    return math.nan if chance == 0 else 1.0 - float((cost[weights] * observed).sum()) / chance


def fleiss_kappa(counts: Sequence[Sequence[int]]) -> float:
    """Agreement of n annotators per unit beyond chance, from how many chose each class (Fleiss 1971).

    ``counts[i][j]``: how many annotators put unit i into class j; each row adds up to the same n > 1. With
    p_j the share of class j among all judgements and P_i = (sum_j c_ij^2 - n) / (n (n - 1)):
    kappa = (mean P_i - sum_j p_j^2) / (1 - sum_j p_j^2).

    Two units, three annotators: P = (1, 1/3), p = (5/6, 1/6), so (2/3 - 26/36) / (10/36) = -0.2:

    >>> round(fleiss_kappa([[3, 0], [2, 1]]), 6)
    -0.2
    """
    if not len(counts):
        return math.nan
    table = np.asarray(counts, dtype=float)
    n = table.sum(1)
    if not (n == n[0]).all() or n[0] < 2:
        sizes = sorted(set(n.astype(int).tolist()))
        raise ConfigError(f"units have {sizes} judgements; allowed: the same number, 2 or more")
    agree = ((table**2).sum(1) - n) / (n * (n - 1))
    chance = float(((table.sum(0) / table.sum()) ** 2).sum())
    return math.nan if chance == 1 else (float(agree.mean()) - chance) / (1 - chance)


def nominal(a: Value, b: Value) -> float:
    """0 for equal values, 1 for others."""
    return float(a != b)


def interval(a: Value, b: Value) -> float:
    """The squared difference of two numbers."""
    return (float(a) - float(b)) ** 2  # type: ignore[arg-type]


def jaccard(a: Value, b: Value) -> float:
    """1 - |a and b| / |a or b| for two sets of words; 0 for two empty ones.

    >>> jaccard(frozenset({"induction", "code"}), frozenset({"induction"}))
    0.5
    """
    if not isinstance(a, frozenset) or not isinstance(b, frozenset):
        raise ConfigError(f"jaccard compares frozensets; got {type(a).__name__} and {type(b).__name__}")
    return 1.0 - len(a & b) / len(a | b) if a | b else 0.0


def ordinal(values: Iterable[Value], order: Sequence[Value]) -> Distance:
    """Krippendorff's distance of ordered classes, from how often each occurs among ``values``.

    delta(c, k) = (sum of n_g for g from c to k - (n_c + n_k) / 2)^2.

    >>> distance = ordinal([1, 1, 2, 3], (1, 2, 3))
    >>> distance(1, 3), distance(1, 2), distance(2, 2)
    (6.25, 2.25, 0.0)
    """
    counts = Counter(values)
    place = {value: i for i, value in enumerate(order)}
    n = [counts[value] for value in order]

    def distance(a: Value, b: Value) -> float:
        low, high = sorted((place[a], place[b]))
        return (sum(n[low : high + 1]) - (n[low] + n[high]) / 2) ** 2 if low != high else 0.0

    return distance


def krippendorff_alpha(units: Iterable[Sequence[Value]], distance: Distance = nominal) -> float:
    """Agreement of any number of annotators, who may have judged some units only (Krippendorff 2011).

    ``units``: the judgements of each unit; a unit with fewer than two is not pairable and left out. With n
    pairable judgements in all, m_u of them in unit u, alpha = 1 - D_o / D_e:
    D_o = 1/n sum_u 1/(m_u - 1) sum_{i != j in u} delta(v_i, v_j),
    D_e = 1/(n (n - 1)) sum_{i != j} delta(v_i, v_j) over all pairable judgements.

    Krippendorff's example of two observers with ten binary judgements (2011, section A), alpha = 0.095:

    >>> a, b = (0, 1, 0, 0, 0, 0, 0, 0, 1, 0), (1, 1, 1, 0, 0, 1, 0, 0, 0, 0)
    >>> round(krippendorff_alpha(zip(a, b)), 3)
    0.095
    """
    pairable = [tuple(unit) for unit in units if len(unit) > 1]
    counts = Counter(value for unit in pairable for value in unit)
    n = counts.total()
    if n == 0:
        return math.nan
    seen = sum(2 * _spread(unit, distance) / (len(unit) - 1) for unit in pairable) / n
    values = list(counts)
    chance = (
        2 * sum(counts[a] * counts[b] * distance(a, b) for a, b in combinations(values, 2)) / (n * (n - 1))
    )
    return math.nan if chance == 0 else 1.0 - seen / chance


def _spread(unit: Sequence[Value], distance: Distance) -> float:
    return math.fsum(distance(a, b) for a, b in combinations(unit, 2))


def disagreement(unit: Sequence[Value], distance: Distance = nominal) -> float:
    """The mean distance of two judgements of one unit; 0 for fewer than two.

    >>> disagreement(("a", "a", "b")), disagreement(("a",))
    (0.6666666666666666, 0.0)
    """
    n = len(unit)
    return _spread(unit, distance) / (n * (n - 1) / 2) if n > 1 else 0.0


def wilson_interval(hits: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share of ``hits`` in ``n`` independent draws; (0, 1) for n = 0.

    centre = (p + z^2/2n) / (1 + z^2/n), half width = z / (1 + z^2/n) sqrt(p (1 - p)/n + z^2/4n^2) (Wilson,
    1927). Dimensionless, always inside [0, 1], and not of zero width for 0 or n hits. With z = 2, n = 4, all
    hits: centre (1 + 1/2) / 2 = 0.75, half width 2/2 * sqrt(1/16) = 0.25:

    >>> wilson_interval(4, 4, z=2)
    (0.5, 1.0)
    >>> tuple(round(x, 4) for x in wilson_interval(8, 10))
    (0.4902, 0.9433)
    """
    if not 0 <= hits <= n:
        raise ConfigError(f"hits {hits} of n {n} is not possible; allowed: 0 to n")
    if n == 0:
        return 0.0, 1.0
    p, scale = hits / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))
