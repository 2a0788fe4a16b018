"""Which examples are kept: the rules against plain loops, with ties and silent features."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.analysis import examples
from atlas.analysis.acts import FeatureActs
from atlas.analysis.examples import GROUPS, Misses
from atlas.kernels.draws import draw
from tests.test_analysis_corpus import (
    CONTEXT,
    D_SAE,
    NOTHING,
    ONCE,
    SILENT,
    acts_of,
    dense_activations,
    firings,
    rows_of,
    strongest,
)  # fmt: skip

NO_MISSES = Misses(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


@pytest.fixture(scope="module", params=[0, 1])
def dense(request):
    return dense_activations(request.param)


@pytest.fixture(scope="module")
def acts(dense):
    return acts_of(dense)


def drawn(acts, seed):
    """Indices and tenths of the examples drawn from tenths."""
    index, code = examples.drawn_examples(acts, seed)
    tenth = code != examples.RANDOM
    return index[tenth], code[tenth] - 1


# ---------------------------------------------------------------- top examples


def expected_top(dense, feature, limit=20):
    kept: list[tuple[int, int, float]] = []
    for row in strongest(firings(dense, feature)):
        if row[0] not in {b for b, _, _ in kept}:
            kept.append(row)
    return kept[:limit]


def occurrences(acts, index):
    columns = (acts.feature[index], acts.block[index], acts.position[index])
    return list(zip(*(c.tolist() for c in columns), strict=True))


def test_top_examples(dense, acts):
    found = occurrences(acts, examples.top_examples(acts))
    expected = [(f, b, p) for f in range(D_SAE) for b, p, _ in expected_top(dense, f)]
    assert found == expected
    counts = [sum(f == n for f, _, _ in found) for n in range(D_SAE)]
    assert counts[SILENT] == 0, "never padded"
    assert counts[ONCE] == 1
    assert max(counts) == 20


def test_top_examples_take_one_per_block_and_the_earlier_of_equals():
    acts = FeatureActs.collect(
        [([0] * 5, [2 * CONTEXT + 4, 2 * CONTEXT + 2, 1 * CONTEXT + 8, 5, 3 * CONTEXT + 1], [2, 2, 2, 1, 5])],
        1,
        CONTEXT,
    )
    assert occurrences(acts, examples.top_examples(acts)) == [(0, 3, 1), (0, 1, 8), (0, 2, 2), (0, 0, 5)]


def test_top_examples_of_a_silent_sae():
    assert len(examples.top_examples(NOTHING)) == 0


# ---------------------------------------------------------------- quantile groups


def rank_from_bottom(dense, feature):
    """{(block, position): (rank from the weakest, number of firings)}."""
    rows = strongest(firings(dense, feature))[::-1]
    return {(b, p): (r, len(rows)) for r, (b, p, _) in enumerate(rows)}


def test_quantile_examples_come_from_their_tenth(dense, acts):
    index, group = drawn(acts, 3)
    found = list(zip(occurrences(acts, index), group.tolist(), strict=True))
    assert len({o for o, _ in found}) == len(found), "no token twice"
    for feature in range(D_SAE):
        places = rank_from_bottom(dense, feature)
        sizes = [0] * 10
        for rank, n in places.values():
            sizes[rank * 10 // n] += 1
        if len(places) >= 10:
            assert max(sizes) - min(sizes) <= 1, "groups of equal count"
        taken = [0] * 10
        for (f, b, p), g in found:
            if f == feature:
                rank, n = places[b, p]
                assert g == rank * 10 // n
                taken[g] += 1
        assert taken == [min(5, s) for s in sizes]


def test_quantile_examples_are_sorted_by_feature_group_and_strength(acts):
    index, group = drawn(acts, 3)
    keys = [
        (f, g, -v, t)
        for f, g, v, t in zip(
            acts.feature[index], group, acts.value[index].tolist(), acts.token[index], strict=True
        )
    ]
    assert keys == sorted(keys)


def test_quantile_examples_depend_on_the_seed_alone(dense, acts):
    block, position, feature = np.nonzero(dense)
    token, value = block * CONTEXT + position, dense[block, position, feature]
    rng = np.random.default_rng(1)
    owner = rng.integers(0, 3, len(token))
    shards = []
    for s in range(3):
        mine = rng.permutation(np.flatnonzero(owner == s))
        shards.append(FeatureActs.collect([(feature[mine], token[mine], value[mine])], D_SAE, CONTEXT))
    other = FeatureActs.merge([shards[2], shards[0], shards[1]])
    for a, b in zip(drawn(acts, 3), drawn(other, 3), strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(drawn(acts, 3)[0], drawn(acts, 4)[0])


def test_draws_are_uniform():
    """A group of 1000 draws 5: over 400 seeds each quarter of it is drawn about 500 times of 2000."""
    n = 10_000
    acts = FeatureActs.collect([(np.zeros(n), np.arange(n), np.linspace(1, 2, n))], 1, CONTEXT)
    found = np.concatenate([drawn(acts, seed)[0][:5] for seed in range(400)])
    assert found.max() < 1000
    counts = np.bincount(found // 250, minlength=4)
    assert counts.sum() == 2000
    assert ((counts - 500) ** 2 / 500).sum() < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001
    assert len(np.unique(found)) > 750  # 865 are expected when each is as likely as the others


def test_quantile_examples_of_a_silent_sae():
    index, group = drawn(NOTHING, 0)
    assert len(index) == len(group) == 0


# ---------------------------------------------------------------- the table of examples


def test_examples_show_the_whole_block(dense, acts):
    rows = rows_of(examples.examples(acts, NO_MISSES, 3))
    for row in rows:
        f, b, p = row["feature"], row["block"], row["position"]
        assert row["activation"] == float(dense[b, p, f]) > 0
        on = [q for q in range(CONTEXT) if dense[b, q, f] > 0]
        assert row["active_positions"] == on
        assert row["active_values"] == [float(dense[b, q, f]) for q in on]


def test_examples_are_the_top_ones_and_the_drawn_ones(dense, acts):
    rows = rows_of(examples.examples(acts, NO_MISSES, 3))
    index, group = drawn(acts, 3)
    expected: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for feature in range(D_SAE):
        for b, p, _ in expected_top(dense, feature):
            expected.setdefault((feature, "top"), []).append((b, p))
    for (f, b, p), g in zip(occurrences(acts, index), group.tolist(), strict=True):
        expected.setdefault((f, f"q{g}"), []).append((b, p))
    index, code = examples.drawn_examples(acts, 3)
    for f, b, p in occurrences(acts, index[code == examples.RANDOM]):
        expected.setdefault((f, "random"), []).append((b, p))
    found: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for row in rows:
        mine = found.setdefault((row["feature"], row["example_group"]), [])
        assert row["rank"] == len(mine), "ranks count from 0 in the order of the rows"
        mine.append((row["block"], row["position"]))
    assert found == expected


def test_examples_of_a_silent_sae():
    assert rows_of(examples.examples(NOTHING, NO_MISSES, 0)) == []


def test_random_examples_are_five_of_all_strongest_first(dense, acts):
    index, code = examples.drawn_examples(acts, seed=3)
    found = occurrences(acts, index[code == examples.RANDOM])
    for feature in range(D_SAE):
        mine = [(b, p) for f, b, p in found if f == feature]
        rows = firings(dense, feature)
        assert len(mine) == len(set(mine)) == min(5, len(rows))
        assert mine == [(b, p) for b, p, _ in strongest(rows) if (b, p) in mine]


def test_random_draws_are_uniform():
    n = 1000
    acts = FeatureActs.collect([(np.zeros(n), np.arange(n), np.linspace(1, 2, n))], 1, CONTEXT)
    found = []
    for seed in range(400):
        index, code = examples.drawn_examples(acts, seed)
        found.append(index[code == examples.RANDOM])
    counts = np.bincount(np.concatenate(found) // 250, minlength=4)
    assert counts.sum() == 2000
    assert ((counts - 500) ** 2 / 500).sum() < 16.3


@pytest.mark.parametrize("at_once", [1, 200])
def test_a_range_of_features_draws_the_same(acts, tmp_path, at_once):
    from atlas.analysis.acts import StoredActs

    acts.save(tmp_path / "acts")
    stored = StoredActs([tmp_path / "acts"])
    parts = []
    for features in stored.ranges(at_once):
        for row in rows_of(examples.examples(stored.read(features), NO_MISSES, 3)):
            parts.append({**row, "feature": row["feature"] + features.start})
    whole = rows_of(examples.examples(acts, NO_MISSES, 3))
    assert [{k: v for k, v in r.items() if k != "near_miss"} for r in parts] == [
        {k: v for k, v in r.items() if k != "near_miss"} for r in whole
    ]


def test_near_misses_are_kept_with_their_block(acts, dense):
    misses = Misses(np.array([2, 2, 5]), np.array([40, 7, 9]), np.array([0.5, -1, -2], np.float32))
    rows = [r for r in rows_of(examples.examples(acts, misses, 3)) if r["example_group"] == "negative"]
    where = [(r["feature"], r["rank"], r["block"], r["position"], r["activation"]) for r in rows]
    assert where == [(2, 0, 4, 4, 0.0), (2, 1, 0, 7, 0.0), (5, 0, 1, 0, 0.0)]
    assert [r["near_miss"] for r in rows] == [0.5, -1, -2]
    for row in rows:
        on = [q for q in range(CONTEXT) if dense[row["block"], q, row["feature"]] > 0]
        assert row["active_positions"] == on


def test_groups_are_in_the_order_of_their_names():
    assert GROUPS.tolist() == sorted(GROUPS.tolist())
    assert GROUPS[[examples.NEGATIVE, examples.RANDOM, examples.TOP]].tolist() == [
        "negative",
        "random",
        "top",
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2**31 - 1),
)
def test_the_smallest_hashes_of_each_part_are_drawn(sizes, parts, k, seed):
    """Against a sort in plain Python, with integers of any size."""
    rng = np.random.default_rng(seed)
    counts = np.array([[0, 3, 17, 400][s] for s in sizes])
    starts = np.concatenate([[0], counts.cumsum()])
    token = rng.permutation(int(starts[-1]))
    strongest = np.concatenate([[], *(rng.permutation(n) + s for n, s in zip(counts, starts, strict=False))])
    strongest, salt = strongest.astype(np.int64), rng.integers(0, 2**63, len(counts)).astype(np.uint64)
    of_part, of_all = np.empty((len(counts), parts, k), np.int64), np.empty((len(counts), k), np.int64)
    drawn = np.empty((len(counts), parts + 1), np.int64)
    draw(starts, strongest, token, salt, of_part, of_all, drawn)
    for f, n in enumerate(counts.tolist()):
        places = range(starts[f], starts[f + 1])
        hashed = {at: _splitmix(int(salt[f]) + int(token[strongest[at]])) for at in places}
        mine = {g: [] for g in range(parts)}
        for at in places:
            mine[parts * (n - 1 - (at - starts[f])) // n].append(at)
        for g, members in mine.items():
            best = sorted(members, key=lambda at: hashed[at] >> 33)[:k]
            assert of_part[f, g, : drawn[f, g]].tolist() == sorted(best)
        best = sorted(places, key=lambda at: hashed[at] & (2**31 - 1))[:k]
        assert of_all[f, : drawn[f, parts]].tolist() == sorted(best)


def _splitmix(x: int) -> int:
    x %= 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31
