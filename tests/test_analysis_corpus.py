"""Every corpus summary against plain loops over a dense array, with ties, silent features and no text."""

import numpy as np
import pytest

from atlas.analysis import corpus
from atlas.analysis.acts import FeatureActs

BLOCKS, CONTEXT, D_SAE, D_VOCAB = 60, 9, 6, 7
SILENT, ONCE, RARE = 0, 1, 2


def dense_activations(seed: int) -> np.ndarray:
    """[block, position, feature]: few distinct values (ties), a silent, a single and a rare feature."""
    rng = np.random.default_rng(seed)
    levels = np.array([0.25, 0.5, 0.75, 1.0, 3.0], np.float32)
    dense = rng.choice(levels, (BLOCKS, CONTEXT, D_SAE)) * (rng.random((BLOCKS, CONTEXT, D_SAE)) < 0.4)
    dense[..., 5] = rng.random((BLOCKS, CONTEXT)) + 0.01  # dense and without ties
    dense[..., SILENT] = dense[..., ONCE] = 0
    dense[7, 3, ONCE] = 0.6
    dense[3:, :, RARE] = 0
    dense[:, 0] = 0  # position 0 is never evaluated
    return dense.astype(np.float32)


def acts_of(dense: np.ndarray) -> FeatureActs:
    block, position, feature = np.nonzero(dense)
    token = block * dense.shape[1] + position
    return FeatureActs.collect([(feature, token, dense[block, position, feature])], dense.shape[2], CONTEXT)


def firings(dense: np.ndarray, feature: int) -> list[tuple[int, int, float]]:
    """(block, position, activation) in reading order."""
    blocks, context, _ = dense.shape
    return [
        (b, p, float(dense[b, p, feature]))
        for b in range(blocks)
        for p in range(context)
        if dense[b, p, feature] > 0
    ]


