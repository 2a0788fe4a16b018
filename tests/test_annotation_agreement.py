"""Measures of agreement and classes of semanticity against published values and brute force."""

import math
from collections import Counter
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas.agreement import (
    cohen_kappa,
    disagreement,
    fleiss_kappa,
    interval,
    jaccard,
    krippendorff_alpha,
    ordinal,
    percent_agreement,
    wilson_interval,
)
from atlas.db.models import SEMANTICITY
from atlas.errors import ConfigError
from atlas.judging import SEMANTICITY_CLASSES, FeatureVerdict, group_counts, semanticity, semanticity_table

# Krippendorff (2011), section C: four observers, twelve units, some of them missing.
FOUR = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)
UNITS = [tuple(v for v in unit if v is not None) for unit in zip(*FOUR, strict=True)]
# Fleiss (1971) as in the standard worked example: ten subjects, fourteen raters, five classes.
FLEISS = (
    (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
)  # fmt: skip


def test_alpha_is_the_published_one_for_every_kind_of_value():
    values = [v for unit in UNITS if len(unit) > 1 for v in unit]
    assert krippendorff_alpha(UNITS) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(UNITS, ordinal(values, (1, 2, 3, 4, 5))) == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha(UNITS, interval) == pytest.approx(0.849, abs=5e-4)


def test_fleiss_kappa_is_the_published_one():
    assert fleiss_kappa(FLEISS) == pytest.approx(0.210, abs=5e-4)


def test_alpha_follows_the_definition_by_coincidences():
    """The coincidence matrix of Krippendorff (2011), filled pair by pair."""
    pairable = [unit for unit in UNITS if len(unit) > 1]
    coincidences = Counter()
    for unit in pairable:
        for a, b in permutations(range(len(unit)), 2):
            coincidences[unit[a], unit[b]] += 1 / (len(unit) - 1)
    totals = Counter()
    for (a, _), value in coincidences.items():
        totals[a] += value
    n = sum(totals.values())
    seen = sum(v * (a - b) ** 2 for (a, b), v in coincidences.items())
    chance = sum(totals[a] * totals[b] * (a - b) ** 2 for a, b in product(totals, totals)) / (n - 1)
    assert krippendorff_alpha(UNITS, interval) == pytest.approx(1 - seen / chance, rel=1e-12)


CLASSES = st.sampled_from("abc")


@given(st.lists(st.tuples(CLASSES, CLASSES), min_size=1, max_size=30))
def test_kappas_of_two_annotators_relate_as_they_must(pairs):
    a, b = zip(*pairs, strict=True)
    kappa = cohen_kappa(a, b)
    same = sum(x == y for x, y in pairs) / len(pairs)
    chance = sum(a.count(c) * b.count(c) for c in "abc") / len(pairs) ** 2
    if chance == 1:
        assert math.isnan(kappa)
    else:
        assert kappa == pytest.approx((same - chance) / (1 - chance), abs=1e-12)
        assert cohen_kappa(b, a) == pytest.approx(kappa, abs=1e-12)
        assert cohen_kappa(a, b, "abc", "linear") <= 1
    fleiss = fleiss_kappa([[pair.count(c) for c in "abc"] for pair in pairs])
    alpha = krippendorff_alpha(pairs)
    n = 2 * len(pairs)
    if not math.isnan(fleiss):  # alpha is Fleiss' (Scott's) kappa with chance drawn without replacement
        assert alpha == pytest.approx(fleiss + (1 - fleiss) / n, abs=1e-12)
    assert percent_agreement(pairs) == pytest.approx(same)


def test_weights_of_cohens_kappa():
    a, b = [1, 2, 3, 3], [1, 3, 3, 1]
    o = [[1, 0, 0], [0, 0, 1], [1, 0, 1]]
    p, q = [1, 1, 2], [2, 0, 2]
    for name, cost in (("linear", lambda d: d), ("quadratic", lambda d: d * d)):
        seen = sum(cost(abs(i - j)) * o[i][j] / 4 for i in range(3) for j in range(3))
        chance = sum(cost(abs(i - j)) * p[i] * q[j] / 16 for i in range(3) for j in range(3))
        assert cohen_kappa(a, b, (1, 2, 3), name) == pytest.approx(1 - seen / chance)


def test_missing_and_single_judgements():
    assert math.isnan(krippendorff_alpha([("a",), ()]))
    assert math.isnan(krippendorff_alpha([("a", "a"), ("a", "a", "a")]))
    assert math.isnan(cohen_kappa([], []))
    assert math.isnan(fleiss_kappa([]))
    assert math.isnan(percent_agreement([("a",)]))
    with_single = [("a", "b"), ("a", "a"), ("b",)]
    assert krippendorff_alpha(with_single) == krippendorff_alpha(with_single[:2])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: cohen_kappa(["a"], ["a", "b"]), "judged 1 and 2 units"),
        (lambda: cohen_kappa(["a"], ["b"], weights="linear"), "need an order"),
        (lambda: cohen_kappa(["a"], ["b"], weights="cubic"), "weights 'cubic' is not known"),
        (lambda: cohen_kappa(["a"], ["z"], "ab"), "class 'z' is not known; allowed: a, b"),
        (lambda: fleiss_kappa([[1, 1], [3, 0]]), r"units have \[2, 3\] judgements"),
        (lambda: fleiss_kappa([[1, 0]]), r"units have \[1\] judgements"),
        (lambda: wilson_interval(3, 2), "hits 3 of n 2 is not possible"),
        (lambda: jaccard({"a"}, frozenset()), "compares frozensets"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ConfigError, match=said):
        call()


