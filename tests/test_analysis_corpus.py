"""Every corpus summary against plain loops over a dense array, with ties, silent features and no text."""

import numpy as np
import pytest

from atlas.analysis import corpus
from atlas.analysis.acts import FeatureActs
from atlas.analysis.text import ArrayBlocks, Text

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
    return text_of(tokens)


def text_of(tokens) -> Text:
    return Text(ArrayBlocks(tokens), *tokens.shape, D_VOCAB)


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


def expected_edges(values: list[float]) -> dict[str, np.ndarray]:
    top, least = max(values), min(values)
    log = [least * (top / least) ** (b / 30) for b in range(31)]
    log[-1] = top
    return {
        "linear": np.array([top * b / 50 for b in range(51)], np.float32),
        "log": np.array(log, np.float32),
    }


def test_histogram_counts_every_activation_in_its_bin(dense, acts):
    rows = rows_of(corpus.activation_counts(acts))
    alive = [f for f in range(D_SAE) if firings(dense, f)]
    assert [(r["feature"], r["scale"]) for r in rows] == [(f, s) for f in alive for s in ("linear", "log")]
    for row in rows:
        values = [v for _, _, v in firings(dense, row["feature"])]
        edges = expected_edges(values)[row["scale"]]
        assert (row["low"], row["high"]) == (edges[0], edges[-1])
        expected = [0] * (len(edges) - 1)
        for v in values:  # the last bin whose lower edge it reaches
            expected[int(np.flatnonzero(edges[:-1] <= np.float32(v)).max())] += 1
        if row["scale"] == "log" and len(set(values)) == 1:
            expected = [0] * 29 + [len(values)]
        assert row["n"] == expected


def test_histogram_of_a_silent_sae():
    assert all(len(c) == 0 for c in corpus.activation_counts(NOTHING).values())


# ---------------------------------------------------------------- positions


def by_position(columns):
    """feature, position, n_top, n_active, sum_activation of each position."""
    names = ("position", "n_top", "n_active", "sum_activation")
    return [
        (row["feature"], *values)
        for row in rows_of(columns)
        for values in zip(*(row[name] for name in names), strict=True)
    ]


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
    found = by_position(corpus.position_counts(acts, corpus.strongest_positions(acts)))
    assert [row[:4] for row in found] == [e[:4] for e in expected]
    np.testing.assert_allclose([row[4] for row in found], [e[4] for e in expected], rtol=1e-6)


def test_positions_limit_is_2000():
    n = 2100
    tokens = np.arange(n) * CONTEXT + 1 + (np.arange(n) >= 2000)  # the 2000 strongest at position 1
    acts = FeatureActs.collect([(np.zeros(n), tokens, np.linspace(9, 1, n))], 1, CONTEXT)
    found = [row[1:4] for row in by_position(corpus.position_counts(acts, corpus.strongest_positions(acts)))]
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
    expected = expected_token_rows(dense, text.store.tokens, limit)
    exact = ("role", "feature", "rank", "token", "n_active", "max_activation")
    assert [[r[k] for k in exact] for r in found] == [[r[k] for k in exact] for r in expected]
    for key in ("sum_activation", "precision", "recall"):
        np.testing.assert_allclose([r[key] for r in found], [r[key] for r in expected], rtol=1e-6)
    assert all(0 < r["precision"] <= 1 for r in found)
    assert all(0 < r["recall"] <= 1 for r in found)


def test_a_perfect_token_detector(text):
    """Firing on every 3 and nowhere else: precision and recall are 1."""
    dense = (text.store.tokens == 3)[..., None].astype(np.float32)
    (at,) = [r for r in rows_of(corpus.token_stats(acts_of(dense), text)) if r["role"] == "at"]
    assert (at["token"], at["precision"], at["recall"]) == (3, 1, 1)


def test_token_stats_of_a_silent_sae(text):
    assert rows_of(corpus.token_stats(NOTHING, text)) == []


# ---------------------------------------------------------------- traits


@pytest.mark.parametrize("n_top", [1, 5, 2000])
def test_position_traits(dense, acts, monkeypatch, n_top):
    monkeypatch.setattr(corpus, "N_TOP", n_top)
    found = rows_of(corpus.position_traits(acts, corpus.strongest_positions(acts)))
    for feature, row in enumerate(found):
        places = [p for _, p, _ in strongest(firings(dense, feature))[:n_top]]
        if not places:
            assert row["top_position"] is None
            assert np.isnan(row["top_position_share"])
            assert np.isnan(row["effective_positions"])
            continue
        counts = {p: places.count(p) for p in sorted(set(places))}
        best = max(counts, key=lambda p: (counts[p], -p))
        assert row["top_position"] == best
        assert row["top_position_share"] == pytest.approx(counts[best] / len(places))
        inverse = len(places) ** 2 / sum(n * n for n in counts.values())
        assert row["effective_positions"] == pytest.approx(inverse)


@pytest.mark.parametrize("n_strong", [1, 7, 200])
def test_token_traits(dense, acts, text, monkeypatch, n_strong):
    monkeypatch.setattr(corpus, "N_STRONG", n_strong)
    tokens = text.store.tokens
    for feature, row in enumerate(rows_of(corpus.token_traits(acts, text))):
        kept = strongest(firings(dense, feature))[:n_strong]
        at = [int(tokens[b, p]) for b, p, _ in kept]
        pairs = [(int(tokens[b, p - 1]), int(tokens[b, p])) for b, p, _ in kept]
        if not kept:
            assert row["top_token"] is None
            assert np.isnan(row["top_token_share"])
            continue
        assert row["top_token"] == max(set(at), key=lambda t: (at.count(t), -t))
        assert row["top_token_share"] == pytest.approx(max(map(at.count, at)) / len(at))
        before = [pair[0] for pair in pairs]
        assert row["top_previous_token"] == max(set(before), key=lambda t: (before.count(t), -t))
        assert row["top_previous_share"] == pytest.approx(max(map(before.count, before)) / len(before))
        assert row["top_pair_share"] == pytest.approx(max(map(pairs.count, pairs)) / len(pairs))


def test_text_is_looked_up_by_occurrence(text):
    occurrence = np.array([CONTEXT + 3, 5])
    assert text.token(occurrence).tolist() == [text.store.tokens[1, 3], text.store.tokens[0, 5]]
    for first in (1, 2):
        expected = np.bincount(text.store.tokens[:, first:].ravel(), minlength=D_VOCAB)
        assert text.occurrences(first).tolist() == expected.tolist()


def test_a_range_of_features_gives_the_rows_of_the_whole(dense, acts, text):
    """Every summary of features 2 to 4 alone is the summary of all, cut out and renumbered."""
    part = acts_of(dense[..., 2:5])
    for summary in (
        corpus.activation_counts,
        lambda a: corpus.position_counts(a, corpus.strongest_positions(a)),
        lambda a: corpus.feature_statistics(a, text),
        lambda a: corpus.token_stats(a, text),
    ):
        mine = [{**r, "feature": r["feature"] + 2} for r in rows_of(summary(part))]
        assert mine == [r for r in rows_of(summary(acts)) if 2 <= r["feature"] < 5]
