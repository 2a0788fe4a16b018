"""A release is built whole, verified, versioned, and never disturbs the one before it."""

import errno
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas.errors import ConflictError, StoreError
from atlas.store import atomic, build, release
from atlas.store.connection import cursor, open_release
from atlas.store.parquet import write_table
from atlas.store.shorten import shortened
from atlas.store.view_columns import VIEW_COLUMNS
from atlas.store.views import VIEWS
from atlas.tables import TABLES
from tests.synthetic import DERIVED, build_synthetic_release, synthetic_rows, to_arrow

WHO = {"seed": "0"}


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    return build_synthetic_release(tmp_path_factory.mktemp("releases"), n_layers=2, d_sae=16, n_blocks=12)


@pytest.fixture
def part(tmp_path):
    return vocab(tmp_path / "parts" / "vocab.parquet", range(6))


def vocab(path, tokens):
    tokens = list(tokens)
    data = {"model": ["m"] * len(tokens), "token": pa.array(tokens, pa.int32())}
    data |= {"text": [f"t{t}" for t in tokens], "bytes": [b"%d" % t for t in tokens]}
    write_table(path, "vocab", pa.table(data))
    return path


def files(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def rows(path, query):
    connection = open_release(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def test_every_table_is_stored_as_it_was_given(synthetic):
    wanted = synthetic_rows(0, 2, 4, 16, 12, 32)
    connection = open_release(synthetic)
    for name, table in TABLES.items():
        if name in DERIVED:
            continue  # tests/test_store_derived.py
        found = connection.sql(f"SELECT * FROM {name}").to_arrow_table()
        assert found.cast(table.schema).equals(shortened(to_arrow(name, wanted[name]), table)), name
        assert found.num_rows > 0, name


def test_manifest_and_provenance(synthetic):
    manifest = build.read_manifest(synthetic)
    assert set(manifest) == set(TABLES)
    assert manifest["models"][0] == 1
    provenance = build.read_provenance(synthetic)
    assert provenance["release"] == "synthetic"
    assert provenance["release_version"] == "1"
    assert json.loads(provenance["config"])["n_layers"] == 2


def test_comments_carry_meaning_and_unit(synthetic):
    found = dict(rows(synthetic, "SELECT table_name, comment FROM duckdb_tables()"))
    assert found["docs"] == "One row per block of the analysed text"
    query = "SELECT column_name, comment FROM duckdb_columns() WHERE table_name = 'sae_metrics'"
    assert dict(rows(synthetic, query))["kl"] == "mean KL(p_clean || p_spliced) [nats]"
    query = "SELECT count(*) FROM duckdb_columns() WHERE comment IS NULL AND NOT internal"
    assert rows(synthetic, query) == [(0,)]
    query = "SELECT column_name, comment FROM duckdb_columns() WHERE table_name = 'dfa_packed'"
    found = dict(rows(synthetic, query))
    assert found["by_head"].startswith("in steps of 2^by_head_exponent: each head's part")
    assert found["by_head_exponent"] == "log2 of one step of by_head"


def test_views_have_the_columns_that_are_declared(synthetic):
    assert set(VIEW_COLUMNS) == {view.name for view in VIEWS}
    for name, declared in VIEW_COLUMNS.items():
        query = f"SELECT column_name, column_type FROM (DESCRIBE {name})"
        assert rows(synthetic, query) == [(c.name, build.sql_type(c.type)) for c in declared]
        for column in (c.name for c in declared if not c.nullable):
            assert rows(synthetic, f'SELECT count(*) FROM {name} WHERE "{column}" IS NULL') == [(0,)]


def test_synthetic_release_is_true_to_the_definitions(synthetic):
    """Shares and FVE sum to 1; DFA plus bias is the pre-activation; kept sources sum within their head."""
    ones = rows(synthetic, "SELECT sum(decoder_share), sum(fve) FROM head_attribution GROUP BY sae, feature")
    assert all(abs(a - 1) < 4e-5 and abs(b - 1) < 4e-5 for a, b in ones)
    query = """SELECT max(abs(list_sum(by_head) + bias_term - pre_activation) /
               list_max(list_transform(by_head, lambda x: abs(x)))) FROM dfa"""
    assert rows(synthetic, query)[0][0] < 4 * 2.0**-12 + 1e-5  # 4 heads, each rounded
    query = """SELECT max(abs(d.pre_activation - e.activation)) FROM dfa d
               JOIN examples e USING (sae, feature, example_group, rank)"""
    assert rows(synthetic, query)[0][0] == 0
    query = """SELECT count(*) FROM examples e JOIN docs USING (block)
               WHERE e.position >= len(tokens) OR e.position = 0"""
    assert rows(synthetic, query) == [(0,)]
    best = rows(
        synthetic, "SELECT layer, head, arg_max(score, value) FROM head_scores GROUP BY ALL ORDER BY ALL"
    )
    styles = {(layer, head): score for layer, head, score in best}
    assert styles[0, 0] == "previous_token"
    assert styles[0, 1] == "duplicate"
    assert styles[1, 1] == "induction"
    assert styles[1, 2] == "first_token"


def test_head_features_ranks_each_head(synthetic):
    query = """SELECT feature FROM head_features
               WHERE layer = 1 AND head = 2 AND decoder_rank < 5 ORDER BY decoder_rank"""
    wanted = """SELECT feature FROM head_attribution a JOIN features f USING (sae, feature)
                JOIN saes USING (sae)
                WHERE layer = 1 AND a.head = 2 ORDER BY f.alive DESC, decoder_share DESC LIMIT 5"""
    assert rows(synthetic, query) == rows(synthetic, wanted)
    query = """SELECT count(*), count(DISTINCT fve_rank), max(fve_rank) FROM head_features
               WHERE layer = 0 AND head = 0"""
    assert rows(synthetic, query) == [(16, 16, 15)]


def test_sae_summary_has_one_row_per_sae(synthetic):
    wanted = rows(synthetic, "SELECT sae FROM saes ORDER BY ALL")
    assert rows(synthetic, "SELECT sae FROM sae_summary WHERE l0 IS NOT NULL ORDER BY ALL") == wanted


@given(st.permutations(range(6)), st.lists(st.integers(0, 6), max_size=3))
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_split_into_parts_gives_the_same_release(tmp_path_factory, part, order, places):
    """Rows dealt over parts in any way are the same content, sorted the same."""
    folder = tmp_path_factory.mktemp("split")
    edges = [0, *sorted(places), 6]
    parts = [
        vocab(folder / f"{i}.parquet", sorted(order[a:b]))
        for i, (a, b) in enumerate(itertools.pairwise(edges))
    ]
    one = release.publish(folder / "one", "r", {"vocab": [part]}, WHO)
    many = release.publish(folder / "many", "r", {"vocab": parts}, WHO)
    assert one.digest == many.digest
    assert build.read_manifest(one.path) == build.read_manifest(many.path)
    assert rows(many.path, "SELECT token FROM vocab") == [(t,) for t in range(6)]


def test_parts_follow_each_other_where_their_keys_do_and_are_sorted_where_not(tmp_path):
    parts = {name: vocab(tmp_path / f"{name}.parquet", tokens) for name, tokens in (
        ("high", range(10, 14)), ("low", range(5)), ("none", []), ("one", [7]), ("among", [3, 11]),
    )}  # fmt: skip
    apart = [parts[name] for name in ("high", "none", "one", "low")]
    wanted = [parts[name] for name in ("low", "one", "high")]
    assert build.in_key_order(apart, TABLES["vocab"]) == wanted
    assert build.in_key_order([*apart, parts["among"]], TABLES["vocab"]) is None
    assert build.in_key_order([parts["one"], parts["one"]], TABLES["vocab"]) is None
    assert build.in_key_order([parts["none"]], TABLES["vocab"]) == []
    info = release.publish(tmp_path / "r", "x", {"vocab": apart}, WHO)
    assert rows(info.path, "SELECT token FROM vocab") == [(t,) for t in [*range(5), 7, *range(10, 14)]]


def test_texts_in_keys_are_ordered_as_duckdb_and_arrow_order_them(tmp_path):
    """By code points: capitals first, an emoji after every letter."""
    names = ["Z", "a", "é", "\uffee", "\U0001f419"]
    parts = []
    for number, name in enumerate(reversed(names)):
        rows_of = {"model": [name], "token": pa.array([0], pa.int32()), "text": ["t"], "bytes": [b"t"]}
        parts.append(tmp_path / f"{number}.parquet")
        write_table(parts[-1], "vocab", pa.table(rows_of))
    assert build.in_key_order(parts, TABLES["vocab"]) == parts[::-1]
    info = release.publish(tmp_path / "r", "x", {"vocab": parts}, WHO)
    assert rows(info.path, "SELECT model FROM vocab") == [(name,) for name in names]


def test_same_content_keeps_the_version_and_new_content_makes_one(tmp_path, part):
    first = release.publish(tmp_path / "r", "x", {"vocab": [part]}, WHO)
    again = release.publish(tmp_path / "r", "x", {"vocab": [part]}, WHO)
    assert first == again
    assert files(tmp_path / "r") == ["current.json", "x-v0001.duckdb"]
    other = release.publish(tmp_path / "r", "x", {"vocab": [part]}, {"seed": "1"})
    assert (other.version, other.path.name) == (2, "x-v0002.duckdb")
    assert release.current(tmp_path / "r", "x") == other
    assert [(r.label, r.current) for r in release.list_releases(tmp_path / "r")] == [
        ("x@1", False),
        ("x@2", True),
    ]
    assert release.current(tmp_path / "r", "x@1").digest == first.digest
    pointer = json.loads((tmp_path / "r" / "x" / "current.json").read_text())
    assert pointer["file"] == "x-v0002.duckdb"
    assert pointer["digest"] == other.digest


def test_current_is_the_last_published_of_all(tmp_path, part):
    for name in ("b", "a", "c"):
        release.publish(tmp_path / "r", name, {"vocab": [part]}, WHO)
    assert release.current(tmp_path / "r").name == "c"
    assert release.current(tmp_path / "r", "a").name == "a"


def test_unknown_release_names_the_existing(tmp_path, part):
    with pytest.raises(StoreError, match="existing: none yet"):
        release.current(tmp_path / "r")
    release.publish(tmp_path / "r", "a", {"vocab": [part]}, WHO)
    with pytest.raises(StoreError, match=r"no release 'b' in .*; existing: a"):
        release.current(tmp_path / "r", "b")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 65])
