"""SAEDashboard's files against the rows they are made from, written down independently, and read back."""

import gc
import json
import tracemalloc
from collections import defaultdict
from functools import cache

import duckdb
import numpy as np
import pytest

from atlas.errors import ConfigError, StoreError
from atlas.interop.dashboards.pages import Pages
from atlas.interop.dashboards.reading import read_saedashboard, saedashboard_batches
from atlas.interop.dashboards.rows import block_tokens, columns_of, rows_of
from atlas.interop.dashboards.saedashboard import write_saedashboard
from atlas.interop.dashboards.selection import Wanted, parse_features, select
from atlas.progress import NullProgress
from atlas.store.connection import cursor, open_release
from atlas.tables import TABLES
from tests.dashboard_schemas import SAEDASHBOARD, parallel, problems
from tests.synthetic import build_synthetic_release

SIZE = {"seed": 3, "n_layers": 2, "n_heads": 4, "d_sae": 32, "n_blocks": 24, "context": 24}
Z1, Q = "synthetic/L01.z.topk-32", "synthetic/L01.H00.q.relu-16"
FOLDERS = {
    "synthetic/L00.z.topk-32": "0-z-topk-32", Z1: "1-z-topk-32", Q: "1-H00-q-relu-16",
    "synthetic/L01.H00.k.relu-16": "1-H00-k-relu-16",
}  # fmt: skip
NEAR = {"rtol": 2e-7, "atol": 1e-12}
"""Numbers of float32, written with as many digits as tell them apart."""


@pytest.fixture(scope="module")
def rows(con):
    """Every row of the release as a dict, by table and then by SAE and feature where it has them."""
    by_feature = {name: defaultdict(list) for name in (*TABLES, "activation_histogram")}
    for name in by_feature:
        for row in con.sql(f"SELECT * FROM {name}").to_arrow_table().to_pylist():
            key = (row["sae"], row["feature"]) if {"sae", "feature"} <= row.keys() else None
            by_feature[name][key].append(row)
    return by_feature


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    return cursor(open_release(build_synthetic_release(tmp_path_factory.mktemp("releases"), **SIZE)))


