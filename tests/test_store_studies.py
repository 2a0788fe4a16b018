"""Studies on disk: whole, replaced by name, seen by SQL beside a release; damage is named."""

import pytest

from atlas.api import open_atlas
from atlas.errors import StoreError
from atlas.settings import load_settings
from atlas.store import studies
from atlas.store.studies import (
    remove_study,
    studies_folder,
    study_names,
    study_table,
    study_tables,
    write_study,
)
from atlas.store.study_tables import STUDY_TABLES
from tests.synthetic import build_synthetic_release

ABOUT = {"kind": "paths", "model": "m", "release": "r@1", "command": "atlas circuit scan", "settings": "{}"}


def path_row(feature=1, **more):
    return {
        "sae": "m/L01.z", "feature": feature, "up_sae": "m/L00.z", "up_feature": 2, "n": 3, "n_seen": 4,
        "mean_share": 0.5, "max_share": 0.75, "block": 0, "position": 5, "source": 4, "head": 1, **more,
    }  # fmt: skip


def test_rows_come_back_sorted_and_named():
    settings = load_settings()
    assert study_table(settings, "circuit_paths").num_rows == 0
    write_study(settings, "one", ABOUT, {"circuit_paths": [path_row(5), path_row(1)]})
    write_study(settings, "two", ABOUT, {"circuit_paths": [path_row(3)]})
    rows = study_table(settings, "circuit_paths").to_pylist()
    assert [(r["study"], r["feature"]) for r in rows] == [("one", 1), ("one", 5), ("two", 3)]
    assert study_names(settings) == ["one", "two"]
    told = study_table(settings, "studies").to_pylist()
    assert [(r["study"], r["command"]) for r in told] == [
        ("one", ABOUT["command"]),
        ("two", ABOUT["command"]),
    ]
    assert set(study_tables(settings)) == set(STUDY_TABLES)


def test_a_study_replaces_the_last_of_its_name():
    settings = load_settings()
    write_study(settings, "one", ABOUT, {"circuit_paths": [path_row(5)]})
    write_study(settings, "one", ABOUT, {"circuit_paths": [path_row(7)]})
    assert [r["feature"] for r in study_table(settings, "circuit_paths").to_pylist()] == [7]
    assert len(list(studies_folder(settings).iterdir())) == 1
    remove_study(settings, "one")
    assert study_names(settings) == []
    with pytest.raises(StoreError, match="no study 'one'; existing: none yet"):
        remove_study(settings, "one")


def test_a_reader_sees_one_whole_study_while_it_is_replaced(monkeypatch):
    settings = load_settings()

    def write(n):
        rows = [path_row(2 * n), path_row(2 * n + 1)]
        write_study(settings, "one", ABOUT, {"circuit_paths": rows})

    def seen():
        return sorted(r["feature"] for r in study_table(settings, "circuit_paths").to_pylist())

    take_away, around = studies._take_away, []

    def watched(path):
        around.append(seen())
        take_away(path)
        around.append(seen())

    write(0)
    with monkeypatch.context() as patched:
        patched.setattr(studies, "_take_away", watched)
        write(1)
    assert around in ([[0, 1], [2, 3]], [[2, 3], [2, 3]]), "before the old one goes, either is right"

    read, newer = studies._read, iter([2])

    def late(path, declared):
        for n in newer:  # takes the place of what the reader has just found
            write(n)
        return read(path, declared)

    monkeypatch.setattr(studies, "_read", late)
    assert seen() == [4, 5]
    assert next(newer, None) is None


def test_what_is_not_declared_is_refused_and_leaves_nothing():
    settings = load_settings()
    for rows, message in [
        ({"other": []}, "study table 'other' is not known"),
        ({"circuit_paths": [path_row(more=1)]}, "has no column 'more'"),
        ({"circuit_paths": [path_row(), path_row()]}, "holds a key twice"),
        ({"circuit_paths": [path_row(head=None)]}, "column 'head' has 1 NULL"),
    ]:
        with pytest.raises(StoreError, match=message):
            write_study(settings, "one", ABOUT, rows)
    with pytest.raises(StoreError, match="'a/b' is not allowed"):
        write_study(settings, "a/b", ABOUT, {})
    assert study_names(settings) == []


def test_a_damaged_file_is_named():
    settings = load_settings()
    folder = write_study(settings, "one", ABOUT, {"circuit_paths": [path_row()]})
    (folder / "circuit_paths.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(StoreError, match=r"study file .*circuit_paths\.parquet cannot be read"):
        study_table(settings, "circuit_paths")


def test_sql_joins_studies_with_a_release():
    settings = load_settings()
    build_synthetic_release(settings.releases, n_layers=1, n_heads=2, d_sae=16, n_blocks=16)
    with open_atlas() as atlas:
        sae = atlas.sql("SELECT sae FROM saes LIMIT 1")["sae"][0].as_py()
        write_study(settings, "one", ABOUT, {"circuit_paths": [path_row(sae=sae)]})
        rows = atlas.sql("SELECT p.max_share, s.layer FROM circuit_paths p JOIN saes s USING (sae)")
        assert rows["max_share"].to_pylist() == [0.75]
        assert atlas.relation("ioi_splice").fetchall() == []
