"""Queries of the evidence beyond activations, on a release whose rows are written down here."""

import duckdb
import pyarrow as pa
import pytest

from atlas.errors import StoreError
from atlas.store import release
from atlas.store.connection import open_release
from atlas.store.parquet import write_table
from atlas.store.queries import evidence, heads
from atlas.tables import FAMILY_NAMES, TABLES

SAE, OTHER = "m/L00.z.topk-4", "m/L01.z.topk-4"
QUERY, KEY = "m/L00.H00.q.topk-4", "m/L00.H00.k.topk-4"


def feature(number, alive=True, **values):
    """A row of ``features``; what is not given is 0, or NULL where that is allowed."""
    known = {"sae": SAE, "feature": number, "alive": alive, **values}
    return tuple(
        known.get(column.name, None if column.nullable else 0) for column in TABLES["features"].columns
    )


def rows():
    """A few rows of every table that is asked here; each has rows of another feature and SAE around."""
    near = [
        (SAE, 1, "decoder", "across", 0, OTHER, 3, 0.5),
        (SAE, 1, "decoder", "within", 0, SAE, 2, 0.75),
        (SAE, 1, "decoder", "within", 1, SAE, 0, 0.25),
        (SAE, 1, "encoder", "within", 0, SAE, 3, 0.125),
        (SAE, 2, "decoder", "within", 0, SAE, 1, 0.75),
        (OTHER, 1, "decoder", "within", 0, OTHER, 2, 1.0),
    ]
    together = [(SAE, 1, 0, 3, 20, 0.5, 0.25, 1.5, 1000), (SAE, 1, 1, 0, 10, 0.25, None, 1.0, 1000)]
    summary = [(SAE, 1, 20, 0.5, 0.0, 0.25, 0.125, 0.125, 0.5, 0.0, 3.0, 0.75, 2.0),
               (SAE, 2, 0, *[None] * 10)]  # fmt: skip
    features = [feature(0, n_active=50, top_token_share=0.9, top_pair_share=0.5, density=0.2, top_head=1),
                feature(1, n_active=50, density=0.01, max_activation=2.0, top_head=1),
                feature(2, n_active=50, density=0.15, max_activation=5.0, top_head=0),
                feature(3, alive=False)]  # fmt: skip
    distances = [(SAE, 1, -1, -1, 0.5, 0.25), (SAE, 1, 0, 0, 0.0, 0.0), (SAE, 1, 1, 1, 0.5, 0.125)]
    tokens = [(SAE, 1, 0, 7, 0.5, 20), (SAE, 1, 1, 3, 0.25, 4), (SAE, 3, 0, 1, 1.0, 1)]
    effects = [
        (SAE, 1, head, sign, rank, 10 * head + rank, sign * (2.0 - rank))
        for head in (0, 2) for sign in (-1, 1) for rank in (0, 1)
    ]  # fmt: skip
    partners = [(QUERY, KEY, 1, 0, 3, 2.0), (QUERY, KEY, 1, 1, 0, 1.5), (QUERY, "m/other", 1, 0, 2, 9.0)]
    products = [(QUERY, KEY, f, [float(4 * f + g) for g in range(4)]) for f in range(3)]
    places = [(QUERY, 1, [1.0, 2.0, 3.0], [-1.0, 0.0, 1.0])]
    return {
        "neighbours": near, "coactivation": together, "dfa_summary": summary, "dfa_distances": distances,
        "dfa_tokens": tokens, "head_logit_effects": effects, "qk_partners": partners,
        "qk_products": products, "position_products": places,
        "features": features,
        "logit_histogram": [(SAE, 1, -1.0, 3.0, [5, 0, 7, 1]), (SAE, 2, 0.0, 1.0, [1, 1, 1, 1])],
    }  # fmt: skip


def publish(folder, tables):
    parts = {}
    for name, found in tables.items():
        declared = TABLES[name]
        data = [dict(zip(declared.schema.names, row, strict=True)) for row in found]
        table = pa.Table.from_pylist(data, schema=declared.schema)
        parts[name] = [folder / f"{name}.parquet"]
        write_table(parts[name][0], name, table.sort_by([(key, "ascending") for key in declared.key]))
    return release.publish(folder / "releases", "r", parts, {}).path


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    return open_release(publish(tmp_path_factory.mktemp("evidence"), rows()))


def test_neighbours_are_those_of_that_feature_by_direction_scope_and_rank(con):
    assert [tuple(row.values()) for row in evidence.neighbours(con, SAE, 1).to_pylist()] == [
        ("decoder", "across", 0, OTHER, 3, 0.5),
        ("decoder", "within", 0, SAE, 2, 0.75),
        ("decoder", "within", 1, SAE, 0, 0.25),
        ("encoder", "within", 0, SAE, 3, 0.125),
    ]
    assert evidence.neighbours(con, SAE, 3).num_rows == 0