def test_names_that_are_no_folder_are_refused(tmp_path, part, name):
    with pytest.raises(StoreError, match="not allowed"):
        release.publish(tmp_path / "r", name, {"vocab": [part]}, WHO)


def test_a_key_in_two_parts_is_refused_and_the_old_release_stays(tmp_path, part):
    old = release.publish(tmp_path / "r", "x", {"vocab": [part]}, WHO)
    twice = vocab(tmp_path / "parts" / "more.parquet", [5, 6])
    with pytest.raises(StoreError, match="table 'vocab': row 6 repeats a key \\(model='m', token=5\\)"):
        release.publish(tmp_path / "r", "x", {"vocab": [part, twice]}, WHO)
    assert files(tmp_path / "r") == ["current.json", "x-v0001.duckdb"]
    assert release.current(tmp_path / "r") == old


def test_parts_of_another_table_or_damaged_are_refused(tmp_path, part):
    with pytest.raises(StoreError, match="table 'saes' of this version is"):
        release.publish(tmp_path / "r", "x", {"saes": [part]}, WHO)
    with pytest.raises(StoreError, match="table 'nope' is not known"):
        release.publish(tmp_path / "r", "x", {"nope": [part]}, WHO)
    with pytest.raises(StoreError, match="cannot read"):
        release.publish(tmp_path / "r", "x", {"vocab": [tmp_path / "gone.parquet"]}, WHO)
    half = tmp_path / "half.parquet"
    half.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(StoreError, match="cannot read"):
        release.publish(tmp_path / "r", "x", {"vocab": [half]}, WHO)
    assert not (tmp_path / "r").exists()


