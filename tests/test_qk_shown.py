"""Heads read on queries and keys as people meet them: the queries behind the view, and the view."""

import pytest

from app.qk_charts import COLOURS, TOLD, curves, pattern
from atlas.errors import ConfigError
from atlas.settings import load_settings
from atlas.store.connection import cursor, open_release
from atlas.store.queries import pairs as asked
from atlas.store.release import current
from tests.synthetic import build_synthetic_release, synthetic_rows
from tests.test_app_views import show, words

SIZE = {"seed": 0, "n_layers": 2, "n_heads": 3, "d_sae": 24, "n_blocks": 16, "context": 24}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    build_synthetic_release(folder / "releases", **SIZE)
    return folder


@pytest.fixture(scope="module")
def con(home):
    return cursor(open_release(current(home / "releases").path))


@pytest.fixture(scope="module")
def rows():
    return synthetic_rows(**SIZE)


@pytest.fixture
def atlas(home, tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(home))
    monkeypatch.setenv("ATLAS_DATABASE_URL", f"sqlite:///{tmp_path / 'notes.sqlite'}")
    return load_settings()


def test_every_pair_with_how_well_its_pattern_is_rebuilt(con, rows):
    (found,) = asked.pairs(con, "synthetic")
    (stored,) = rows["qk_heads"]
    assert {name: found[name] for name in stored} == stored
    (metric,) = [r for r in rows["sae_metrics"] if r["sae"] == stored["q_sae"] and r["split"] == "eval"]
    assert found["pattern_kl"] == metric.get("pattern_kl")
    assert asked.pairs(con, "another") == []


def test_the_rows_of_a_pair_and_of_no_other_table(con, rows):
    (head,) = rows["qk_heads"]
    for table in asked.OF_PAIRS:
        found = asked.of_pair(con, table, head["q_sae"], head["k_sae"])
        assert found.num_rows == len(rows[table]) > 0, table
        assert asked.of_pair(con, table, head["k_sae"], head["q_sae"]).num_rows == 0
    with pytest.raises(ConfigError, match="table 'features'"):
        asked.of_pair(con, "features", head["q_sae"], head["k_sae"])


def clearest(rows, sae, least):
    """One feature for each position: of largest share, the lower of equal ones."""
    best = {}
    for row in rows["features"]:
        share = row.get("top_position_share")
        if row["sae"] != sae or row["n_active"] < 10 or share is None or share < least:
            continue
        held = best.get(row["top_position"])
        if held is None or (share, -row["feature"]) > (held["top_position_share"], -held["feature"]):
            best[row["top_position"]] = row
    return {position: row["feature"] for position, row in best.items()}


def test_products_by_position_are_those_of_one_feature_for_each(con, rows):
    (head,) = rows["qk_heads"]
    q, k = (clearest(rows, head[side], 0.05) for side in ("q_sae", "k_sae"))
    assert q
    assert k
    products = {row["feature"]: row["products"] for row in rows["qk_products"]}
    found = asked.by_position(con, head["q_sae"], head["k_sae"], 0.05).to_pylist()
    expected = [(i, j, q[i], k[j], products[q[i]][k[j]]) for i in sorted(q) for j in sorted(k)]
    assert [(r["q_position"], r["k_position"], r["q_feature"], r["k_feature"]) for r in found] == [
        row[:4] for row in expected
    ]
    assert [r["product"] for r in found] == pytest.approx([row[4] for row in expected], rel=1e-5)


def test_products_with_positions_are_the_centred_ones(con, rows):
    (head,) = rows["qk_heads"]
    found = asked.with_positions(con, head["k_sae"], 0.05).to_pylist()
    centred = {r["feature"]: r["centred"] for r in rows["position_products"] if r["sae"] == head["k_sae"]}
    own = clearest(rows, head["k_sae"], 0.05)
    expected = [(p, i, value) for p in sorted(own) for i, value in enumerate(centred[own[p]])]
    assert [(r["position"], r["embedding"]) for r in found] == [row[:2] for row in expected]
    assert [r["product"] for r in found] == pytest.approx([row[2] for row in expected], rel=1e-5)


def test_the_view_shows_a_pair_and_another_beside_it(atlas, rows):
    (head,) = rows["qk_heads"]
    name = f"L{head['layer']}H{head['head']} {head['q_sae'].rsplit('.', 1)[-1]}"
    at = show("qk", pair=name, beside=name)
    assert not at.error
    text = words(at)
    assert "<h1>Queries and keys</h1>" in text
    assert text.count("rebuilt score") == 2
    assert "random tokens twice: attention" in text
    assert len(at.dataframe) >= 6


def test_a_pair_that_is_not_there_is_named_with_those_that_are(atlas):
    at = show("qk", pair="L9H9 topk-1")
    assert "pair 'L9H9 topk-1' is not in this release; there are: L" in words(at).replace("\\", "")


def test_charts_name_every_variant_and_every_token():
    assert set(COLOURS) < set(TOLD)
    assert curves("log_prob", "x", None)["encoding"]["color"]["scale"]["domain"] == [TOLD[v] for v in COLOURS]
    assert curves("log_prob", "x", 7)["layer"][0]["data"] == {"values": [{"at": 7}]}
    spec = pattern(['"', "\\", "·a"])
    assert spec["encoding"]["x"]["axis"]["labelExpr"] == '["\\"", "\\\\", "\\u00b7a"][datum.value]'
