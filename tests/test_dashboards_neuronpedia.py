"""Neuronpedia's folder for bulk import: its shape, what is in it, that it never changes, and the way back."""

import gzip
import json
from datetime import datetime

import numpy as np
import pyarrow as pa
import pytest

from atlas.db.arrow import SCHEMAS
from atlas.errors import StoreError
from atlas.interop.dashboards.neuronpedia import CREATOR, Source, write_neuronpedia
from atlas.interop.dashboards.pages import Pages
from atlas.interop.dashboards.reading import neuronpedia_batches, read_neuronpedia, read_saedashboard
from atlas.interop.dashboards.saedashboard import write_saedashboard
from atlas.interop.dashboards.selection import Wanted, select
from atlas.progress import NullProgress
from atlas.store.connection import cursor, open_release
from tests import dashboard_schemas as schemas
from tests.dashboard_schemas import parallel, problems
from tests.synthetic import build_synthetic_release

SIZE = {"seed": 4, "n_layers": 1, "n_heads": 3, "d_sae": 24, "n_blocks": 20, "context": 20}
Z, Q = "synthetic/L00.z.topk-24", "synthetic/L00.H00.q.relu-12"
CREATED = "2026-05-04T03:02:01.123456+02:00"


def note(sae, feature, annotator, label, **more):
    empty = {"tags": [], "interpretability": None, "notes": "", "version": 1}
    times = dict.fromkeys(("created_at", "updated_at"), datetime(2026, 1, 2, 3, 4, 5))
    return empty | {"sae": sae, "feature": feature, "annotator": annotator, "label": label} | times | more


LABELS = pa.Table.from_pylist(
    [
        note(Z, 3, "ann", "digits", tags=["a", "b"], interpretability="clear", notes="see head 2"),
        note(Z, 3, "bob", "numbers"),
        note(Z, 4, "ann", ""),
        note(Z, 20, "ann", "late"),
        note(Q, 3, "ann", "of q"),
    ],
    schema=SCHEMAS["feature_annotations"],
)


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    return cursor(open_release(build_synthetic_release(tmp_path_factory.mktemp("releases"), **SIZE)))


def write(con, folder, wanted=Wanted(), size=9, **source):  # noqa: B008 - frozen
    said = {"release": "demo.1", "created": CREATED, "labels": LABELS, "made_from": {"release": "demo.1@2"}}
    pages = Pages(con, lambda part: None)
    write_neuronpedia(pages, select(con, wanted), folder, Source(**said | source), NullProgress(), size)
    return folder / "synthetic"


@pytest.fixture(scope="module")
def written(con, tmp_path_factory):
    return write(con, tmp_path_factory.mktemp("export"))


def lines(path):
    raw = path.read_bytes()
    text = gzip.decompress(raw) if path.suffix == ".gz" else raw
    return [json.loads(line) for line in text.split(b"\n") if line]


def all_lines(folder, kind):
    numbers = range(len(list((folder / kind).glob("*.gz"))) + 5)
    paths = [folder / kind / f"batch-{number}.jsonl.gz" for number in numbers]
    return [line for path in paths if path.exists() for line in lines(path)]


@pytest.mark.parametrize("source", ["0-z-topk-24", "0-H00-q-relu-12", "0-H00-k-relu-12"])
def test_the_folder_fits_the_schema(written, source):
    folder = written / source
    for name, schema in (
        ("release", schemas.NP_RELEASE),
        ("model", schemas.NP_MODEL),
        ("sourceset", schemas.NP_SOURCE_SET),
        ("source", schemas.NP_SOURCE),
    ):
        (row,) = lines(folder / f"{name}.jsonl")
        assert problems(row, schema) == [], name
    for kind, schema in (
        ("features", schemas.NP_FEATURE),
        ("activations", schemas.NP_ACTIVATION),
        ("explanations", schemas.NP_EXPLANATION),
    ):
        found = all_lines(folder, kind)
        assert problems(found, [schema]) == [], kind
    assert [parallel(row) for row in all_lines(folder, "features")] == [[]] * (24 if "-z-" in source else 12)
    everything = {p.name for p in folder.iterdir()}
    assert everything == {
        "release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl", "features", "activations",
        "explanations",
    }  # fmt: skip