def test_what_a_killed_publisher_left_is_swept_by_the_next(tmp_path, part):
    old = release.publish(tmp_path / "r", "x", {"vocab": [part]}, WHO)
    left = atomic.work_path(old.path)
    left.mkdir()
    (left / "release.duckdb").write_bytes(b"half")
    atomic.work_path(old.path.parent / "current.json").write_text("half")
    assert release.current(tmp_path / "r") == old
    release.publish(tmp_path / "r", "x", {"vocab": [part]}, {"seed": "1"})
    assert files(tmp_path / "r") == ["current.json", "x-v0001.duckdb", "x-v0002.duckdb"]


@pytest.mark.parametrize("place", ["build_file", "fsync_path", "replace", "pointer"])
def test_full_disk_at_any_moment_leaves_the_old_release(tmp_path, part, monkeypatch, place):
    old = release.publish(tmp_path / "r", "x", {"vocab": [part]}, WHO)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "build_file":
        monkeypatch.setattr(build, "_verify", full)
    elif place == "fsync_path":
        monkeypatch.setattr(atomic, "fsync_path", full)
    elif place == "replace":
        monkeypatch.setattr(Path, "replace", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StoreError, match="No space left on device") as caught:
        release.publish(tmp_path / "r", "x", {"vocab": [part]}, {"seed": "1"})
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert files(tmp_path / "r") == ["current.json", "x-v0001.duckdb"]
    assert release.current(tmp_path / "r") == old
    assert rows(old.path, "SELECT count(*) FROM vocab") == [(6,)]