def test_coactivation_keeps_what_has_no_value(con):
    found = evidence.coactivation(con, SAE, 1)
    assert found.column_names == ["rank", "other", "n_both", "jaccard", "pearson", "pmi", "n_tokens"]
    assert found["other"].to_pylist() == [3, 0]
    assert found["pearson"].to_pylist() == [0.25, None]


def test_dfa_of_a_feature(con):
    summary = evidence.dfa_summary(con, SAE, 1)
    assert (summary["n"], summary["bos"], summary["after_match"], summary["matched_prefix"]) == (
        20,
        0.5,
        0.125,
        2,
    )
    assert evidence.dfa_summary(con, SAE, 2)["distance"] is None
    assert evidence.dfa_summary(con, SAE, 3) is None
    assert evidence.dfa_distances(con, SAE, 1)["low"].to_pylist() == [-1, 0, 1]
    assert evidence.dfa_tokens(con, SAE, 1).to_pylist() == [
        {"rank": 0, "token": 7, "share": 0.5, "n": 20}, {"rank": 1, "token": 3, "share": 0.25, "n": 4},
    ]  # fmt: skip


def test_logit_histogram_has_an_edge_on_both_sides_of_every_bin(con):
    assert evidence.logit_histogram(con, SAE, 1).to_pylist() == [
        {"low": -1.0, "high": 0.0, "n": 5}, {"low": 0.0, "high": 1.0, "n": 0},
        {"low": 1.0, "high": 2.0, "n": 7}, {"low": 2.0, "high": 3.0, "n": 1},
    ]  # fmt: skip
    assert evidence.logit_histogram(con, SAE, 3).num_rows == 0


def test_logit_effects_of_all_heads_or_one(con):
    assert evidence.head_logit_effects(con, SAE, 1).num_rows == 8
    one = evidence.head_logit_effects(con, SAE, 1, (2,))
    assert one.to_pylist() == [
        {"head": 2, "sign": sign, "rank": rank, "token": 20 + rank, "value": sign * (2.0 - rank)}
        for sign in (-1, 1) for rank in (0, 1)
    ]  # fmt: skip


def test_products_of_q_and_k(con):
    assert evidence.other_sides(con, QUERY) == (KEY, "m/other")
    assert evidence.qk_partners(con, QUERY, KEY, 1)["other"].to_pylist() == [3, 0]
    assert evidence.qk_products(con, QUERY, KEY, 1) == (4.0, 5.0, 6.0, 7.0)
    assert evidence.qk_products(con, QUERY, KEY, 3) == ()
    assert evidence.products_of_key(con, QUERY, KEY, 2) == ((0, 2.0), (1, 6.0), (2, 10.0))
    assert evidence.position_products(con, QUERY, 1).to_pylist() == [
        {"position": i, "product": 1.0 + i, "centred": i - 1.0} for i in range(3)
    ]
    assert evidence.position_products(con, QUERY, 2).num_rows == 0


def test_families_of_features_in_their_declared_order(con):
    """Feature 0 is dense and of a single token; 1 reads nearby."""
    assert evidence.families(con, SAE, [0, 1, 2, 3]) == {
        0: ["dense", "single_token"], 1: ["local_context"], 2: ["dense"], 3: ["dead"],
    }  # fmt: skip
    assert evidence.families(con, SAE, [9]) == {}
    assert evidence.families(con, OTHER, [0]) == {}
    assert evidence.rules(con)["family"].to_pylist() == list(FAMILY_NAMES)


def test_features_of_a_family_of_all_heads_or_one(con):
    dense = evidence.family_features(con, SAE, "dense").to_pylist()
    assert [(row["feature"], row["value"], row["top_head"]) for row in dense] == [(2, 0.15, 0), (0, 0.2, 1)]
    assert evidence.family_features(con, SAE, "dense", 1)["feature"].to_pylist() == [0]
    assert evidence.family_features(con, SAE, "dense", k=1)["feature"].to_pylist() == [2]
    with pytest.raises(StoreError, match="family 'round' is not known"):
        evidence.family_features(con, SAE, "round")


def test_a_release_without_the_tables_has_no_rows(tmp_path):
    """What an older version published: the tables do not exist."""
    path = tmp_path / "old.duckdb"
    with duckdb.connect(path) as old:
        old.execute("CREATE TABLE manifest (table_name VARCHAR)")
    con = open_release(path)
    assert evidence.neighbours(con, SAE, 1).column_names[0] == "direction"
    assert evidence.neighbours(con, SAE, 1).num_rows == 0
    assert evidence.dfa_summary(con, SAE, 1) is None
    assert evidence.logit_histogram(con, SAE, 1).num_rows == 0
    assert evidence.other_sides(con, QUERY) == ()
    assert evidence.products_of_key(con, QUERY, KEY, 0) == ()
    assert evidence.families(con, SAE, [1]) == {}
    assert evidence.rules(con).num_rows == 0
    assert heads.head_summaries(con, [SAE]).num_rows == 0
