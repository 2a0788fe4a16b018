"""The app's queries against the same answers worked out in plain Python from the rows themselves."""

from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.errors import StoreError
from atlas.store.connection import cursor, open_release
from atlas.store.queries import examples, features, heads, overview, ranks, shares
from tests.synthetic import build_synthetic_release, synthetic_rows

SIZE = {"seed": 3, "n_layers": 2, "n_heads": 4, "d_sae": 32, "n_blocks": 24, "context": 24}
Z0 = "synthetic/L00.z.topk-32"
Z1 = "synthetic/L01.z.topk-32"


@pytest.fixture(scope="module")
def rows():
    return synthetic_rows(**SIZE)


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    path = build_synthetic_release(tmp_path_factory.mktemp("releases"), **SIZE)
    return cursor(open_release(path))


def of(rows, table, **key):
    return [row for row in rows[table] if all(row[name] == value for name, value in key.items())]


def alive(rows, sae):
    return {row["feature"] for row in of(rows, "features", sae=sae) if row["alive"]}


def test_models_and_saes(con, rows):
    assert [m.model for m in overview.models(con)] == ["synthetic"]
    refs = overview.sae_refs(con)
    assert {ref.sae for ref in refs} == {row["sae"] for row in rows["saes"]}
    chosen = overview.z_saes(refs, "synthetic")
    assert {layer: ref.sae for layer, ref in chosen.items()} == {0: Z0, 1: Z1}
    with pytest.raises(StoreError, match="'gpt9' is not known; allowed: synthetic"):
        overview.find_model(overview.models(con), "gpt9")


def test_sae_table_joins_the_split(con, rows):
    for split in ("eval", "eval_with_bos"):
        table = overview.sae_table(con, "synthetic", split).to_pylist()
        assert len(table) == len(rows["saes"])
        for row in table:
            (metric,) = of(rows, "sae_metrics", sae=row["sae"], split=split)
            assert row["l0"] == pytest.approx(metric["l0"])
            assert row["alive_share"] == pytest.approx(metric["alive"] / row["d_sae"])


def test_vocabulary_is_indexed_by_token(con, rows):
    texts = overview.vocabulary(con, "synthetic")
    assert all(texts[row["token"]] == row["text"] for row in rows["vocab"])
    assert overview.vocabulary(con, "nothing") == ()


@pytest.mark.parametrize("measure", list(heads.MEASURES))
@pytest.mark.parametrize("head", [0, 3])
def test_top_features_are_the_largest_shares_of_firing_features(con, rows, measure, head):
    live = alive(rows, Z0)
    shares = [
        (-row[measure], row["feature"])
        for row in of(rows, "head_attribution", sae=Z0, head=head)
        if row["feature"] in live and row[measure] is not None
    ]
    expected = [feature for _, feature in sorted(shares)[:7]]
    found = heads.top_features(con, Z0, head, measure, 7)
    assert [one.rank for one in found] == list(range(7))
    by_value = {feature: -share for share, feature in shares}
    # float32 in the file against float64 here: equal values may change places.
    assert [by_value[one.feature] for one in found] == pytest.approx(
        [by_value[f] for f in expected], rel=1e-6
    )


def test_top_features_refuse_an_unknown_measure(con):
    with pytest.raises(StoreError, match="measure 'size' is not known"):
        heads.top_features(con, Z0, 0, "size")


def test_grid_metrics(con, rows):
    table = {(r["layer"], r["head"]): r for r in heads.grid_metrics(con, [Z0, Z1]).to_pylist()}
    assert set(table) == {(layer, head) for layer in (0, 1) for head in range(4)}
    for (layer, head), row in table.items():
        sae = (Z0, Z1)[layer]
        live = alive(rows, sae)
        mine = [r for r in of(rows, "head_attribution", sae=sae, head=head) if r["feature"] in live]
        shares = sorted((r["decoder_share"] for r in mine), reverse=True)
        fves = sorted((r["fve"] for r in mine if r["fve"] is not None), reverse=True)
        assert row["top10_decoder_share"] == pytest.approx(sum(shares[:10]) / len(shares[:10]), rel=1e-5)
        assert row["max_decoder_share"] == pytest.approx(shares[0], rel=1e-5)
        assert row["top10_fve"] == pytest.approx(sum(fves[:10]) / len(fves[:10]), rel=1e-5)
        tops = [r for r in of(rows, "features", sae=sae) if r["alive"] and r["top_head"] == head]
        assert row["n_top"] == len(tops)