def test_duckdb_running_out_of_disk_is_one_line(tmp_path, part, monkeypatch):
    def full(*args, **kwargs):
        raise duckdb.IOException("IO Error: Could not write all bytes to file: wanted=4096 wrote=0\nmore")

    monkeypatch.setattr(build, "_build_table", full)
    with pytest.raises(StoreError, match=r"cannot build release .*Could not write all bytes") as caught:
        release.publish(tmp_path / "r", "x", {"vocab": [part]}, WHO)
    assert "\n" not in str(caught.value)
    assert files(tmp_path / "r") == []


SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
from atlas.errors import StoreError
from atlas.store import release
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    release.publish(Path(sys.argv[1]), "x", {"vocab": [Path(sys.argv[2])]}, {})
except StoreError as error:
    print(error)
"""


def test_files_that_cannot_grow_stop_duckdb_itself(tmp_path, part):
    """A real write that fails inside DuckDB, by a limit on the size of files in another process."""
    old = release.publish(tmp_path / "r", "x", {"vocab": [part]}, WHO)
    rng = random.Random(0)
    data = {"model": ["m"] * 50_000, "token": pa.array(range(50_000), pa.int32()), "text": ["t"] * 50_000}
    data["bytes"] = [rng.randbytes(20) for _ in range(50_000)]
    write_table(tmp_path / "big.parquet", "vocab", pa.table(data))
    command = [sys.executable, "-c", SMALL_DISK, str(tmp_path / "r"), str(tmp_path / "big.parquet")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("cannot "), done.stderr
    assert done.stdout.count("\n") == 1
    assert files(tmp_path / "r") == ["current.json", "x-v0001.duckdb"]
    assert release.current(tmp_path / "r") == old
    assert rows(old.path, "SELECT count(*) FROM vocab") == [(6,)]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_read_only_folder(tmp_path, part):
    old = release.publish(tmp_path / "r", "x", {"vocab": [part]}, WHO)
    (tmp_path / "r" / "x").chmod(0o555)
    with pytest.raises(StoreError, match="Permission denied"):
        release.publish(tmp_path / "r", "x", {"vocab": [part]}, {"seed": "1"})
    assert release.current(tmp_path / "r") == old


def test_read_only_file_system(tmp_path, part, monkeypatch):
    old = release.publish(tmp_path / "r", "x", {"vocab": [part]}, WHO)

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match="Read-only file system"):
        release.publish(tmp_path / "r", "x", {"vocab": [part]}, {"seed": "1"})
    monkeypatch.undo()
    assert release.current(tmp_path / "r") == old


def test_second_publisher_is_refused(tmp_path, part):
    release.publish(tmp_path / "r", "x", {"vocab": [part]}, WHO)
    with (
        atomic.lock(tmp_path / "r" / "x" / ".lock"),
        pytest.raises(ConflictError, match=f"held by process {os.getpid()}"),
    ):
        release.publish(tmp_path / "r", "x", {"vocab": [part]}, {"seed": "1"})


def test_reader_during_publish_keeps_its_data_and_a_new_one_sees_the_new(tmp_path, part):
    old = release.publish(tmp_path / "r", "x", {"vocab": [part]}, WHO)
    reader = open_release(old.path)
    longer = vocab(tmp_path / "parts" / "more.parquet", range(9))
    new = release.publish(tmp_path / "r", "x", {"vocab": [longer]}, WHO)
    assert reader.execute("SELECT count(*) FROM vocab").fetchone() == (6,)
    assert cursor(reader).execute("SELECT count(*) FROM vocab").fetchone() == (6,)
    assert rows(new.path, "SELECT count(*) FROM vocab") == [(9,)]


def test_remove_old_and_current(tmp_path, part):
    for seed in "012":
        release.publish(tmp_path / "r", "x", {"vocab": [part]}, {"seed": seed})
    with pytest.raises(ConflictError, match="x@3 is the current one; remove it with --force"):
        release.remove(tmp_path / "r", "x@3")
    with pytest.raises(StoreError, match="'x@9' does not exist; existing: x@1, x@2, x@3"):
        release.remove(tmp_path / "r", "x@9")
    release.remove(tmp_path / "r", "x@1")
    release.remove(tmp_path / "r", "x@3", force=True)
    assert release.current(tmp_path / "r", "x").label == "x@2"
    release.remove(tmp_path / "r", "x@2", force=True)
    assert release.list_releases(tmp_path / "r") == []
    assert files(tmp_path / "r") == []


def test_a_lost_pointer_or_a_damaged_one(tmp_path, part):
    release.publish(tmp_path / "r", "x", {"vocab": [part]}, WHO)
    (tmp_path / "r" / "x" / "current.json").write_text("{")
    with pytest.raises(StoreError, match=r"cannot read .*current.json"):
        release.current(tmp_path / "r")


def test_release_cannot_be_written_through_its_connection(synthetic):
    before = synthetic.read_bytes()
    connection = open_release(synthetic)
    for statement in ("DELETE FROM saes", "CREATE TABLE x (y INT)", "DROP VIEW sae_summary"):
        with pytest.raises(duckdb.Error, match="read-only"):
            connection.execute(statement)
    assert synthetic.read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"x" * 20_000])
def test_missing_or_damaged_release(tmp_path, content):
    path = tmp_path / "x-v0001.duckdb"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError, match=r"x-v0001.duckdb") as caught:
        open_release(path)
    assert "\n" not in str(caught.value)


def test_names_with_quotes_in_the_path(tmp_path, part):
    info = release.publish(tmp_path / "it's; DROP", "x", {"vocab": [part]}, WHO)
    assert rows(info.path, "SELECT count(*) FROM vocab") == [(6,)]
