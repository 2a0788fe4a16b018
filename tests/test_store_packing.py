"""Packed lists: what comes out of a release's file is what went in, to the bit."""

import re

import duckdb
import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.store.packing import packed_rows, stored_columns, stored_name, unpacking_view
from atlas.store.shorten import shortened
from atlas.tables import F32, I32, Column, Table

TABLE = Table("t", "row", (
    Column("n", I32, "number"),
    Column("fine", pa.list_(F32), "signed", bits=13), Column("coarse", pa.list_(F32), "not below 0", bits=12),
), ("n",))  # fmt: skip
numbers = st.floats(-(2.0**100), 2.0**100, width=32).map(lambda x: x if abs(x) > 2.0**-80 else 0.0)
signed = st.lists(numbers, max_size=6)
positive = st.lists(numbers.map(abs), max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(signed, positive), min_size=1, max_size=8))
def test_packed_lists_come_back_to_the_bit(lists):
    data = {"n": range(len(lists)), "fine": [a for a, _ in lists], "coarse": [b for _, b in lists]}
    given = shortened(pa.table(data, schema=TABLE.schema), TABLE)
    with duckdb.connect(":memory:") as con:
        con.register("given", given)
        columns = (
            "n INT, fine SMALLINT[], fine_exponent SMALLINT, coarse SMALLINT[], coarse_exponent SMALLINT"
        )
        assert [name for name, _ in stored_columns(TABLE)] == re.findall(r"(\w+) [A-Z]", columns)
        con.execute(f"CREATE TABLE t_packed ({columns})")
        con.execute(f"INSERT INTO {stored_name(TABLE)} {packed_rows(TABLE, 'given')}")
        con.execute(unpacking_view(TABLE))
        found = con.sql("FROM t ORDER BY n").to_arrow_table()
    assert found.schema.names == TABLE.schema.names
    for name in ("fine", "coarse"):
        for a, b in zip(found[name].to_pylist(), given[name].to_pylist(), strict=True):
            assert np.float32(a).tobytes() == np.float32(b).tobytes()