@pytest.fixture(scope="module")
def written(con, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    write(con, folder, Wanted(), size=10)
    return folder / "synthetic"


def write(con, folder, wanted, size=128, find=lambda part: None, progress=None):
    pages = Pages(con, find)
    write_saedashboard(pages, select(con, wanted), folder, {"release": "r"}, progress or NullProgress(), size)


@cache
def entries(folder):
    """Every feature of a folder of batches, in the order of the files."""
    found = []
    for number in range(len(list(folder.glob("batch-*.json")))):
        found += json.loads((folder / f"batch-{number}.json").read_text("utf8"))["features"]
    return found


def every_entry(written):
    for sae, folder in FOLDERS.items():
        for entry in entries(written / folder):
            yield sae, entry["feature_index"], entry


def words(rows):
    return [row["bytes"].decode("utf8", "replace") for row in rows["vocab"][None]]


def test_files_fit_the_schema(written):
    assert {path.name for path in written.iterdir()} == set(FOLDERS.values())
    for sae, folder in FOLDERS.items():
        for path in (written / folder).glob("batch-*.json"):
            batch = json.loads(path.read_text("utf8"))
            assert problems(batch, SAEDASHBOARD) == []
            assert [parallel(entry) for entry in batch["features"]] == [[]] * len(batch["features"])
            assert len(batch["features"]) <= 10
            assert (batch["model_id"], batch["layer"]) == ("synthetic", int(folder[0]))
            assert batch["sae_set"] == folder[2:]
        n = 32 if ".z." in sae else 16
        assert [entry["feature_index"] for entry in entries(written / folder)] == list(range(n))


def test_the_checker_sees_what_is_wrong(written):
    batch = json.loads((written / "1-z-topk-32" / "batch-0.json").read_text("utf8"))
    batch["features"][0]["values"] = 1
    del batch["features"][1]["vector"]
    batch["features"][2]["activations"][0]["tokens"][3] = None
    batch["features"][3]["frac_nonzero"] = True
    assert len(problems(batch, SAEDASHBOARD)) == 4


def test_statistics(written, rows):
    for sae, feature, entry in every_entry(written):
        (row,) = rows["features"][sae, feature]
        assert entry["frac_nonzero"] == pytest.approx(row["density"], rel=1e-12)
        bins = [b for b in rows["activation_histogram"][sae, feature] if b["scale"] == "linear"]
        assert entry["freq_hist_data_bar_heights"] == [b["n"] for b in bins]
        middles = [(b["low"] + b["high"]) / 2 for b in bins]
        np.testing.assert_allclose(entry["freq_hist_data_bar_values"], middles, rtol=3e-7)
        assert sum(entry["freq_hist_data_bar_heights"]) == row["n_active"]
        assert (entry["n_prompts_total"], entry["n_tokens_in_prompt"]) == (24, 24)
        assert entry["dataset"] == "synthetic"


def test_logits(written, rows):
    texts = words(rows)
    for sae, feature, entry in every_entry(written):
        for name, sign in (("pos", 1), ("neg", -1)):
            found = [r for r in rows["logit_effects"][sae, feature] if r["sign"] == sign]
            found.sort(key=lambda r: r["rank"])
            assert entry[f"{name}_str"] == [texts[r["token"]] for r in found]
            np.testing.assert_allclose(entry[f"{name}_values"], [r["value"] for r in found], **NEAR)
        histogram = rows["logit_histogram"][sae, feature]
        if histogram:
            low, high, n = (histogram[0][c] for c in ("low", "high", "n"))
            assert entry["logits_hist_data_bar_heights"] == n
            middles = [low + (high - low) * (i + 0.5) / len(n) for i in range(len(n))]
            np.testing.assert_allclose(entry["logits_hist_data_bar_values"], middles, rtol=1e-5, atol=1e-6)


def test_correlated_features_and_head_shares(written, rows):
    for sae, feature, entry in every_entry(written):
        together = sorted(
            rows["coactivation"][sae, feature], key=lambda r: (-np.float32(r["pearson"]), r["other"])
        )
        assert entry["correlated_features_indices"] == [r["other"] for r in together]
        np.testing.assert_allclose(
            entry["correlated_features_pearson"], [r["pearson"] for r in together], rtol=1e-6
        )
        shares = [r["decoder_share"] for r in rows["head_attribution"][sae, feature]]
        np.testing.assert_allclose(entry["decoder_weights_dist"], shares, rtol=1e-6)
        assert len(shares) == (4 if ".z." in sae else 0)
        assert entry["correlated_neurons_indices"] == entry["vector"] == entry["neuron_alignment_l1"] == []


def expected_activations(rows, sae, feature):
    """The activations of a feature in the format's order, from the rows, in plain loops."""
    texts, (row,) = words(rows), rows["features"][sae, feature]
    blocks = {r["block"]: r["tokens"] for r in rows["docs"][None]}
    dfa = {(r["example_group"], r["rank"]): r for r in rows["dfa"][sae, feature]}
    order = ["top", *(f"q{q}" for q in range(9, -1, -1)), "random"]
    found = []
    for group in order:
        kept = [r for r in rows["examples"][sae, feature] if r["example_group"] == group]
        for example in sorted(kept, key=lambda r: r["rank"]):
            values = [0.0] * 24
            for place, value in zip(example["active_positions"], example["active_values"], strict=True):
                values[place] = value
            values[example["position"]] = example["activation"]
            bins = {"top": (-1, row["max_activation"], -1), "random": (0, 0, 0)}.get(group)
            if bins is None:
                low, high = row["quantiles"][int(group[1])], row["quantiles"][int(group[1]) + 1]
                bins = low, high, row["density"] / 10
            tokens = [texts[t] for t in blocks[example["block"]]]
            by_source = None
            if (group, example["rank"]) in dfa:
                made = dfa[group, example["rank"]]
                by_source = [0.0] * 24
                for one in made["sources"]:
                    by_source[one["source"]] += one["weight"] * np.float32(made["unit"])
            found.append((example, bins, tokens, values, by_source))
    return found


def test_activations(written, rows):
    n_dfa = 0
    for sae, feature, entry in every_entry(written):
        expected = expected_activations(rows, sae, feature)
        assert len(entry["activations"]) == len(expected)
        for shown, (example, bins, tokens, values, by_source) in zip(
            entry["activations"], expected, strict=True
        ):
            found = [shown["bin_min"], shown["bin_max"], shown["bin_contains"]]
            np.testing.assert_allclose(found, bins, rtol=2e-7)
            assert shown["tokens"] == tokens
            np.testing.assert_allclose(shown["values"], values, **NEAR)
            assert shown["qualifying_token_index"] == example["position"]
            assert shown["values"][example["position"]] == pytest.approx(example["activation"], rel=2e-7)
            assert ("dfa_values" in shown) == (by_source is not None) == (".z." in sae)
            if by_source is not None:
                n_dfa += 1
                np.testing.assert_allclose(shown["dfa_values"], by_source, rtol=1e-6, atol=1e-7)
                assert shown["dfa_maxValue"] == max(shown["dfa_values"])
                assert shown["dfa_targetIndex"] == example["position"]
                assert not any(shown["dfa_values"][example["position"] + 1 :])
    assert n_dfa > 500


def test_near_misses_are_left_out(written, rows):
    n = sum(r["example_group"] == "negative" for found in rows["examples"].values() for r in found)
    assert n > 0
    for _, _, entry in every_entry(written):
        assert all(shown["values"][shown["qualifying_token_index"]] > 0 for shown in entry["activations"])


def test_read_back_equals_the_release(written, con):
    """Every column that the format holds, for every SAE, in the table's own order and types."""
    for sae, folder in FOLDERS.items():
        found = read_saedashboard(written / folder)
        for name, columns, where in (
            ("features", "feature n_active density max_activation", "true"),
            ("activation_histogram", "feature scale bin low high n", "scale = 'linear'"),
            ("logit_effects", "feature sign rank value", "true"),
            ("logit_histogram", "feature low high n", "true"),
            ("head_attribution", "feature head decoder_share", "true"),
            ("examples", "feature example_group rank position activation active_positions active_values",
             "example_group <> 'negative'"),
        ):  # fmt: skip
            same_rows(found[name], con, name, columns.split(), f"sae = '{sae}' AND {where}")
        assert set(found["examples"]["block"].to_pylist()) <= {None}
        together = con.sql(
            f"SELECT feature, other, pearson FROM coactivation WHERE sae = '{sae}' ORDER BY 1, 3 DESC, 2"
        ).fetchall()
        assert list(zip(*found["coactivation"].select(["feature", "other", "pearson"]).to_pydict().values(),
                        strict=True)) == together  # fmt: skip


def same_rows(found, con, name, columns, where):
    stored = con.sql(f"SELECT {', '.join(columns)} FROM {name} WHERE {where}").to_arrow_table()
    key = TABLES[name].key if name in TABLES else ("feature", "scale", "bin")
    order = [(column, "ascending") for column in key if column in columns]
    stored, shown = stored.sort_by(order), found.select(columns).sort_by(order)
    assert shown.num_rows == stored.num_rows, name
    for column in columns:
        mine, theirs = shown[column].to_pylist(), stored[column].to_pylist()
        if theirs and isinstance(theirs[0], list):
            lengths = [[len(one) for one in side] for side in (mine, theirs)]
            assert lengths[0] == lengths[1], f"{name}.{column}"
            mine, theirs = (np.concatenate(side) for side in (mine, theirs))
            atol = max(theirs) / 4095 if column == "active_values" else 0  # stored rounded
            np.testing.assert_allclose(mine, theirs, rtol=2e-7, atol=atol, err_msg=f"{name}.{column}")
        elif theirs and isinstance(theirs[0], float):
            rtol = (
                1 / 4095 if column == "max_activation" else 2e-6
            )  # the largest of active_values, as rounded
            np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=1e-6, err_msg=f"{name}.{column}")
        else:
            assert mine == theirs, f"{name}.{column}"


