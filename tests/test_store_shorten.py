"""Rounding before storing: against Python's own decimals and fractions, number by number."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas.errors import StoreError
from atlas.store.shorten import shortened, to_bits, to_digits
from atlas.tables import F32, STR, Column, Table

TABLE = Table("t", "row", (
    Column("key", STR, "key"), Column("share", F32, "a share", nullable=True, decimals=3),
    Column("whole", F32, "as it is"), Column("parts", pa.list_(F32), "parts", nullable=True, digits=3),
), ("key",))  # fmt: skip
numbers = st.floats(-1e6, 1e6, width=32).map(lambda x: x if abs(x) > 1e-12 else 0.0)


@given(st.lists(st.lists(numbers, max_size=5), max_size=6), st.integers(1, 6))
def test_each_row_is_rounded_to_digits_of_its_largest(rows, digits):
    flat = np.array([x for row in rows for x in row], np.float32)
    found = iter(to_digits(flat, np.array([len(row) for row in rows], int), digits).tolist())
    for row in rows:
        largest = max((abs(x) for x in row), default=0)
        for x in row:
            value = next(found)
            if not largest:
                assert value == 0
                continue
            step = Decimal(1).scaleb(Decimal(largest).adjusted() + 1 - digits)
            exact = Decimal(x)
            assert abs(Decimal(value) - exact) <= step / 2 + abs(exact) * Decimal("1e-7")
            steps = Decimal(value) / step
            assert abs(steps - steps.to_integral_value()) <= abs(steps) * Decimal("1e-7")


@given(st.lists(st.lists(numbers, max_size=5), max_size=6), st.integers(2, 14))
def test_each_row_is_rounded_to_bits_of_its_largest(rows, bits):
    flat = np.array([x for row in rows for x in row], np.float32)
    found = iter(to_bits(flat, np.array([len(row) for row in rows], int), bits).tolist())
    for row in rows:
        largest = Fraction(max((abs(x) for x in row), default=0))
        rounded = [Fraction(next(found)) for _ in row]
        for x, value in zip(row, rounded, strict=True):
            assert abs(value - Fraction(x)) <= largest / (2**bits - 1)
        steps = max(map(abs, rounded), default=0)
        if steps:
            step = Fraction(2) ** (floor_log2(steps) - bits + 1)
            assert all((value / step).denominator == 1 and abs(value / step) < 2**bits for value in rounded)


def floor_log2(x):
    return math.frexp(float(x))[1] - 1


def test_bits_are_of_finite_numbers():
    with pytest.raises(StoreError, match="a list holds nan; allowed: finite numbers"):
        to_bits(np.float32([1.0, np.nan]), np.array([2]), 8)
    with pytest.raises(StoreError, match="holds -inf"):
        to_bits(np.float32([-np.inf, 1.0]), np.array([1, 1]), 8)


def test_only_declared_columns_change_and_nothing_stays_nothing():
    rows = pa.table(
        {
            "key": ["a", "b", "c"], "share": [0.12345, None, float("nan")], "whole": [0.12345, 1.0, 2.0],
            "parts": [[1.23456, -0.98765], None, []],
        },
        schema=TABLE.schema,
    )  # fmt: skip
    found = shortened(rows.slice(0, 3), TABLE).to_pydict()
    assert found["share"][:2] == [pytest.approx(0.123, abs=1e-8), None]
    assert np.isnan(found["share"][2])
    assert found["whole"] == rows["whole"].to_pylist()
    assert found["parts"] == [pytest.approx([1.23, -0.99], abs=1e-7), None, []]
    assert shortened(rows, TABLE).schema == TABLE.schema


def test_a_slice_of_rows_is_rounded_like_the_whole():
    rows = pa.table({"key": list("abc"), "share": [0.1, 0.2, 0.3], "whole": [0.0, 0.0, 0.0],
                     "parts": [[100.04, 3.0], [0.01234, 0.5], [7.7777]]}, schema=TABLE.schema)  # fmt: skip
    whole = shortened(rows, TABLE)
    assert shortened(rows.slice(1, 2), TABLE).equals(whole.slice(1, 2))
    assert shortened(whole, TABLE).equals(whole)
