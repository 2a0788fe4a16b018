"""Guesses about features: where they hold, and the numbers that follow, against plain counting."""

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas.errors import QueryError
from atlas.store import proxies
from atlas.store.proxies import Counts
from atlas.store.queries.texts import BOS, Texts

PIECES = [["", "The", " cat", " sat", "\n", "The", " catnap"], ["", "a", "b", "a", "ab", ""]]
FLAT = [BOS if place == 0 else piece.encode() for one in PIECES for place, piece in enumerate(one)]
TEXTS = Texts(
    blocks=np.array([3, 8]),
    data=b"".join(FLAT),
    lowered=b"".join(FLAT).lower(),
    starts=np.cumsum([0, *map(len, FLAT)]).astype(np.int32),
    rows=np.cumsum([0, *map(len, PIECES)]),
    complete=True,
)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("The", {3: {1, 5}, 8: set()}),
        (" cat", {3: {2, 6}, 8: set()}),
        (r"\bcat\b", {3: {2}, 8: set()}),
        (r"The(?= catnap)", {3: {5}, 8: set()}),
        (r"(?<=b)a", {3: set(), 8: {3}}),
        ("ab", {3: set(), 8: {2, 4}}),
        ("t sat", {3: {3}, 8: set()}),
        ("^", {3: set(), 8: set()}),
        (r"(?i)THE", {3: {1, 5}, 8: set()}),
    ],
)
def test_a_pattern_holds_at_the_token_in_which_a_match_ends(pattern, expected):
    found = proxies.pattern_truth(TEXTS, pattern, [3, 8, 99], seconds=60)
    assert {block: set(positions) for block, positions in found.items()} == expected


def test_only_the_blocks_that_are_asked_for():
    assert set(proxies.pattern_truth(TEXTS, "a", [8], seconds=60)) == {8}


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("(", "cannot be read"), ("", "has 0 characters"), ("x" * 2001, "allowed: 1 to 2,000")],
)
def test_patterns_that_are_refused(pattern, said):
    with pytest.raises(QueryError, match=said):
        proxies.pattern_truth(TEXTS, pattern, [3])


def test_a_pattern_that_never_ends_is_stopped():
    long = "a" * 4000 + "!"
    data = BOS + long.encode()
    texts = Texts(np.array([0]), data, data, np.array([0, 1, len(data)], np.int32), np.array([0, 2]), True)
    with pytest.raises(QueryError, match=r"takes longer than 0.05 seconds"):
        proxies.pattern_truth(texts, r"(a+)+$", [0], seconds=0.05)


def sql_truth(predicate, blocks):
    con = duckdb.connect()
    words = sorted({piece for block in PIECES for piece in block})
    vocab = pa.table({"model": ["m"] * len(words), "token": range(len(words)), "text": words})
    tokens = [[words.index(piece) for piece in block] for block in PIECES]
    docs = pa.table({"block": [3, 8], "tokens": tokens, "source": ["one", "two"]})
    con.register("vocab", vocab)
    con.register("docs", docs)
    return proxies.rows_truth(con.sql(proxies.predicate_sql(predicate, blocks)).fetchall(), blocks)


@pytest.mark.parametrize(
    ("predicate", "expected"),
    [
        ("token = 'The'", {3: {1, 5}, 8: set()}),
        ("previous = 'a' AND next = 'a'", {3: set(), 8: {2}}),
        ("position % 2 = 0 -- even", {3: {2, 4, 6}, 8: {2, 4}}),
        ("source = 'two' OR block = 3 AND token LIKE ' cat%'", {3: {2, 6}, 8: {1, 2, 3, 4, 5}}),
    ],
)
def test_a_condition_holds_where_sql_says(predicate, expected):
    found = sql_truth(predicate, [3, 8])
    assert {block: set(positions) for block, positions in found.items()} == expected


def test_an_empty_condition_is_refused():
    with pytest.raises(QueryError, match="the condition is empty"):
        proxies.predicate_sql("  ", [1])


FIRINGS = st.lists(st.tuples(st.floats(0.01, 100), st.booleans()), max_size=60)


@given(FIRINGS, st.integers(1, 12))
def test_bins_hold_every_firing_once(firings, bins):
    found = proxies.by_activation(firings, bins)
    whole = proxies.count(firings)
    assert sum(b.counts.n_fires for b in found) == whole.n_fires
    assert sum(b.counts.n_both for b in found) == whole.n_both
    assert sum(b.counts.mass for b in found) == pytest.approx(whole.mass)
    for low, high in [(b.low, b.high) for b in found if b.counts.n_fires]:
        inside = [v for v, _ in firings if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        assert inside


@given(FIRINGS)
def test_counts_against_numpy(firings):
    found = proxies.count(firings)
    values, holds = np.array([v for v, _ in firings]), np.array([h for _, h in firings], bool)
    assert found.n_both == holds.sum()
    if firings:
        assert found.precision == pytest.approx(holds.mean())
        assert found.mass_share == pytest.approx(values[holds].sum() / values.sum())
    else:
        assert found.precision is None
        assert found.mass_share is None


def test_tenths_estimate_what_the_whole_says():
    """Where every tenth is sampled in full, the estimate is the exact precision and mass share."""
    random = np.random.default_rng(0)
    values = np.sort(random.exponential(size=200))
    holds = random.random(200) < values / values.max()
    edges = np.quantile(values, np.linspace(0, 1, 11)).tolist()
    samples = {t: list(zip(values[20 * t : 20 * t + 20].tolist(), holds[20 * t : 20 * t + 20].tolist(),
                           strict=True)) for t in range(10)}  # fmt: skip
    precision, mass = proxies.over_tenths(proxies.by_tenth(samples, edges))
    assert precision == pytest.approx(holds.mean())
    assert mass == pytest.approx(values[holds].sum() / values.sum())
    assert proxies.over_tenths([]) == (None, None)


def test_whole_text_against_a_loop():
    random = np.random.default_rng(1)
    length, blocks = 20, range(5)
    acts = random.random((5, length)) * (random.random((5, length)) < 0.3)
    holds = random.random((5, length)) < 0.4
    active = {b: [(p, float(acts[b, p])) for p in range(1, length) if acts[b, p] > 0] for b in blocks}
    truth = {b: frozenset(np.flatnonzero(holds[b]).tolist()) for b in blocks}
    found = proxies.counts_of_text(active, dict.fromkeys(blocks, length), truth)
    fires, true = acts[:, 1:] > 0, holds[:, 1:]
    assert found.n_tokens == fires.size
    assert (found.n_fires, found.n_true) == (fires.sum(), true.sum())
    assert found.sensitivity == pytest.approx((fires & true).sum() / true.sum())
    assert found.precision == pytest.approx((fires & true).sum() / fires.sum())
    assert found.base_rate == pytest.approx(true.mean())


def test_wilson_against_its_definition():
    """Its bounds are the shares p at which |k/n - p| is 1.96 standard errors of p."""
    for k, n in ((1, 5), (7, 9), (40, 200)):
        for bound in proxies.wilson(k, n):
            assert abs(k / n - bound) == pytest.approx(proxies.Z * np.sqrt(bound * (1 - bound) / n))


def test_nothing_is_known_of_silent_tokens_from_firings_alone():
    assert Counts(3, 1, 2.0, 1.0).sensitivity is None
    assert Counts(3, 1, 2.0, 1.0).base_rate is None