def test_reading_goes_a_file_at_a_time(written):
    folder = written / "1-z-topk-32"
    batches = list(saedashboard_batches(folder))
    assert [batch["features"].num_rows for batch in batches] == [10, 10, 10, 2]
    assert batches[3]["features"]["feature"].to_pylist() == [30, 31]
    assert set(batches[0]["features"]["sae"].to_pylist()) == {Z1}


def test_file_size_changes_no_feature(con, written, tmp_path):
    write(con, tmp_path, Wanted(saes=(Z1,)), size=128)
    assert entries(tmp_path / "synthetic" / "1-z-topk-32") == entries(written / "1-z-topk-32")


def test_two_exports_are_equal(con, tmp_path):
    for name in ("a", "b"):
        write(con, tmp_path / name, Wanted(saes=(Z1,)), size=16)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.json"))
    assert len(files) == 3
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_part_of_a_release(con, tmp_path, rows):
    wanted = Wanted(sites=("z",), layers=(1,), features=parse_features("0-3,9"), alive=True)
    write(con, tmp_path, wanted, size=2)
    (folder,) = (tmp_path / "synthetic").iterdir()
    alive = [f for f in (0, 1, 2, 3, 9) if rows["features"][Z1, f][0]["alive"]]
    assert [entry["feature_index"] for entry in entries(folder)] == alive


