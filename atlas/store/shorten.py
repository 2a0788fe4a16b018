"""Numbers rounded before they are stored, which then take half the space.

DuckDB stores floats that are short decimals as small integers (ALP: Afroozeh, Kuffo and Boncz, SIGMOD 2023)
and all others with nearly every bit of their mantissa. Ratios of counts and parts of a whole do not have
seven meaningful digits. Which columns are rounded, and how, is declared in ``atlas.tables``: to ``decimals``,
or, where a list's rows differ in size, to ``digits`` or ``bits`` of the row's largest value. Decimals suit
lists alike in size: DuckDB finds one power of ten for a thousand numbers. Where each row has a size of its
own, multiples of a power of two are packed row by row (``atlas.store.packing``).
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from atlas.errors import StoreError
from atlas.tables import Column, Table

Floats = npt.NDArray[np.float32]
Lengths = npt.NDArray[np.integer]


def shortened(rows: pa.Table, declared: Table) -> pa.Table:
    """The rows of a table with the columns rounded that its declaration rounds; NULL and NaN stay."""
    for index, column in enumerate(declared.columns):
        if column.decimals is not None:
            values = rows.column(index)
            exact = pc.round(values.cast(pa.float64()), column.decimals)
            rows = rows.set_column(index, declared.schema.field(index), exact.cast(values.type))
        elif column.digits is not None or column.bits is not None:
            chunks = [_lists(chunk, _rounding(column)) for chunk in rows.column(index).chunks]
            lists = pa.chunked_array(chunks, column.type)
            rows = rows.set_column(index, declared.schema.field(index), lists)
    return rows


def _rounding(column: Column) -> Callable[[Floats, Lengths], Floats]:
    if column.digits is not None:
        return partial(to_digits, digits=column.digits)
    return partial(to_bits, bits=column.bits or 0)


def _lists(lists: pa.ListArray, rounding: Callable[[Floats, Lengths], Floats]) -> pa.ListArray:
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    rounded = rounding(lists.flatten().to_numpy(zero_copy_only=False), lengths)
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32())
    mask = lists.is_null() if lists.null_count else None
    return pa.ListArray.from_arrays(offsets, pa.array(rounded), mask=mask)


def to_digits(values: Floats, lengths: Lengths, digits: int) -> Floats:
    """Consecutive rows of some lengths, each rounded to so many decimal digits of its largest value.

    The error is at most 5 * 10^-digits of the power of ten at or below the row's largest value.

    >>> to_digits(np.float32([123.456, -0.04, 0.00123456]), np.array([2, 1]), digits=4).tolist()
    [123.5, -0.0, 0.001234999974258244]
    """
    if not len(values):
        return values
    filled, largest = _largest(values, lengths)
    usual = (largest > 0) & np.isfinite(largest)
    decimals = digits - 1 - np.floor(np.log10(np.where(usual, largest, 1)))
    scale = np.repeat(10.0**decimals, filled)
    rounded = (np.rint(values * scale) / scale).astype(np.float32)
    return np.where(np.repeat(usual, filled), rounded, values)


def to_bits(values: Floats, lengths: Lengths, bits: int) -> Floats:
    """Consecutive rows of some lengths, each rounded to whole multiples of a power of two.

    The row's largest is at most 2^bits - 1 of them and at least half as many: the error is at most one part
    in 2^bits - 1 of it. Raises StoreError for NaN and infinity.

    >>> to_bits(np.float32([1.0, -0.3, 0.02, 5.0]), np.array([3, 0, 1]), bits=4).tolist()
    [1.0, -0.25, 0.0, 5.0]
    """
    if not len(values):
        return values
    filled, largest = _largest(values, lengths)
    if not np.isfinite(largest).all():
        raise StoreError(f"a list holds {values[~np.isfinite(values)][0]}; allowed: finite numbers")
    exponent = np.frexp(largest)[1] - bits
    exponent += np.rint(np.ldexp(largest, -exponent)) == 2**bits
    steps = np.repeat(exponent, filled)
    return np.ldexp(np.rint(np.ldexp(values.astype(np.float64), -steps)), steps).astype(np.float32) + 0.0


def _largest(values: Floats, lengths: Lengths) -> tuple[Lengths, npt.NDArray[np.float64]]:
    """The lengths of rows that are not empty, and each one's largest absolute value."""
    filled = lengths[lengths > 0]
    return filled, np.maximum.reduceat(np.abs(values), filled.cumsum() - filled).astype(np.float64)
