"""Heads that resemble each other, rows of layers, densities: against numpy over the synthetic release."""

import numpy as np
import pytest

from atlas.store.connection import open_release
from atlas.store.queries import evidence, heads, near, overview
from tests.synthetic import MODEL, build_synthetic_release


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    with open_release(build_synthetic_release(tmp_path_factory.mktemp("near") / "releases")) as connection:
        yield connection


@pytest.fixture(scope="module")
def z(con):
    return overview.z_saes(overview.sae_refs(con), MODEL)


def rows(con, sql):
    return con.sql(sql).to_arrow_table().to_pylist()


def test_heads_of_one_layer_by_the_cosine_of_decoder_shares(con, z):
    ref = z[1]
    alive = {r["feature"] for r in rows(con, f"FROM features WHERE sae = '{ref.sae}' AND alive")}
    shares = rows(con, f"FROM head_attribution WHERE sae = '{ref.sae}' ORDER BY feature")
    n_heads = 1 + max(row["head"] for row in shares)
    by_head = np.array([[r["decoder_share"] for r in shares if r["head"] == h and r["feature"] in alive]
                        for h in range(n_heads)])  # fmt: skip
    for head in range(n_heads):
        found = near.heads_of_one_layer(con, ref.sae, head).to_pylist()
        expected = {
            h: by_head[h] @ by_head[head] / np.linalg.norm(by_head[h]) / np.linalg.norm(by_head[head])
            for h in range(n_heads) if h != head
        }  # fmt: skip
        assert {row["head"]: row["cosine"] for row in found} == pytest.approx(expected, rel=1e-5)
        assert [row["cosine"] for row in found] == sorted((r["cosine"] for r in found), reverse=True)


def test_profiles_of_all_layers(con, z):
    saes = [ref.sae for ref in z.values()]
    found = near.profiles(con, saes)
    summaries = heads.head_summaries(con, saes).to_pylist()
    assert set(found) == {(row["layer"], row["head"]) for row in summaries}
    row = summaries[0]
    vector = found[row["layer"], row["head"]]
    assert vector[1] == pytest.approx(row["n_dense"] / max(1, row["n_top"]))
    assert vector[-5] == pytest.approx(row["bos"] or 0.0)
    own = (row["layer"], row["head"])
    like = near.like_profiles(found, own)
    assert own not in [at for at, _ in like]
    assert [v for _, v in like] == sorted((v for _, v in like), reverse=True)
    assert near.like_profiles(found, (99, 0)) == []
    assert near.like_profiles({(0, 0): np.zeros(2), (0, 1): np.ones(2)}, (0, 0)) == []


def test_equal_profiles_go_to_the_lower_place():
    same = {(1, 0): np.ones(3), (0, 2): np.ones(3), (0, 1): np.ones(3), (2, 2): 2 * np.ones(3)}
    assert [at for at, _ in near.like_profiles(same, (2, 2))] == [(0, 1), (0, 2), (1, 0)]


def test_a_row_for_each_layer(con, z):
    saes = [ref.sae for ref in z.values()]
    found = near.layer_rows(con, saes)
    assert [row["layer"] for row in found] == list(z)
    kinds = rows(con, "SELECT sae, feature, family FROM feature_families")
    for row in found:
        (metric,) = rows(con, f"FROM sae_metrics WHERE sae = '{row['sae']}' AND split = 'eval'")
        assert row["variance_explained"] == metric["variance_explained"]
        assert row["alive"] == pytest.approx(metric["alive"] / row["d_sae"])
        led = {r["feature"] for r in rows(con, f"FROM features WHERE sae = '{row['sae']}' AND alive")}
        n = sum(k["sae"] == row["sae"] and k["family"] == "induction" and k["feature"] in led for k in kinds)
        assert row["induction"] == pytest.approx(n / len(led))
    assert near.layer_rows(con, []) == []


def test_densities_against_numpy(con, z):
    saes = tuple(ref.sae for ref in overview.sae_refs(con))[:3]
    found = near.densities(con, saes).to_pylist()
    for sae in saes:
        density = np.array([r["density"] for r in rows(con, f"FROM features WHERE sae = '{sae}'")])
        own = [row for row in found if row["sae"] == sae]
        assert sum(row["n"] for row in own) == len(density)
        assert sum(row["share"] for row in own) == pytest.approx(1)
        assert sum(row["n"] for row in own if row["low"] is None) == (density == 0).sum()
        logs = np.log10(density[density > 0])
        for row in own:
            if row["low"] is not None:
                inside = (logs >= row["low"] - 1e-12) & (logs < row["high"] - 1e-12)
                assert row["n"] == inside.sum()


def test_counts_of_families(con, z):
    for ref in z.values():
        kinds = rows(con, f"SELECT family FROM feature_families WHERE sae = '{ref.sae}'")
        names = [row["family"] for row in kinds]
        assert evidence.family_counts(con, ref.sae) == {name: names.count(name) for name in set(names)}
