"""Queries about quality and training against plain Python over the rows of the synthetic release."""

import statistics

import duckdb
import pytest

from atlas.store import reports
from atlas.store.connection import cursor, open_release
from atlas.store.queries import quality, training
from tests.synthetic import build_synthetic_release, synthetic_rows

SIZE = {"seed": 3, "n_layers": 2, "n_heads": 2, "d_sae": 32, "n_blocks": 8, "context": 16, "engine": True}
MODEL = "synthetic"


@pytest.fixture(scope="module")
def rows():
    return synthetic_rows(**SIZE)


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    return cursor(open_release(build_synthetic_release(tmp_path_factory.mktemp("releases"), **SIZE)))


def metrics(rows, split="eval"):
    return {row["sae"]: row for row in rows["sae_metrics"] if row["split"] == split}


def saes(rows):
    return {row["sae"]: row for row in rows["saes"]}


@pytest.mark.parametrize("split", ["eval", "eval_with_bos"])
def test_layers_are_d1(con, rows, split):
    assert quality.layer_sites(con, MODEL) == ["attn_out", "mlp_out", "z"]
    for site in quality.layer_sites(con, MODEL):
        got = quality.layers(con, MODEL, site, split).to_pylist()
        assert [row["layer"] for row in got] == [0, 1]
        for row in got:
            of = metrics(rows, split)[row["sae"]]
            assert saes(rows)[row["sae"]]["site"] == site
            for name in ("variance_explained", "l0", "ce_recovered", "ce_spliced", "ce_clean"):
                assert row[name] == pytest.approx(of[name], rel=1e-12)


def test_qk_is_a1(con, rows):
    got = quality.qk(con, MODEL).to_pylist()
    wanted = {name for name, row in saes(rows).items() if row["site"] in ("q", "k")}
    assert {row["sae"] for row in got} == wanted
    assert [(row["layer"], row["head"]) for row in got] == sorted((r["layer"], r["head"]) for r in got)
    pair = [row for row in got if (row["layer"], row["head"]) == (0, 1)]
    assert [row["site"] for row in pair] == ["q", "k"]
    assert pair[0]["partner"] == pair[1]["sae"]
    for row in got:
        of = metrics(rows)[row["sae"]]
        for name in ("l0", "ce_recovered", "alive"):
            assert row[name] == pytest.approx(of[name])
        for name in ("pattern_kl", "pattern_top1", "ce_pattern_recovered"):
            assert row[name] == (None if name not in of else pytest.approx(of[name]))


def test_sweep_has_the_sites_with_several_saes(con, rows):
    got = quality.sweep(con, MODEL).to_pylist()
    assert len(got) == 12
    assert {(row["site"], row["layer"], row["head"]) for row in got} == {("q", 0, 0)}
    assert [(r["d_sae"], r["l1_coefficient"]) for r in got] == [
        (d, c) for d in (64, 128, 256) for c in (0.1, 0.3, 1.0, 10.0)
    ]
    for row in got:
        of = metrics(rows)[row["sae"]]
        log = [r for r in rows["training_log"] if r["sae"] == row["sae"]]
        assert row["dead_share"] == pytest.approx(of["dead"] / row["d_sae"])
        assert row["dead_fraction"] == pytest.approx(max(log, key=lambda r: r["step"])["dead_fraction"])


def test_pruning_agrees_with_the_features(con, rows):
    got = quality.pruning(con, MODEL).to_pylist()
    assert [row["layer"] for row in got] == [0, 1]
    for row in got:
        bits = [f["pruned"] for f in rows["features"] if f["sae"] == row["sae"]]
        assert row["n_features"] == len(bits)
        assert row["n_pruned"] == sum(b > 0 for b in bits)
        assert row["n_weak"] == sum(b in (1, 3, 5, 7) for b in bits)
        assert row["n_short_rare"] == sum(b in (6, 7) for b in bits)
        assert row["pruned_share"] == pytest.approx(row["n_pruned"] / len(bits))
        # weak + short + rare - pairs + all three is the union
        union = row["n_weak"] + row["n_short"] + row["n_rare"] + row["n_all_three"]
        assert union - row["n_weak_short"] - row["n_weak_rare"] - row["n_short_rare"] == row["n_pruned"]


