"""Which features fire together, against a dense float64 count of every pair."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.analysis import coactivation as module
from atlas.analysis.acts import FeatureActs
from atlas.analysis.coactivation import by_token, coactivation, partners, products
from atlas.errors import StoreError

CONTEXT = 5


def acts_of(dense: np.ndarray) -> FeatureActs:
    """From activations [tokens, d_sae] of blocks whose position 0 is left out."""
    token, feature = np.nonzero(dense)
    occurrence = token // (CONTEXT - 1) * CONTEXT + token % (CONTEXT - 1) + 1
    return FeatureActs.collect([(feature, occurrence, dense[token, feature])], dense.shape[1], CONTEXT)


def expected_rows(dense: np.ndarray, n: int = 10) -> list[tuple]:
    """(feature, rank, other, n_both, jaccard, pearson, pmi) by counting every pair of columns."""
    wide = dense.astype(np.float64)
    fires, n_tokens, rows = wide > 0, len(wide), []
    for f in range(wide.shape[1]):
        found = []
        for g in range(wide.shape[1]):
            both = int((fires[:, f] & fires[:, g]).sum())
            if g != f and both >= 2:
                either = int((fires[:, f] | fires[:, g]).sum())
                found.append((-both / either, -both, g))
        for rank, (jaccard, both, g) in enumerate(sorted(found)[:n]):
            varies = np.ptp(wide[:, f]) > 0 and np.ptp(wide[:, g]) > 0
            pearson = np.corrcoef(wide[:, f], wide[:, g])[0, 1] if varies else math.nan
            pmi = math.log(-both * n_tokens / (fires[:, f].sum() * fires[:, g].sum()))
            rows.append((f, rank, g, -both, -jaccard, pearson, pmi))
    return rows


def check(dense: np.ndarray) -> None:
    found, expected = coactivation(acts_of(dense), len(dense)), expected_rows(dense)
    assert found["n_tokens"] == len(dense)
    names = ("feature", "rank", "other", "n_both")
    got = list(zip(*(found[name].tolist() for name in names), strict=True))
    assert got == [row[:4] for row in expected]
    for i, name in enumerate(("jaccard", "pearson", "pmi"), 4):
        np.testing.assert_allclose(found[name], [row[i] for row in expected], rtol=1e-9, atol=1e-9)


def random_acts(n_tokens: int, frequencies: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    fires = rng.random((n_tokens, len(frequencies))) < frequencies
    return np.where(fires, rng.exponential(1.0, fires.shape), 0).astype(np.float32)


def test_rows_are_those_of_a_dense_count():
    """Silent features, dense ones, one that fires on every token, and very different token lengths."""
    frequencies = np.array([0, 0.01, 0.05, 0.9, 1, *np.linspace(0.02, 0.6, 35)])
    check(random_acts(400, frequencies, seed=0))


def test_tokens_with_very_different_numbers_of_features():
    """From none to all 90."""
    dense = random_acts(120, np.full(90, 0.5), seed=1)
    dense[:40] *= random_acts(40, np.full(90, 0.1), seed=2) > 0
    dense[40], dense[41] = 1, 0
    assert np.diff(by_token(acts_of(dense)).starts).max() == 90
    check(dense)


def test_more_features_than_two_bytes_number():
    """Feature numbers up to 69,999, where 16 bits would count feature 65,536 as feature 0."""
    d_sae = 70_000
    feature = [0, 0, 65_535, 65_535, 65_536, 65_536, 69_999]
    token = [1, 2, 2, 3, 1, 2, 1]
    acts = FeatureActs.collect([(feature, token, np.ones(7))], d_sae, CONTEXT)
    found = partners(acts, by_token(acts))
    assert found.feature.tolist() == [0, 65_536]
    assert found.other.tolist() == [65_536, 0]
    assert found.n_both.tolist() == [2, 2]


@pytest.mark.parametrize("step", [1, 1 << 16, 1 << 31, 1 << 40])
def test_token_numbers_of_any_size_are_sorted(step):
    keys = np.random.default_rng(0).integers(0, 50, 300) * step + np.arange(300) % 3
    assert module._stable_order(keys).tolist() == sorted(range(300), key=lambda i: keys[i])


def test_equal_jaccard_indices_come_by_count_then_by_number():
    """Features 1 and 2 fire as 0 does but for other tokens: 2/4; 3 and 4 twice as often: 4/8."""
    fires = {
        0: [0, 1, 2, 3],
        1: [0, 1],
        2: [2, 3],
        3: [0, 1, 2, 3, 4, 5, 6, 7],
        4: [0, 1, 2, 3, 8, 9, 10, 11],
    }
    dense = np.zeros((12, 5), np.float32)
    for feature, tokens in fires.items():
        dense[tokens, feature] = 1
    found = coactivation(acts_of(dense), 12)
    mine = found["feature"] == 0
    assert found["jaccard"][mine].tolist() == [0.5] * 4
    assert found["n_both"][mine].tolist() == [4, 4, 2, 2]
    assert found["other"][mine].tolist() == [3, 4, 1, 2]
    check(dense)


def test_ties_at_the_last_place_go_to_lower_numbers():
    dense = np.ones((6, 30), np.float32)
    acts = acts_of(dense)
    found = partners(acts, by_token(acts))
    assert found.other[found.feature == 0].tolist() == list(range(1, 11))
    assert found.other[found.feature == 29].tolist() == list(range(10))
    check(dense)


def test_features_that_met_once_are_no_partners():
    dense = np.zeros((8, 3), np.float32)
    dense[[0, 1], 0], dense[[1, 2], 1], dense[[0, 1], 2] = 1, 1, 1
    acts = acts_of(dense)
    found = partners(acts, by_token(acts))
    assert list(zip(found.feature.tolist(), found.other.tolist(), strict=True)) == [(0, 2), (2, 0)]


def test_pearson_of_what_does_not_vary_is_not_a_number():
    """Feature 0 fires on every token with the same value; 0.3 has no exact sum."""
    dense = random_acts(2000, np.full(3, 0.5), seed=3)
    dense[:, 0] = 0.3
    found = coactivation(acts_of(dense), len(dense))
    of_constant = (found["feature"] == 0) | (found["other"] == 0)
    assert of_constant.sum() == 4
    assert np.isnan(found["pearson"]).tolist() == of_constant.tolist()


def test_pearson_and_pmi_are_the_same_both_ways_round():
    found = coactivation(acts_of(random_acts(300, np.linspace(0.2, 0.9, 9), seed=4)), 300)
    rows = {
        (f, g): (p, m)
        for f, g, p, m in zip(
            *(found[c].tolist() for c in ("feature", "other", "pearson", "pmi")), strict=True
        )
    }
    assert len(rows) == 72
    assert all(rows[g, f] == row for (f, g), row in rows.items())


def test_products_are_sums_over_shared_tokens():
    dense = random_acts(200, np.array([0.5, 0.5, 0.02, 0.9, 0]), seed=5)
    acts = acts_of(dense)
    one, other = (a.ravel() for a in np.indices((5, 5)))
    found = products(acts, by_token(acts), one, other)
    wide = dense.astype(np.float64)
    np.testing.assert_allclose(found, (wide.T @ wide).ravel(), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_text_in_parts_gives_the_same_rows(data):
    """Few tokens and features, so that ties are common; any cut into blocks, merged in any order."""
    n_blocks, d_sae = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 13))
    size = n_blocks * (CONTEXT - 1)
    values = st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0])
    cells = data.draw(st.lists(values, min_size=size * d_sae, max_size=size * d_sae))
    dense = np.array(cells, np.float32).reshape(size, d_sae)
    check(dense)
    whole = acts_of(dense)
    owner = np.array(data.draw(st.lists(st.integers(0, 2), min_size=n_blocks, max_size=n_blocks)))
    parts = []
    for part in data.draw(st.permutations(range(3))):
        mine = owner[whole.block] == part
        parts.append(
            FeatureActs.collect([(whole.feature[mine], whole.token[mine], whole.value[mine])], d_sae, CONTEXT)
        )
    merged, once = (coactivation(acts, size) for acts in (FeatureActs.merge(parts), whole))
    for name, column in once.items():
        assert np.array_equal(merged[name], column, equal_nan=name not in ("feature", "n_tokens")), name


@pytest.mark.parametrize("d_sae", [0, 4])
def test_no_activation_at_all(d_sae):
    found = coactivation(FeatureActs.collect([], d_sae, CONTEXT), 0)
    assert [len(column) for name, column in found.items() if name != "n_tokens"] == [0] * 7


def test_fewer_tokens_than_a_feature_fires_on_are_refused():
    with pytest.raises(StoreError, match=r"n_tokens 3 .* 4 tokens"):
        coactivation(acts_of(np.ones((4, 2), np.float32)), 3)
