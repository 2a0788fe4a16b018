"""Tables are checked, sorted, unique, and their digest does not depend on how they are cut."""

import errno
import itertools

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.errors import StoreError
from atlas.store.digest import ContentDigest
from atlas.store.parquet import KeyOrder, conform, read_table, write_table
from atlas.store.shorten import shortened
from atlas.tables import TABLES, table
from tests.synthetic import synthetic_rows, to_arrow


def names(folder):
    return sorted(p.name for p in folder.iterdir())


DISTANCES = TABLES["dfa_distances"]


def distances(keys):
    sae, feature, number = zip(*keys, strict=True) if keys else ((), (), ())
    n = len(keys)
    return pa.table(
        {
            "sae": pa.array(sae, pa.string()),
            "feature": pa.array(feature, pa.int32()),
            "low": pa.array(number, pa.int16()),
            "share": pa.array([0.0] * n, pa.float32()),
            "negative": pa.array([1.0] * n, pa.float32()),
            "high": pa.array(range(n), pa.int64()),
        }
    )


def cut(data, places):
    edges = [0, *sorted(p % (data.num_rows + 1) for p in places), data.num_rows]
    return [data.slice(a, b - a) for a, b in itertools.pairwise(edges)]


keys = st.lists(
    st.tuples(st.sampled_from(["a", "b", "B", "é", "zz"]), st.integers(0, 3), st.integers(0, 3)), max_size=24
)
places = st.lists(st.integers(0, 30), max_size=5)


@given(keys, places)
@settings(max_examples=150, deadline=None)
def test_order_is_checked_however_rows_are_cut(rows, where):
    """Accepted if and only if the keys ascend strictly, in the order of their UTF-8 bytes."""
    wanted = [(s.encode(), f, b) for s, f, b in rows]
    legal = all(a < b for a, b in itertools.pairwise(wanted))
    order, complaint = KeyOrder(DISTANCES), ""
    try:
        for piece in cut(distances(rows), where):
            order.check(piece)
    except StoreError as error:
        complaint = str(error)
    assert legal == (not complaint)
    if not legal:
        bad = next(i for i, (a, b) in enumerate(itertools.pairwise(wanted), 1) if not a < b)
        what = "repeats a key" if wanted[bad] == wanted[bad - 1] else "is out of order"
        assert f"row {bad} {what}" in complaint


item = st.fixed_dictionaries({"h": st.integers(0, 2), "v": st.none() | st.just(0.5)})
values = st.fixed_dictionaries(
    {
        "x": st.none() | st.integers(-5, 5),
        "s": st.none() | st.text(max_size=3),
        "l": st.none() | st.lists(st.none() | st.integers(0, 3), max_size=3),
        "t": st.none() | st.lists(item, max_size=2),
        "b": st.none() | st.booleans(),
        "y": st.none() | st.binary(max_size=2),
    }
)  # fmt: skip
SCHEMA = pa.schema(
    [
        ("x", pa.int16()),
        ("s", pa.string()),
        ("l", pa.list_(pa.int32())),
        ("t", pa.list_(pa.struct([("h", pa.int16()), ("v", pa.float32())]))),
        ("b", pa.bool_()),
        ("y", pa.binary()),
    ]
)


def digest(pieces):
    content = ContentDigest(SCHEMA)
    for piece in pieces:
        content.update(piece)
    return content.hexdigest()


@given(st.lists(values, max_size=12), places, places)
@settings(max_examples=150, deadline=None)
def test_digest_does_not_depend_on_the_cut(rows, one, other):
    data = pa.Table.from_pylist(rows, schema=SCHEMA)
    assert digest(cut(data, one)) == digest(cut(data, other)) == digest([data])