@pytest.mark.parametrize("split", ["eval", "eval_with_bos"])
def test_stages_stand_beside_each_other(con, rows, split):
    got = quality.stages(con, MODEL, split).to_pylist()
    assert len(got) == 2
    for row in got:
        for stage in rows["sae_stages"]:
            if stage["sae"] == row["sae"] and stage["split"] == split:
                for name in ("variance_explained", "ce_recovered", "l2_ratio"):
                    assert row[f"{name}_{stage['stage']}"] == pytest.approx(stage[name])
        last = metrics(rows, split)[row["sae"]]
        assert row["variance_explained_finetuned"] == pytest.approx(last["variance_explained"])


def test_logs_of_some_saes(con, rows):
    names = sorted(saes(rows))[:2]
    for table in training.LOGS:
        got = training.rows_of(con, table, names).to_pylist()
        wanted = [row for row in rows[table] if row["sae"] in names]
        key = [c for c in ("sae", "step", "bin", "feature") if c in wanted[0]]
        wanted.sort(key=lambda row: [row[c] for c in key])
        assert [[row[c] for c in key] for row in got] == [[row[c] for c in key] for row in wanted]
    assert training.rows_of(con, "training_log", []).num_rows == 0


def test_endings_are_last_rows_with_the_median_rate(con, rows):
    got = {row["sae"]: row for row in training.endings(con, MODEL).to_pylist()}
    assert set(got) == set(saes(rows))
    for name, row in got.items():
        log = [r for r in rows["training_log"] if r["sae"] == name]
        last = max(log, key=lambda r: r["step"])
        assert (row["step"], row["tokens"]) == (last["step"], last["tokens"])
        assert row["loss"] == pytest.approx(last["loss"])
        speeds = [r["tokens_per_second"] for r in log if r["tokens_per_second"] is not None]
        assert row["tokens_per_second"] == pytest.approx(statistics.median(speeds))


def test_trained_names_settings_and_length(con, rows):
    got = {row["sae"]: row for row in training.trained(con, MODEL).to_pylist()}
    for name, row in got.items():
        assert (row["d_sae"], row["k"]) == (saes(rows)[name]["d_sae"], saes(rows)[name]["k"])
        assert (row["step"], row["tokens"]) == (100, 100_000)


def test_a_release_of_before_these_tables_has_no_rows_and_no_error(rows):
    """Tables and columns that came later are missing in releases that people already have."""
    con = duckdb.connect()
    con.execute(
        "CREATE TABLE saes AS SELECT 'a' AS sae, 'm' AS model, 'q' AS site, 0 AS layer, 0 AS head, "
        "8 AS d_sae, 'relu' AS architecture, NULL::INT AS k, 0.1 AS l1_coefficient"
    )
    con.execute(
        "CREATE TABLE sae_metrics AS SELECT 'a' AS sae, 'eval' AS split, 3.0 AS l0, 0.9 AS ce_recovered, "
        "7 AS alive, 1 AS dead, 0.5 AS variance_explained, 1.0 AS ce_spliced, 0.9 AS ce_clean"
    )
    names = ("tokens", "loss", "mse_loss", "sparsity_loss", "aux_loss", "l0", "variance_explained",
             "dead_fraction", "lr")  # fmt: skip
    ones = ", ".join(f"1 AS {name}" for name in names)
    con.execute(f"CREATE TABLE training_log AS SELECT 'a' AS sae, 5 AS step, {ones}")
    for kind, query in reports.KINDS.items():
        assert len(query(con, "m")) == (kind in ("qk", "heads", "training")), kind
    (row,) = quality.qk(con, "m").to_pylist()
    assert (row["l0"], row["pattern_kl"]) == (3.0, None)
    (log,) = training.rows_of(con, "training_log", ["a"]).to_pylist()
    assert (log["loss"], log["tokens_per_second"]) == (1.0, None)
    assert training.rows_of(con, "training_density", ["a"]).num_rows == 0