def test_rows_refer_to_each_other(written):
    folder = written / "0-z-topk-24"
    (release,), (model,) = lines(folder / "release.jsonl"), lines(folder / "model.jsonl")
    (source_set,), (source,) = lines(folder / "sourceset.jsonl"), lines(folder / "source.jsonl")
    assert (release["name"], source_set["releaseName"]) == ("demo-1", "demo-1")
    assert source["id"] == folder.name
    assert source["setName"] == source_set["name"] == "z-topk-24"
    assert {row["modelId"] for row in (source, source_set)} == {model["id"]} == {"synthetic"}
    assert (model["layers"], model["dimension"]) == (1, 24)
    features, activations = all_lines(folder, "features"), all_lines(folder, "activations")
    assert [row["index"] for row in features] == [str(i) for i in range(24)]
    assert {row["index"] for row in activations} <= {row["index"] for row in features}
    for row in [*features, *activations, release, model, source_set, source]:
        assert row["creatorId"] == CREATOR
        assert row["createdAt"] == "2026-05-04T01:02:01.123Z"
    assert {row["layer"] for row in [*features, *activations]} == {folder.name}
    assert len({row["id"] for row in activations}) == len(activations)
    assert {len(row["id"]) for row in activations} == {25}


def test_what_the_source_set_shows(written):
    for source, heads in (("0-z-topk-24", True), ("0-H00-q-relu-12", False)):
        (row,) = lines(written / source / "sourceset.jsonl")
        assert row["showDfa"] is row["showHeadAttribution"] is heads
        assert row["showCorrelated"] is True


def test_features_and_activations_say_what_saedashboard_says(con, written, tmp_path):
    parts = select(con, Wanted(saes=(Z,)))
    write_saedashboard(Pages(con, lambda part: None), parts, tmp_path, {}, NullProgress())
    batch = json.loads((tmp_path / "synthetic" / "0-z-topk-24" / "batch-0.json").read_text("utf8"))
    activations = all_lines(written / "0-z-topk-24", "activations")
    for entry, row in zip(batch["features"], all_lines(written / "0-z-topk-24", "features"), strict=True):
        for name in schemas.SHOWN:
            assert row[name] == entry[name], name
        mine = [one for one in activations if one["index"] == row["index"]]
        assert len(mine) == len(entry["activations"])
        for one, shown in zip(mine, entry["activations"], strict=True):
            assert one["tokens"] == shown["tokens"]
            assert one["values"] == shown["values"]
            assert one["dfaValues"] == shown["dfa_values"]
            assert one["dfaTargetIndex"] == one["qualifyingTokenIndex"] == shown["qualifying_token_index"]
            bins = [one[name] for name in ("binMin", "binMax", "binContains")]
            assert bins == [shown[name] for name in ("bin_min", "bin_max", "bin_contains")]
            assert one["maxValue"] == max(one["values"]) == one["values"][one["maxValueTokenIndex"]]
            assert one["minValue"] == min(one["values"])
        largest = max((max(one["values"]) for one in mine), default=0.0)
        assert row["maxActApprox"] == pytest.approx(largest, rel=1 / 4095)  # activations are stored rounded


def test_neighbours_are_the_nearest_decoder_rows(con, written):
    stored = con.sql(
        "SELECT feature, list(other ORDER BY rank), list(cosine ORDER BY rank) FROM neighbours "
        f"WHERE sae = '{Z}' AND direction = 'decoder' AND scope = 'within' GROUP BY 1 ORDER BY 1"
    ).fetchall()
    rows = all_lines(written / "0-z-topk-24", "features")
    assert len(stored) == len(rows)
    for (feature, others, cosines), row in zip(stored, rows, strict=True):
        assert (str(feature), others) == (row["index"], row["topkCosSimIndices"])
        np.testing.assert_allclose(row["topkCosSimValues"], cosines, rtol=1e-6)


def test_labels_become_explanations(written):
    found = all_lines(written / "0-z-topk-24", "explanations")
    assert [(row["index"], row["description"]) for row in found] == [
        ("3", "digits"), ("3", "numbers"), ("20", "late")
    ]  # fmt: skip
    assert found[0]["notes"] == "ann; clear; a, b; see head 2"
    assert found[0]["createdAt"] == "2026-01-02T03:04:05.000Z"
    assert len({row["id"] for row in found}) == 3
    (of_q,) = all_lines(written / "0-H00-q-relu-12", "explanations")
    assert (of_q["index"], of_q["layer"], of_q["description"]) == ("3", "0-H00-q-relu-12", "of q")


def test_two_exports_are_equal_bit_for_bit(con, written, tmp_path):
    again = write(con, tmp_path)
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert len(files) > 20
    for path in files:
        assert (written / path).read_bytes() == (again / path).read_bytes(), path