@given(st.lists(values, min_size=1, max_size=6), st.lists(values, min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_digest_tells_different_rows_apart(one, other):
    a, b = (pa.Table.from_pylist(rows, schema=SCHEMA) for rows in (one, other))
    assert (digest([a]) == digest([b])) == (a.to_pylist() == b.to_pylist())


def test_digest_of_sliced_nested_rows_ignores_what_is_outside():
    inner = [{"h": 1, "v": 0.5}]
    long = pa.Table.from_pylist(
        [{"l": [9, 9], "t": inner}, {"l": [1], "t": []}, {"l": None, "t": inner}], SCHEMA
    )
    short = pa.Table.from_pylist([{"l": [1], "t": []}], SCHEMA)
    assert digest([long.slice(1, 1)]) == digest([short])


@given(places)
@settings(max_examples=10, deadline=None)
def test_written_file_does_not_depend_on_the_cut(tmp_path_factory, where):
    folder = tmp_path_factory.mktemp("cut")
    data = distances([("a", f, b) for f in range(30) for b in range(50)])
    assert write_table(folder / "whole.parquet", DISTANCES.name, data) == 1500
    assert write_table(folder / "cut.parquet", DISTANCES.name, cut(data, where)) == 1500
    assert (folder / "whole.parquet").read_bytes() == (folder / "cut.parquet").read_bytes()
    assert read_table(folder / "cut.parquet", DISTANCES.name).equals(conform(data, DISTANCES))


def test_every_declared_table_survives_the_round_trip(tmp_path):
    rows = synthetic_rows(seed=1, n_layers=1, n_heads=2, d_sae=8, n_blocks=4, context=12)
    for name in rows:
        data = to_arrow(name, rows[name])
        path = tmp_path / f"{name}.parquet"
        assert write_table(path, name, iter(data.to_batches(max_chunksize=7))) == data.num_rows > 0
        assert read_table(path, name).equals(shortened(data, table(name)))
        assert pq.read_schema(path).equals(table(name).schema)


def test_integers_are_packed_and_read_back_by_duckdb(tmp_path):
    """Lists, NULLs alone, and the largest numbers of a type."""
    path = tmp_path / "dfa.parquet"
    made = synthetic_rows(seed=1, n_layers=1, n_heads=2, d_sae=8, n_blocks=4, context=12)
    rows = to_arrow("dfa", made["dfa"])
    limit = pa.array([2**15 - 1, -(2**15)] * rows.num_rows)[: rows.num_rows]
    for name, values in (("top_head", pa.nulls(rows.num_rows)), ("matched_prefix", limit)):
        place = rows.column_names.index(name)
        rows = rows.set_column(place, rows.schema.field(place), values.cast(rows.schema.field(place).type))
    write_table(path, "dfa", rows)
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = {c.path_in_schema: c.encodings for c in map(group.column, range(group.num_columns))}
    packed = {name for name, encodings in columns.items() if "DELTA_BINARY_PACKED" in encodings}
    assert packed >= {
        "feature",
        "top_head",
        *(f"sources.list.element.{name}" for name in ("head", "source", "weight")),
    }
    assert "by_head.list.element" not in packed
    expected = read_table(path, "dfa")
    assert expected["top_head"].null_count == rows.num_rows
    assert expected["matched_prefix"].to_pylist() == limit.to_pylist()
    found = duckdb.sql(f"SELECT * FROM '{path}'").to_arrow_table()
    assert found.to_pylist() == expected.to_pylist()


def test_row_groups_are_as_declared(tmp_path):
    n = 3 * 4096 + 5
    docs = pa.table(
        {
            "corpus": ["c"] * n,
            "block": pa.array(range(n), pa.int32()),
            "tokens": [[1, 2]] * n,
            "source": ["s"] * n,
        }
    )
    write_table(tmp_path / "d.parquet", "docs", cut(docs, [1, 5000, 9000]))
    meta = pq.read_metadata(tmp_path / "d.parquet")
    sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    assert sizes == [4096, 4096, 4096, 5]
    assert meta.row_group(0).column(0).compression == "ZSTD"


def test_values_are_cast_to_the_declared_types_or_refused(tmp_path):
    data = distances([("a", 0, 0)]).set_column(2, "low", pa.array([3], pa.int64()))
    write_table(tmp_path / "t", DISTANCES.name, data)
    assert read_table(tmp_path / "t", DISTANCES.name).column("low").to_pylist() == [3]
    with pytest.raises(StoreError, match="column 'low' is not int16"):
        write_table(tmp_path / "u", DISTANCES.name, data.set_column(2, "low", pa.array([70_000])))
    with pytest.raises(StoreError, match="column 'high' is not int16"):
        write_table(tmp_path / "u", DISTANCES.name, data.set_column(5, "high", pa.array(["many"])))
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["high", "share"]), "lacks high, share"),
        (lambda t: t.append_column("extra", pa.array([1])), "has extra"),
        (lambda t: t.append_column("high", pa.array([1])), "a column twice"),
        (
            lambda t: t.set_column(5, "high", pa.array([None], pa.int64())),
            "column 'high' has 1 NULL; allowed: none",
        ),
    ],
)
def test_wrong_columns_are_refused(tmp_path, change, message):
    with pytest.raises(StoreError, match=message):
        write_table(tmp_path / "t", DISTANCES.name, change(distances([("a", 0, 0)])))
    assert names(tmp_path) == []


def test_columns_come_in_any_order(tmp_path):
    data = distances([("a", 0, 0)])
    write_table(tmp_path / "t", DISTANCES.name, data.select(data.column_names[::-1]))
    assert read_table(tmp_path / "t", DISTANCES.name).column_names == DISTANCES.schema.names


def test_unknown_table_names_the_allowed_ones(tmp_path):
    with pytest.raises(StoreError, match="table 'nope' is not known; allowed: models, vocab"):
        write_table(tmp_path / "t", "nope", pa.table({}))


def test_an_error_late_in_the_stream_leaves_the_old_file(tmp_path):
    path = tmp_path / "t"
    write_table(path, DISTANCES.name, distances([("a", 0, 0)]))
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"row 2 repeats a key .*feature=0, low=1"):
        write_table(path, DISTANCES.name, [distances([("b", 0, 0), ("b", 0, 1)]), distances([("b", 0, 1)])])
    assert path.read_bytes() == before
    assert names(tmp_path) == ["t"]


def test_full_disk_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(StoreError, match="No space left on device"):
        write_table(tmp_path / "t", DISTANCES.name, distances([("a", 0, 0)]))
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"PAR1 not really", None])
def test_missing_or_damaged_file_is_one_line(tmp_path, content):
    path = tmp_path / "t.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError, match=f"cannot read {path}") as caught:
        read_table(path, DISTANCES.name)
    assert "\n" not in str(caught.value)


def test_file_of_another_shape_is_refused(tmp_path):
    write_table(tmp_path / "t", DISTANCES.name, distances([("a", 0, 0)]))
    with pytest.raises(StoreError, match="table 'position_counts' of this version is"):
        read_table(tmp_path / "t", "position_counts")


def test_empty_table_is_a_file_with_the_schema(tmp_path):
    assert write_table(tmp_path / "t", DISTANCES.name, []) == 0
    assert read_table(tmp_path / "t", DISTANCES.name).num_rows == 0