def test_progress_reaches_the_end(con, tmp_path):
    told = []

    class Seen:
        def update(self, done, total, message=""):
            told.append((done, total))

    write(con, tmp_path, Wanted(saes=(Z1, Q)), size=8, progress=Seen())
    assert told == sorted(told)
    assert told[-1] == (48, 48)


def test_memory_does_not_grow_with_the_features(con, tmp_path):
    def peak(name, features):
        gc.collect()
        tracemalloc.start()
        try:
            write(con, tmp_path / name, Wanted(saes=(Z1,), features=(features,)), size=4)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak("warm", range(4))
    assert peak("all", range(32)) < 1.3 * max(peak(str(i), range(i, i + 4)) for i in range(0, 32, 4))


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Wanted(saes=("nope",)), "SAE 'nope' is not in this release; allowed: synthetic/L00.z.topk-32"),
        (Wanted(layers=(7,)), "layer 7 is not in this release; allowed: 0, 1"),
        (Wanted(sites=("mlp_out",)), "site 'mlp_out' is not in this release; allowed: z, q, k"),
        (Wanted(sites=("q",), layers=(0,)), "no SAE that fits"),
        (Wanted(saes=(Z1,), features=(range(31, 33),)), "feature 32 is not in .*; allowed: 0 to 31"),
    ],
)
def test_what_the_release_lacks_is_refused(con, wanted, says):
    with pytest.raises(StoreError, match=says):
        select(con, wanted)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1-2-3", "9999999999"])
def test_features_that_cannot_be_read(text):
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_features(text)


# --------------------------------------------------------------------------- other programs' files


def foreign_batch(activations):
    lists = [
        "neuron_alignment_indices", "correlated_features_indices", "correlated_features_pearson", "neg_str",
        "neg_values", "logits_hist_data_bar_values", "logits_hist_data_bar_heights", "decoder_weights_dist",
    ]  # fmt: skip
    entry = {name: [] for name in lists} | {
        "feature_index": 5, "frac_nonzero": 0.25, "pos_str": [" a"], "pos_values": [1.5],
        "freq_hist_data_bar_values": [0.5, 1.5], "freq_hist_data_bar_heights": [30.0, 2.0],
        "activations": activations,
    }  # fmt: skip
    return {"model_id": "m", "layer": 3, "sae_set": "res", "sae_id_suffix": None, "features": [entry]}