def test_another_creator_and_no_labels(con, tmp_path):
    folder = write(con, tmp_path, Wanted(saes=(Q,)), creator="me", labels=None) / "0-H00-q-relu-12"
    assert {row["creatorId"] for row in all_lines(folder, "features")} == {"me"}
    assert list((folder / "explanations").iterdir()) == []


def test_read_back_equals_the_release(con, written):
    """Blocks, groups and ranks come back exactly, and the rest as from SAEDashboard's files."""
    for sae, source in ((Z, "0-z-topk-24"), (Q, "0-H00-q-relu-12")):
        found = read_neuronpedia(written / source)
        key = "feature, example_group, rank"
        stored = con.sql(
            f"SELECT {key}, block, position, activation FROM examples WHERE sae = '{sae}' "
            f"AND example_group <> 'negative' ORDER BY {key}"
        ).fetchall()
        order = [(name, "ascending") for name in ("feature", "example_group", "rank")]
        mine = found["examples"].sort_by(order).select(
            ["feature", "example_group", "rank", "block", "position", "activation"]
        )  # fmt: skip
        assert list(zip(*mine.to_pydict().values(), strict=True)) == stored
        texts = con.execute(
            "SELECT block, list_transform(tokens, lambda t: t) FROM docs ORDER BY block"
        ).fetchall()
        words = [raw.decode("utf8", "replace") for (raw,) in
                 con.sql("SELECT bytes FROM vocab ORDER BY token").fetchall()]  # fmt: skip
        blocks = {block: [words[t] for t in tokens] for block, tokens in texts}
        for row in found["examples"].to_pylist():
            assert row["tokens"] == blocks[row["block"]]
        sql = f"SELECT n_active FROM features WHERE sae = '{sae}' ORDER BY feature"
        assert found["features"]["n_active"].to_pylist() == [n for (n,) in con.sql(sql).fetchall()]
    labels = read_neuronpedia(written / "0-z-topk-24")["feature_annotations"]
    assert labels.select(["sae", "feature", "label"]).to_pylist()[1] == {
        "sae": Z, "feature": 3, "label": "numbers"
    }  # fmt: skip


def test_dfa_by_source_comes_back(con, written):
    stored = con.sql(
        f"""SELECT feature, example_group, rank, source, sum(contribution::DOUBLE) AS total FROM dfa_sources
        WHERE sae = '{Z}' GROUP BY ALL"""
    ).fetchall()
    expected = {(f, group, rank, source): total for f, group, rank, source, total in stored}
    found = {}
    for row in read_neuronpedia(written / "0-z-topk-24")["dfa"].to_pylist():
        for source, value in enumerate(row["by_source"]):
            if value:
                found[row["feature"], row["example_group"], row["rank"], source] = value
    assert set(found) <= set(expected)
    for key, total in expected.items():
        assert found.get(key, 0.0) == pytest.approx(total, rel=1e-5, abs=1e-6)


def test_both_formats_read_back_alike(con, written, tmp_path):
    parts = select(con, Wanted(saes=(Z,)))
    write_saedashboard(Pages(con, lambda part: None), parts, tmp_path, {}, NullProgress())
    ours = read_saedashboard(tmp_path / "synthetic" / "0-z-topk-24")
    theirs = read_neuronpedia(written / "0-z-topk-24")
    for name in (
        "features",
        "activation_histogram",
        "logit_effects",
        "coactivation",
        "head_attribution",
        "dfa",
    ):
        assert ours[name].equals(theirs[name]), name
    assert ours["examples"].drop_columns("block").equals(theirs["examples"].drop_columns("block"))


def test_reading_goes_a_file_at_a_time(written):
    numbers = [batch["features"].num_rows for batch in neuronpedia_batches(written / "0-z-topk-24")]
    assert numbers == [9, 9, 6]


def test_a_damaged_folder_is_refused(con, tmp_path):
    with pytest.raises(StoreError, match=r"source\.jsonl"):
        read_neuronpedia(tmp_path)
    folder = write(con, tmp_path, Wanted(saes=(Q,))) / "0-H00-q-relu-12"
    path = folder / "activations" / "batch-0.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"cannot read .*activations"):
        read_neuronpedia(folder)
    (folder / "features" / "batch-0.jsonl.gz").write_bytes(gzip.compress(b'{"index": "0"}\n'))
    path.unlink()
    with pytest.raises(StoreError, match="no batch of Neuronpedia"):
        read_neuronpedia(folder)
