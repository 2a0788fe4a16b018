"""Tables as JSON lines and Parquet: a release goes out and comes back as the same release."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atlas.errors import StoreError
from atlas.interop.dashboards.plain import read_plain, write_plain
from atlas.interop.dashboards.selection import Wanted, parse_features, select
from atlas.progress import NullProgress
from atlas.store.build import read_manifest
from atlas.store.connection import cursor, open_release
from atlas.store.indexes import INDEXES
from atlas.store.parquet import write_table
from atlas.store.release import publish
from atlas.tables import TABLES
from tests.synthetic import build_synthetic_release

SIZE = {"seed": 5, "n_layers": 2, "n_heads": 2, "d_sae": 16, "n_blocks": 16, "context": 16}
Z1 = "synthetic/L01.z.topk-16"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return build_synthetic_release(tmp_path_factory.mktemp("releases"), **SIZE)


@pytest.fixture(scope="module")
def con(release):
    return cursor(open_release(release, threads=1))


def write(con, folder, kind, wanted=Wanted(), tables=()):  # noqa: B008 - frozen
    write_plain(con, select(con, wanted), wanted, tables, folder, kind, NullProgress())
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_release_out_and_in_again_is_the_same_release(con, release, tmp_path, kind):
    folder = write(con, tmp_path / kind, kind)
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.{kind}" for name in set(TABLES) - set(INDEXES)
    }
    parts = {}
    for name in set(TABLES) - set(INDEXES):
        parts[name] = [tmp_path / f"{name}.parquet"]
        write_table(parts[name][0], name, read_plain(folder, name))
    again = publish(tmp_path / "releases", "again", parts, {})
    assert read_manifest(again.path) == read_manifest(release)
    assert read_manifest(release)["examples"][0] > 1000


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_part_of_a_release(con, tmp_path, kind):
    wanted = Wanted(saes=(Z1,), features=parse_features("1-2,9"), alive=True)
    folder = write(con, tmp_path / kind, kind, wanted)
    for name in ("examples", "features", "saes", "vocab", "training_log", "head_scores"):
        where = {
            "vocab": "true",
            "head_scores": "true",
            "saes": f"sae = '{Z1}'",
            "training_log": f"sae = '{Z1}'",
        }.get(
            name,
            f"sae = '{Z1}' AND feature IN (1, 2, 9) AND "
            f"feature IN (SELECT feature FROM features WHERE sae = '{Z1}' AND alive)",
        )
        key = ", ".join(TABLES[name].key)
        stored = con.sql(f"SELECT * FROM {name} WHERE {where} ORDER BY {key}").to_arrow_table()
        assert stored.num_rows > 0
        assert read_plain(folder, name).to_pylist() == stored.to_pylist(), name


def test_a_layer(con, tmp_path):
    folder = write(con, tmp_path / "out", "jsonl", Wanted(layers=(1,)), ["saes", "head_scores", "examples"])
    assert {path.name for path in folder.iterdir()} == {"saes.jsonl", "head_scores.jsonl", "examples.jsonl"}
    assert set(read_plain(folder, "head_scores")["layer"].to_pylist()) == {1}
    assert set(read_plain(folder, "saes")["layer"].to_pylist()) == {1}
    assert {name.split("/")[1][:3] for name in read_plain(folder, "examples")["sae"].to_pylist()} == {"L01"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_views(con, tmp_path, kind):
    folder = write(con, tmp_path / kind, kind, Wanted(saes=(Z1,)), ["dfa_sources", "sae_summary"])
    found = read_plain(folder, "dfa_sources")
    stored = con.sql(f"SELECT * FROM dfa_sources WHERE sae = '{Z1}'").to_arrow_table()
    order = [(name, "ascending") for name in ("feature", "example_group", "rank", "head", "source")]
    assert found.sort_by(order).to_pylist() == stored.sort_by(order).to_pylist()
    assert read_plain(folder, "sae_summary")["sae"].to_pylist() == [Z1]


def test_what_json_writes(con, tmp_path):
    """Bytes as hexadecimal, NULL as null, lists as lists, text as it is."""
    folder = write(con, tmp_path / "out", "jsonl", tables=["vocab", "saes", "docs"])
    vocab = [json.loads(line) for line in (folder / "vocab.jsonl").open(encoding="utf8")]
    assert vocab[0] == {
        "model": "synthetic", "token": 0, "text": "<|endoftext|>", "bytes": b"<|endoftext|>".hex()
    }  # fmt: skip
    assert any(row["text"] == "\U0001f419" for row in vocab)
    assert json.loads((folder / "saes.jsonl").open().readline())["l1_coefficient"] is None
    assert len(json.loads((folder / "docs.jsonl").open().readline())["tokens"]) == 16


def test_nan_comes_back_from_json(con, tmp_path):
    """An SAE of a site that never varies has no variance explained; JSON has no NaN."""
    rows = con.sql("SELECT * FROM sae_metrics LIMIT 2").to_arrow_table().to_pylist()
    rows[1]["variance_explained"] = None
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "sae_metrics.jsonl").write_text(lines)
    found = read_plain(tmp_path, "sae_metrics")["variance_explained"].to_pylist()
    assert found[0] == rows[0]["variance_explained"]
    assert np.isnan(found[1])


def test_parquet_of_a_table_is_a_part_of_a_release(con, tmp_path):
    folder = write(con, tmp_path / "out", "parquet", tables=["examples"])
    path = folder / "examples.parquet"
    assert pq.read_schema(path).equals(TABLES["examples"].schema)


def test_files_are_the_same_every_time(con, tmp_path):
    tables = ["examples", "head_features", "feature_families"]
    for kind in ("jsonl", "parquet"):
        a, b = (write(con, tmp_path / kind / name, kind, tables=tables) for name in "ab")
        for path in a.iterdir():
            assert path.read_bytes() == (b / path.name).read_bytes()


def test_unknown_tables_are_refused(con, tmp_path):
    with pytest.raises(StoreError, match="table 'nope' is not known; allowed: models, vocab"):
        write(con, tmp_path / "out", "jsonl", tables=["saes", "nope"])
    assert not (tmp_path / "out").exists()


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(StoreError, match=r"neither saes\.parquet nor saes\.jsonl"):
        read_plain(tmp_path, "saes")
    for text in ("{", '{"sae": 1}\n', '{"sae": "x", "model": null}\n'):
        (tmp_path / "saes.jsonl").write_text(text)
        with pytest.raises(StoreError, match="cannot read"):
            read_plain(tmp_path, "saes")
    (tmp_path / "saes.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match="cannot read"):
        read_plain(tmp_path, "saes")
    pq.write_table(pa.table({"sae": ["x"]}), tmp_path / "saes.parquet")
    with pytest.raises(StoreError, match="holds the columns sae"):
        read_plain(tmp_path, "saes")