def test_scores_have_ranks_among_all_heads(con, rows):
    table = heads.head_scores(con, "synthetic")
    for row in heads.score_rows(table, 1, 2):
        values = [r["value"] for r in of(rows, "head_scores", score=row["score"])]
        assert row["of"] == 8
        assert row["rank"] == 1 + sum(v > row["value"] for v in values)
    assert heads.score_names(con, "synthetic") == tuple(sorted({r["score"] for r in rows["head_scores"]}))


def test_share_scatter_and_its_correlation(con, rows):
    table = heads.share_scatter(con, Z1, 2)
    assert set(table["feature"].to_pylist()) == alive(rows, Z1)
    places = [np.argsort(np.argsort(table[name].to_numpy())) for name in ("decoder_share", "fve")]
    by_hand = np.corrcoef(*places)[0, 1]
    assert ranks.rank_correlation(table, "decoder_share", "fve") == pytest.approx(by_hand)
    assert ranks.rank_correlation(table.slice(0, 2), "decoder_share", "fve") is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.one_of(st.none(), st.integers(0, 4))), max_size=12))
def test_rank_correlation_with_ties_and_missing_values_against_counting(pairs):
    """A rank is how many values are smaller, and half of the equal ones."""
    table = pa.table(
        {
            "a": pa.array([a for a, _ in pairs], pa.float32()),
            "b": pa.array([b for _, b in pairs], pa.float32()),
        }
    )
    both = [(a, b) for a, b in pairs if b is not None]
    columns = list(zip(*both, strict=True))
    if len(both) < 3 or any(len(set(column)) == 1 for column in columns):
        assert ranks.rank_correlation(table, "a", "b") is None
        return
    places = [[sum(o < v for o in c) + sum(o == v for o in c) / 2 for v in c] for c in columns]
    assert ranks.rank_correlation(table, "a", "b") == pytest.approx(np.corrcoef(*places)[0, 1], abs=1e-9)


def test_points_are_the_largest_and_correlations_are_of_all(con, rows):
    table = heads.share_scatter(con, Z1, 2)
    every = table.to_pylist()
    also = every[-1]["feature"]
    found = shares.in_head(con, Z1, 2, (also,), 3)
    expected = {also}
    for name in heads.MEASURES:
        known = [row for row in every if row[name] is not None]
        expected |= {r["feature"] for r in sorted(known, key=lambda r: (-r[name], r["feature"]))[:3]}
    assert found.table["feature"].to_pylist() == sorted(expected)
    assert found.n == len(every) > len(expected)
    pair = ("decoder_share", "fve")
    assert found.correlations[pair] == ranks.rank_correlation(table, *pair)
    both = shares.in_two_heads(con, Z1, 2, 1)
    other = {row["feature"]: row["decoder_share"] for row in heads.share_scatter(con, Z1, 1).to_pylist()}
    assert both.table.num_rows == both.n == len(every)
    for row, point in zip(every, both.table.to_pylist(), strict=True):
        assert point == {
            "feature": row["feature"],
            "one": row["decoder_share"],
            "other": other[row["feature"]],
        }


def test_feature_tables_hold_the_rows_of_that_feature_alone(con, rows):
    feature = min(alive(rows, Z1))
    key = {"sae": Z1, "feature": feature}
    row = features.feature_row(con, Z1, feature)
    assert row["n_active"] == of(rows, "features", **key)[0]["n_active"]
    bins = features.histogram(con, Z1, feature)
    (linear,) = of(rows, "activation_counts", scale="linear", **key)
    assert bins["n"].to_pylist() == linear["n"]
    np.testing.assert_allclose(bins["high"], np.linspace(0, linear["high"], 51)[1:], rtol=1e-6)
    assert sum(bins["n"].to_pylist()) == row["n_active"]
    bins = features.histogram(con, Z1, feature, "log")
    (log,) = of(rows, "activation_counts", scale="log", **key)
    assert bins["n"].to_pylist() == log["n"]
    np.testing.assert_allclose(bins["low"], np.geomspace(log["low"], log["high"], 31)[:-1], rtol=1e-6)
    with pytest.raises(StoreError, match="scale 'cubic' is not known; allowed: linear, log"):
        features.histogram(con, Z1, feature, "cubic")
    where = features.positions(con, Z1, feature).to_pylist()
    assert sum(r["share_all"] for r in where) == pytest.approx(1)
    assert sum(r["share_top"] for r in where) == pytest.approx(1)
    shares = features.attribution(con, Z1, feature).to_pylist()
    assert [r["head"] for r in shares] == [0, 1, 2, 3]
    stored = of(rows, "head_attribution", **key)
    assert set(shares[0]) == set(stored[0]) - {"sae", "feature"}
    assert [r["fve"] for r in shares] == pytest.approx([r["fve"] for r in stored], abs=5.1e-6)
    assert sum(r["decoder_share"] for r in shares) == pytest.approx(1, abs=1e-5)
    tokens = features.token_stats(con, Z1, feature, 5).to_pylist()
    kept = Counter(r["role"] for r in of(rows, "token_stats", **key) if r["rank"] < 5)
    assert Counter(r["role"] for r in tokens) == kept
    logits = features.logits(con, Z1, [feature], 3).to_pylist()
    assert [(r["sign"], r["rank"]) for r in logits] == [(s, k) for s in (1, -1) for k in range(3)]


