"""What a query returned leaves as text, CSV, JSON and Parquet without loss or harm."""

import datetime
import decimal
import io
import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from atlas.errors import StoreError
from atlas.store import export

TABLE = pa.table(
    {
        "n": pa.array([1, None, -3], pa.int64()),
        "x": pa.array([0.5, float("nan"), float("-inf")], pa.float32()),
        "s": ['a,"b"\n', "", None],
        "l": pa.array([[1, None], [], None], pa.list_(pa.int32())),
        "t": pa.array([{"h": 1, "v": 0.5}, {"h": 2, "v": None}, None]),
        "y": pa.array([b"\x00\xff", b"", None], pa.binary()),
        "d": pa.array([datetime.date(2020, 1, 2), None, None]),
        "h": pa.array([decimal.Decimal(10**20), None, decimal.Decimal(1)], pa.decimal128(38, 0)),
        "b": [True, False, None],
    }
)


def written(kind, table=TABLE):
    sink = io.BytesIO()
    export.WRITERS[kind](table, sink)
    return sink.getvalue()


def test_json_is_an_array_of_objects_that_any_reader_reads():
    rows = json.loads(written("json"), parse_constant=pytest.fail)
    assert rows[0] == {
        "n": 1,
        "x": 0.5,
        "s": 'a,"b"\n',
        "l": [1, None],
        "t": {"h": 1, "v": 0.5},
        "y": "00ff",
        "d": "2020-01-02",
        "h": 10**20,
        "b": True,
    }
    assert rows[1]["x"] is None
    assert rows[1]["s"] == ""
    assert all(value is None for key, value in rows[2].items() if key not in ("n", "h"))
    assert json.loads(written("json", TABLE.slice(0, 0))) == []


def test_csv_tells_null_from_empty_text_and_keeps_lists():
    options = pa.csv.ConvertOptions(strings_can_be_null=True, quoted_strings_can_be_null=False)
    text = written("csv")
    back = pa.csv.read_csv(
        io.BytesIO(text), convert_options=options, parse_options=pa.csv.ParseOptions(newlines_in_values=True)
    )
    assert back.column_names == TABLE.column_names
    assert back.column("s").to_pylist() == ['a,"b"\n', "", None]
    assert json.loads(back.column("l").to_pylist()[0]) == [1, None]
    assert json.loads(back.column("t").to_pylist()[1]) == {"h": 2, "v": None}
    assert back.column("n").to_pylist() == [1, None, -3]
    assert text.decode().splitlines()[0] == '"n","x","s","l","t","y","d","h","b"'


def test_parquet_keeps_types():
    back = pq.read_table(io.BytesIO(written("parquet")))
    assert back.schema.types == TABLE.schema.types
    assert back.drop_columns(["x"]).equals(TABLE.drop_columns(["x"]))


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_odd_types_of_sql_can_be_written(kind):
    odd = pa.table(
        {
            "interval": pa.array([pa.MonthDayNano([0, 3, 0])], pa.month_day_nano_interval()),
            "time": pa.array([datetime.time(1, 2)], pa.time64("us")),
            "enum": pa.array(["a"]).dictionary_encode(),
            "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32())),
            "null": pa.array([None], pa.null()),
            "stamp": pa.array([datetime.datetime(2020, 1, 2)], pa.timestamp("us")),
        }
    )
    assert len(written(kind, odd)) > 20


def test_text_is_aligned_and_numbers_stand_right():
    text = export.to_text(pa.table({"name": ["a", "long"], "n": [1, 100], "v": [0.5, None]}))
    assert text.splitlines() == [
        "name    n     v",
        "----  ---  ----",
        "a       1   0.5",
        "long  100  NULL",
    ]


def test_text_cannot_act_on_the_terminal():
    evil = "\x1b[2J\x07\u202eabc\x9b1m\n"
    text = export.to_text(pa.table({evil: [evil], "l": [[evil]], "t": [{"k": evil}]}))
    assert all(c == "\n" or c.isprintable() for c in text)
    assert len(text.splitlines()) == 3


def test_text_is_cut_to_cells_and_to_the_width():
    table = pa.table({"a": ["x" * 100], "b": ["日本語" * 30], "c": [1]})
    lines = export.to_text(table, cell=10).splitlines()
    assert lines[2].split("  ")[0] == "xxxxxxxxx…"
    assert export.to_text(table, width=30, cell=20).splitlines()[-1] == "(2 more columns: b, c)"
    assert export.to_text(table, width=5).splitlines()[-1] == "(2 more columns: b, c)"
    assert export.to_text(TABLE.slice(0, 0)).count("\n") == 1


def test_long_lists_are_shortened():
    assert "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...]" in export.to_text(
        pa.table({"l": [list(range(500))]})
    )


def test_file_is_whole_or_not_there(tmp_path):
    export.write_file(TABLE, tmp_path / "a.csv", "csv")
    assert (tmp_path / "a.csv").read_bytes() == written("csv")
    (tmp_path / "f").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        export.write_file(TABLE, tmp_path / "f" / "a.csv", "csv")