def test_sets_of_words():
    a, b, none = frozenset("xy"), frozenset("yz"), frozenset()
    assert jaccard(a, b) == pytest.approx(2 / 3)
    assert jaccard(none, none) == 0
    assert disagreement((a, a, b), jaccard) == pytest.approx(2 / 3 * 2 / 3)


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_is_where_the_score_test_turns(n, share):
    hits = round(share * n)
    low, high = wilson_interval(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    for p in (low, high):
        if 0 < p < 1 and p not in (0.0, 1.0):
            z = (hits / n - p) / math.sqrt(p * (1 - p) / n)
            assert abs(z) == pytest.approx(1.959964, rel=1e-3, abs=1e-3) or hits in (0, n)


def test_wilson_published_and_empty():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe (1998), table I
    assert wilson_interval(0, 0) == (0.0, 1.0)


def told(*groups, odd=0, unsure=0):
    verdicts = [FeatureVerdict("s", i, "group", g) for i, g in enumerate(groups)]
    verdicts += [FeatureVerdict("s", 100 + i, "odd") for i in range(odd)]
    return verdicts + [FeatureVerdict("s", 200 + i, "unsure") for i in range(unsure)]


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (told(*"a" * 10), "monosemantic"),
        (told(*"a" * 9, odd=1), "nearly_monosemantic"),
        (told(*"a" * 8, odd=2), "nearly_monosemantic"),
        (told(*"a" * 8, *"bc"), "nearly_monosemantic"),
        (told(*"a" * 7, odd=3), "polysemantic"),
        (told(*"a" * 7, *"bbb"), "bisemantic"),
        (told(*"a" * 5, *"b" * 5), "bisemantic"),
        (told(*"a" * 5, *"b" * 4, odd=1), "polysemantic"),
        (told(*"a" * 4, *"b" * 3, *"c" * 3), "polysemantic"),
        (told(odd=10), "polysemantic"),
        (told(*"a" * 8, unsure=2), "unclear"),
        (told(*"a" * 8, odd=1, unsure=1), "nearly_monosemantic"),
        (told(*"a" * 7, odd=2, unsure=1), "unclear"),
        (told(*"a" * 3, *"b" * 3, *"c" * 3, unsure=1), "polysemantic"),
        (told(unsure=10), "unclear"),
        ([], None),
        (told("a", "a"), "monosemantic"),
        (told("a", "b", "b"), "nearly_monosemantic"),
    ],
)
def test_class_of_semanticity(verdicts, expected):
    assert semanticity(verdicts) == expected
    assert semanticity(verdicts[::-1]) == expected


def test_merged_words_count_as_one():
    verdicts = told(*["bigram"] * 6, *["bigrams"] * 4)
    assert semanticity(verdicts) == "bisemantic"
    assert semanticity(verdicts, {"bigrams": "bigram"}) == "monosemantic"
    assert group_counts(verdicts) == (("bigram", 6), ("bigrams", 4))


def test_table_has_the_seeds_shares():
    """14, 8 and 4 of 144 heads: 9.7%, 5.5% (5.56) and 2.7% (2.78) (seed 001)."""
    heads = ["monosemantic"] * 14 + ["nearly_monosemantic"] * 8 + ["bisemantic"] * 4 + ["polysemantic"] * 118
    shares = {row.semanticity: row.share for row in semanticity_table([*heads, None])}
    assert [round(100 * s, 1) for s in shares.values()] == [9.7, 5.6, 2.8, 81.9, 0.0]
    assert tuple(shares) == SEMANTICITY == SEMANTICITY_CLASSES
    assert all(math.isnan(row.share) for row in semanticity_table([None]))
