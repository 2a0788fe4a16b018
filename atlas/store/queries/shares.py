"""Features as points: each one's shares in one head or in two, the largest of very many.

A layer of GPT-2 has tens of thousands of features, whose points would be one grey blot and megabytes on their
way to the browser: drawn are those with the largest shares, while correlations are of all features.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlas.store.queries.heads import MEASURES, rank_correlation, share_scatter
from atlas.store.queries.rows import arrow

MOST = 600
"""Features of largest share that are drawn, of each measure."""


@dataclass(frozen=True)
class Points:
    """The points to draw, how many features there are, and the rank correlations of all of them by pair."""

    table: pa.Table
    n: int
    correlations: dict[tuple[str, str], float | None]


def largest(table: pa.Table, columns: Sequence[str], most: int, also: Collection[int] = ()) -> pa.Table:
    """Rows of some features and those among the ``most`` largest of any column; of equal ones the first.

    >>> t = pa.table({"feature": [0, 1, 2, 3], "a": [0.1, 0.9, None, 0.2], "b": [0.5, 0.1, 0.3, 0.5]})
    >>> largest(t, ["a", "b"], 1)["feature"].to_pylist(), largest(t, ["a"], 1, [2])["feature"].to_pylist()
    ([0, 1], [1, 2])
    """
    keep = np.isin(table["feature"].to_numpy(), list(also))
    for name in columns:
        values = table[name].to_numpy().astype(np.float64)
        known = np.flatnonzero(~np.isnan(values))
        if len(known) > most:  # all above the last one kept, and of those equal to it the first
            last = np.partition(values[known], -most)[-most]
            equal = known[values[known] == last]
            above = known[values[known] > last]
            known = np.concatenate([above, equal[: most - len(above)]])
        keep[known] = True
    return table.filter(pa.array(keep))


def _correlations(shares: pa.Table, measures: Sequence[str]) -> dict[tuple[str, str], float | None]:
    """Rank correlations of each pair; where no value is missing, every measure is ranked once alone."""
    pairs = list(combinations(measures, 2))
    frame = shares.select(list(measures)).to_pandas()
    if len(frame) < 3 or frame.isna().any(axis=None):
        return {pair: rank_correlation(shares, *pair) for pair in pairs}
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.corrcoef(frame.rank().to_numpy().T)
    values = {pair: float(found[tuple(measures.index(name) for name in pair)]) for pair in pairs}
    return {pair: None if np.isnan(value) else round(value, 12) for pair, value in values.items()}


def in_head(
    con: duckdb.DuckDBPyConnection, sae: str, head: int, also: tuple[int, ...] = (), most: int = MOST
) -> Points:
    """Decoder share, FVE and DFA share of features in one head; features ``also`` are always among them."""
    shares = share_scatter(con, sae, head)
    rho = _correlations(shares, list(MEASURES))
    return Points(largest(shares, list(MEASURES), most, also), shares.num_rows, rho)


def in_two_heads(con: duckdb.DuckDBPyConnection, sae: str, one: int, other: int, most: int = MOST) -> Points:
    """Decoder shares of one SAE's firing features in two heads: feature, one, other."""
    rows = arrow(
        con,
        """
        SELECT head, feature, decoder_share FROM head_attribution
        WHERE sae = $sae AND head IN ($one, $other)
          AND feature IN (SELECT feature FROM features WHERE sae = $sae AND alive)
        ORDER BY head, feature
        """,
        {"sae": sae, "one": one, "other": other},
    )
    mine, theirs = (rows.filter(pc.equal(rows["head"], head)) for head in (one, other))
    columns = {"one": mine["decoder_share"], "other": theirs["decoder_share"]}
    table = pa.table({"feature": mine["feature"], **columns})
    rho = {("one", "other"): rank_correlation(table, "one", "other")}
    return Points(largest(table, ["one", "other"], most), table.num_rows, rho)