def shown(low, high, contains, values):
    return {"bin_min": low, "bin_max": high, "bin_contains": contains, "tokens": ["x", "y"],
            "values": values, "qualifying_token_index": values.index(max(values))}  # fmt: skip


def test_intervals_of_another_program(tmp_path):
    """Five intervals of equal width, as SAEDashboard cuts them, are numbered from the strongest down."""
    activations = [shown(-1, 2.0, -1, [0.0, 2.0]), shown(1.0, 2.0, 0.01, [1.5, 0.0]),
                   shown(1.0, 2.0, 0.01, [1.25, 0.0]), shown(0.0, 1.0, 0.2, [0.0, 0.5])]  # fmt: skip
    (tmp_path / "batch-0.json").write_text(json.dumps(foreign_batch(activations)))
    found = read_saedashboard(tmp_path)
    examples = found["examples"].to_pydict()
    assert examples["sae"] == ["m/3-res"] * 4
    assert examples["example_group"] == ["top", "q9", "q9", "q8"]
    assert examples["rank"] == [0, 0, 1, 0]
    assert examples["activation"] == [2.0, 1.5, 1.25, 0.5]
    assert found["features"].to_pylist() == [
        {"sae": "m/3-res", "feature": 5, "n_active": 32, "density": 0.25, "max_activation": 2.0}
    ]
    assert found["activation_histogram"].select(["low", "high", "n"]).to_pylist() == [
        {"low": 0.0, "high": 1.0, "n": 30}, {"low": 1.0, "high": 2.0, "n": 2}
    ]  # fmt: skip
    assert found["dfa"].num_rows == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "cannot read"), ("{", "cannot read"), ("[]", "no batch of SAEDashboard"),
        ('{"features": []}', "no batch of SAEDashboard"),
        (json.dumps(foreign_batch([{"values": []}])), "no batch of SAEDashboard"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path, content, says):
    (tmp_path / "batch-0.json").write_text(content)
    with pytest.raises(StoreError, match=says):
        read_saedashboard(tmp_path)


def test_a_folder_without_batches_is_refused(tmp_path):
    with pytest.raises(StoreError, match="holds no batch"):
        read_saedashboard(tmp_path)


# --------------------------------------------------------------------------- releases of other versions


def test_a_release_without_a_table_has_no_rows_of_it_and_one_without_a_column_is_refused():
    con = duckdb.connect(":memory:")
    con.execute("CREATE TABLE examples (sae VARCHAR, feature INTEGER, rank SMALLINT)")
    con.execute("INSERT INTO examples VALUES ('s', 1, 0), ('s', 2, 1), ('s', 2, 0), ('t', 2, 5)")
    there, features = columns_of(con), np.array([1, 2, 3])
    found = rows_of(con, there, "examples", ["rank"], "s", features, order="rank")
    assert [found.columns(f)["rank"] for f in (1, 2, 3)] == [[0], [0, 1], []]
    assert rows_of(con, there, "dfa", ["unit"], "s", features).columns(2) == {"feature": [], "unit": []}
    with pytest.raises(StoreError, match="'examples' of this release lacks a column of feature, rank, block"):
        rows_of(con, there, "examples", ["rank", "block"], "s", features)


def test_text_that_is_not_there_is_refused():
    con = duckdb.connect(":memory:")
    con.execute("CREATE TABLE docs AS SELECT 3::INTEGER AS block, [7, 8] AS tokens, 'd' AS source")
    assert block_tokens(con, np.array([3, 3])) == {3: ([7, 8], "d")}
    assert block_tokens(con, np.array([], np.int64)) == {}
    with pytest.raises(StoreError, match="lacks the text of block 5"):
        block_tokens(con, np.array([5, 3]))