def test_neighbours_are_the_nearest_that_fire(con, rows):
    live = sorted(alive(rows, Z0))
    assert features.alive_around(con, Z0, live[0]) == (None, live[1])
    assert features.alive_around(con, Z0, live[2]) == (live[1], live[3])
    assert features.alive_around(con, Z0, live[-1]) == (live[-2], None)


def test_unknown_feature_and_sae_name_what_exists(con):
    with pytest.raises(StoreError, match=r"feature 999 is not in .*; allowed: 0 to 31"):
        features.feature_row(con, Z0, 999)
    with pytest.raises(StoreError, match="SAE 'x' is not in this release; allowed: synthetic/"):
        features.find_sae(overview.sae_refs(con), "x")


def test_examples_carry_text_and_dfa(con, rows):
    wanted = sorted(alive(rows, Z0))[:3]
    found = examples.examples(con, Z0, wanted, ("top", "q9"), 4)
    expected = [
        (r["feature"], r["example_group"], r["rank"])
        for r in rows["examples"]
        if r["sae"] == Z0 and r["feature"] in wanted and r["example_group"] in ("top", "q9") and r["rank"] < 4
    ]
    assert Counter((e.feature, e.group, e.rank) for e in found) == Counter(expected)
    order = [(e.feature, ("top", "q9").index(e.group), e.rank) for e in found]
    assert order == sorted(order)
    docs = {r["block"]: r for r in rows["docs"]}
    dfa = defaultdict(dict)
    for r in of(rows, "dfa", sae=Z0):
        dfa[r["feature"], r["example_group"], r["rank"]] = r
    for e in found:
        assert e.tokens == tuple(docs[e.block]["tokens"])
        assert dict(e.active)[e.position] == pytest.approx(
            e.activation, abs=max(a for _, a in e.active) / 4095
        )
        assert e.dfa is not None
        stored = dfa[e.feature, e.group, e.rank]
        largest = max(map(abs, stored["by_head"]))
        assert e.dfa.by_head == pytest.approx(stored["by_head"], abs=largest / 4095)
        total = sum(e.dfa.by_head) + e.dfa.bias_term
        assert total == pytest.approx(e.dfa.pre_activation, abs=1e-3 * largest)
        unit = stored["unit"]
        wanted = [(s["head"], s["source"], pytest.approx(s["weight"] * unit)) for s in stored["sources"]]
        assert list(e.dfa.sources) == wanted
        assert (e.dfa.top_source, e.dfa.matched_prefix) == (stored["top_source"], stored["matched_prefix"])


def test_examples_of_an_sae_without_dfa_still_have_text(con, rows):
    q = next(r["sae"] for r in rows["saes"] if r["site"] == "q")
    feature = min(alive(rows, q))
    found = examples.examples(con, q, [feature])
    assert found
    assert all(e.dfa is None and e.tokens for e in found)


def test_near_misses_have_a_near_miss_and_no_attribution(con, rows):
    kept = of(rows, "examples", sae=Z0, example_group="negative")
    feature = kept[0]["feature"]
    found = examples.examples(con, Z0, [feature], examples.MORE_GROUPS)
    assert [e.group for e in found] == sorted((e.group for e in found), key=examples.MORE_GROUPS.index)
    misses = {e.rank: e for e in found if e.group == "negative"}
    stored = {r["rank"]: r for r in kept if r["feature"] == feature}
    assert misses.keys() == stored.keys()
    for rank, miss in misses.items():
        assert (miss.activation, miss.dfa) == (0, None)
        assert miss.near_miss == pytest.approx(stored[rank]["near_miss"])
        assert miss.position not in dict(miss.active)
    assert all(e.near_miss is None and e.dfa for e in found if e.group == "random")


def test_nothing_asked_nothing_given(con):
    assert examples.examples(con, Z0, []) == ()
    assert features.summaries(con, Z0, []) == {}
    assert features.block_length(con) == 24
