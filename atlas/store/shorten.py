"""Numbers rounded to short decimals before they are stored, which DuckDB keeps in half the space.

DuckDB stores floats that are short decimals as small integers (ALP: Afroozeh, Kuffo and Boncz, SIGMOD 2023)
and all others with nearly every bit of their mantissa. Ratios of counts and parts of a whole do not have
seven meaningful digits. Which columns are rounded, and how, is declared in ``atlas.tables``: to ``decimals``,
or, where a list's rows differ in size, to ``digits`` of the row's largest value.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from atlas.tables import Table

Floats = npt.NDArray[np.float32]


def shortened(rows: pa.Table, declared: Table) -> pa.Table:
    """The rows of a table with the columns rounded that its declaration rounds; NULL and NaN stay."""
    for index, column in enumerate(declared.columns):
        if column.decimals is not None:
            values = rows.column(index)
            exact = pc.round(values.cast(pa.float64()), column.decimals)
            rows = rows.set_column(index, declared.schema.field(index), exact.cast(values.type))
        elif column.digits is not None:
            chunks = [_lists(chunk, column.digits) for chunk in rows.column(index).chunks]
            lists = pa.chunked_array(chunks, column.type)
            rows = rows.set_column(index, declared.schema.field(index), lists)
    return rows


def _lists(lists: pa.ListArray, digits: int) -> pa.ListArray:
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    rounded = to_digits(lists.flatten().to_numpy(zero_copy_only=False), lengths, digits)
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32())
    mask = lists.is_null() if lists.null_count else None
    return pa.ListArray.from_arrays(offsets, pa.array(rounded), mask=mask)


def to_digits(values: Floats, lengths: npt.NDArray[np.integer], digits: int) -> Floats:
    """Consecutive rows of some lengths, each rounded to so many decimal digits of its largest value.

    The error is at most 5 * 10^-digits of the power of ten at or below the row's largest value.

    >>> to_digits(np.float32([123.456, -0.04, 0.00123456]), np.array([2, 1]), digits=4).tolist()
    [123.5, -0.0, 0.001234999974258244]
    """
    if not len(values):
        return values
    filled = lengths[lengths > 0]
    largest = np.maximum.reduceat(np.abs(values), filled.cumsum() - filled).astype(np.float64)
    usual = (largest > 0) & np.isfinite(largest)
    decimals = digits - 1 - np.floor(np.log10(np.where(usual, largest, 1)))
    scale = np.repeat(10.0**decimals, filled)
    rounded = (np.rint(values * scale) / scale).astype(np.float32)
    return np.where(np.repeat(usual, filled), rounded, values)