def strongest(rows: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    return sorted(rows, key=lambda r: (-r[2], r[0], r[1]))


def rows_of(columns) -> list[dict]:
    lists = {k: (v.tolist() if isinstance(v, np.ndarray) else v.to_pylist()) for k, v in columns.items()}
    lengths = {len(v) for v in lists.values()}
    assert len(lengths) == 1
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


@pytest.fixture(scope="module", params=[0, 1])
def dense(request):
    return dense_activations(request.param)


@pytest.fixture(scope="module")
def acts(dense):
    return acts_of(dense)


@pytest.fixture(scope="module")
def text():
    tokens = np.random.default_rng(9).integers(1, D_VOCAB - 1, (BLOCKS, CONTEXT))  # token 6 never occurs
    tokens[:, 0] = 0
    return corpus.Text(tokens.astype(np.int64), D_VOCAB)


NOTHING = FeatureActs.collect([], 3, CONTEXT)


# ---------------------------------------------------------------- features


def test_feature_statistics(dense, acts, text):
    rows = rows_of(corpus.feature_statistics(acts, text))
    assert [r["feature"] for r in rows] == list(range(D_SAE))
    for row in rows:
        values = [v for _, _, v in firings(dense, row["feature"])]
        assert row["n_active"] == len(values)
        assert row["density"] == pytest.approx(len(values) / (BLOCKS * (CONTEXT - 1)), rel=1e-12)
        assert row["alive"] is (len(values) > 0)
        if not values:
            assert row["max_activation"] == 0
            assert row["mean_activation"] is None
            assert row["quantiles"] is None
            continue
        assert row["max_activation"] == max(values)
        assert row["mean_activation"] == pytest.approx(sum(values) / len(values), rel=1e-6)
        expected = np.quantile(np.array(values), np.linspace(0, 1, 11))
        np.testing.assert_allclose(row["quantiles"], expected, rtol=1e-6)


def test_statistics_of_a_silent_sae(text):
    rows = rows_of(corpus.feature_statistics(NOTHING, text))
    assert [(r["n_active"], r["alive"], r["quantiles"], r["max_activation"]) for r in rows] == [
        (0, False, None, 0.0)
    ] * 3


# ---------------------------------------------------------------- histogram


def test_histogram_counts_every_activation_in_its_bin(dense, acts):
    rows = rows_of(corpus.activation_histogram(acts))
    alive = [f for f in range(D_SAE) if firings(dense, f)]
    assert [(r["feature"], r["bin"]) for r in rows] == [(f, b) for f in alive for b in range(50)]
    for feature in alive:
        mine = [r for r in rows if r["feature"] == feature]
        values = [v for _, _, v in firings(dense, feature)]
        top = max(values)
        expected = [0] * 50
        for v in values:
            expected[min(int(50 * v / top), 49)] += 1  # equal bins, the last one closed
        assert [r["n"] for r in mine] == expected
        np.testing.assert_allclose([r["low"] for r in mine], [top * b / 50 for b in range(50)], rtol=1e-12)
        np.testing.assert_allclose(
            [r["high"] for r in mine], [top * b / 50 for b in range(1, 51)], rtol=1e-12
        )


def test_histogram_of_a_silent_sae():
    assert all(len(c) == 0 for c in corpus.activation_histogram(NOTHING).values())


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("n_top", [1, 5, 40, 2000])
def test_positions(dense, acts, monkeypatch, n_top):
    monkeypatch.setattr(corpus, "N_TOP", n_top)
    expected = []
    for feature in range(D_SAE):
        rows = firings(dense, feature)
        top = strongest(rows)[:n_top]
        for position in range(CONTEXT):
            here = [v for _, p, v in rows if p == position]
            if here:
                among = sum(p == position for _, p, _ in top)
                expected.append((feature, position, among, len(here), sum(here)))
    found = rows_of(corpus.positions(acts))
    assert [tuple(r.values())[:4] for r in found] == [e[:4] for e in expected]
    np.testing.assert_allclose([r["sum_activation"] for r in found], [e[4] for e in expected], rtol=1e-12)


def test_positions_limit_is_2000():
    n = 2100
    tokens = np.arange(n) * CONTEXT + 1 + (np.arange(n) >= 2000)  # the 2000 strongest at position 1
    acts = FeatureActs.collect([(np.zeros(n), tokens, np.linspace(9, 1, n))], 1, CONTEXT)
    found = [(r["position"], r["n_top"], r["n_active"]) for r in rows_of(corpus.positions(acts))]
    assert found == [(1, 2000, 2000), (2, 0, 100)]


# ---------------------------------------------------------------- tokens


def expected_token_rows(dense, tokens, limit):
    out = []
    for feature in range(D_SAE):
        for role, shift in (("at", 0), ("next", 1)):
            # (token, activation) of each firing that has such a token inside its block
            pairs = [
                (int(tokens[b, p + shift]), v) for b, p, v in firings(dense, feature) if p + shift < CONTEXT
            ]
            sums: dict[int, list[float]] = {}
            for token, v in pairs:
                sums.setdefault(token, []).append(v)
            places = tokens[:, 1 + shift :].ravel().tolist()
            order = sorted(sums, key=lambda t: (-sum(sums[t]), t))[:limit]
            for rank, token in enumerate(order):
                n = len(sums[token])
                out.append(
                    {
                        "role": role,
                        "feature": feature,
                        "rank": rank,
                        "token": token,
                        "n_active": n,
                        "sum_activation": sum(sums[token]),
                        "max_activation": max(sums[token]),
                        "precision": n / len(pairs),
                        "recall": n / places.count(token),
                    }
                )
    return out


@pytest.mark.parametrize("limit", [1, 3, 50])
def test_token_stats(dense, acts, text, monkeypatch, limit):
    monkeypatch.setattr(corpus, "N_TOKENS", limit)
    found = rows_of(corpus.token_stats(acts, text))
    expected = expected_token_rows(dense, text.tokens, limit)
    exact = ("role", "feature", "rank", "token", "n_active", "max_activation")
    assert [[r[k] for k in exact] for r in found] == [[r[k] for k in exact] for r in expected]
    for key in ("sum_activation", "precision", "recall"):
        np.testing.assert_allclose([r[key] for r in found], [r[key] for r in expected], rtol=1e-6)
    assert all(0 < r["precision"] <= 1 for r in found)
    assert all(0 < r["recall"] <= 1 for r in found)


def test_a_perfect_token_detector(text):
    """Firing on every 3 and nowhere else: precision and recall are 1."""
    dense = (text.tokens == 3)[..., None].astype(np.float32)
    (at,) = [r for r in rows_of(corpus.token_stats(acts_of(dense), text)) if r["role"] == "at"]
    assert (at["token"], at["precision"], at["recall"]) == (3, 1, 1)


def test_token_stats_of_a_silent_sae(text):
    assert rows_of(corpus.token_stats(NOTHING, text)) == []


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
    found = occurrences(acts, corpus.top_examples(acts))
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
    assert occurrences(acts, corpus.top_examples(acts)) == [(0, 3, 1), (0, 1, 8), (0, 2, 2), (0, 0, 5)]


def test_top_examples_of_a_silent_sae():
    assert len(corpus.top_examples(NOTHING)) == 0


# ---------------------------------------------------------------- quantile groups


def rank_from_bottom(dense, feature):
    """{(block, position): (rank from the weakest, number of firings)}."""
    rows = strongest(firings(dense, feature))[::-1]
    return {(b, p): (r, len(rows)) for r, (b, p, _) in enumerate(rows)}


def test_quantile_examples_come_from_their_tenth(dense, acts):
    index, group = corpus.quantile_examples(acts, seed=3)
    found = list(zip(occurrences(acts, index), group.tolist(), strict=True))
    assert len({o for o, _ in found}) == len(found), "no token twice"
    for feature in range(D_SAE):
        places = rank_from_bottom(dense, feature)
        sizes = [0] * 10
        for rank, n in places.values():
            sizes[rank * 10 // n] += 1
        if len(places) >= 10:
            assert max(sizes) - min(sizes) <= 1, "groups of equal count"
        drawn = [0] * 10
        for (f, b, p), g in found:
            if f == feature:
                rank, n = places[b, p]
                assert g == rank * 10 // n
                drawn[g] += 1
        assert drawn == [min(5, s) for s in sizes]


def test_quantile_examples_are_sorted_by_feature_group_and_strength(acts):
    index, group = corpus.quantile_examples(acts, seed=3)
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
    for a, b in zip(corpus.quantile_examples(acts, 3), corpus.quantile_examples(other, 3), strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(corpus.quantile_examples(acts, 3)[0], corpus.quantile_examples(acts, 4)[0])


def test_draws_are_uniform():
    """A group of 1000 draws 5: over 400 seeds each quarter of it is drawn about 500 times of 2000."""
    n = 10_000
    acts = FeatureActs.collect([(np.zeros(n), np.arange(n), np.linspace(1, 2, n))], 1, CONTEXT)
    drawn = np.concatenate([corpus.quantile_examples(acts, seed)[0][:5] for seed in range(400)])
    assert drawn.max() < 1000
    counts = np.bincount(drawn // 250, minlength=4)
    assert counts.sum() == 2000
    assert ((counts - 500) ** 2 / 500).sum() < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001
    assert len(np.unique(drawn)) > 750  # 865 are expected when each is as likely as the others


def test_quantile_examples_of_a_silent_sae():
    index, group = corpus.quantile_examples(NOTHING, 0)
    assert len(index) == len(group) == 0


# ---------------------------------------------------------------- the table of examples


def test_examples_show_the_whole_block(dense, acts):
    rows = rows_of(corpus.examples(acts, seed=3))
    for row in rows:
        f, b, p = row["feature"], row["block"], row["position"]
        assert row["activation"] == float(dense[b, p, f]) > 0
        on = [q for q in range(CONTEXT) if dense[b, q, f] > 0]
        assert row["active_positions"] == on
        assert row["active_values"] == [float(dense[b, q, f]) for q in on]


def test_examples_are_the_top_ones_and_the_drawn_ones(dense, acts):
    rows = rows_of(corpus.examples(acts, seed=3))
    index, group = corpus.quantile_examples(acts, seed=3)
    expected: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for feature in range(D_SAE):
        for b, p, _ in expected_top(dense, feature):
            expected.setdefault((feature, "top"), []).append((b, p))
    for (f, b, p), g in zip(occurrences(acts, index), group.tolist(), strict=True):
        expected.setdefault((f, f"q{g}"), []).append((b, p))
    found: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for row in rows:
        mine = found.setdefault((row["feature"], row["example_group"]), [])
        assert row["rank"] == len(mine), "ranks count from 0 in the order of the rows"
        mine.append((row["block"], row["position"]))
    assert found == expected


def test_examples_of_a_silent_sae():
    assert rows_of(corpus.examples(NOTHING, 0)) == []
