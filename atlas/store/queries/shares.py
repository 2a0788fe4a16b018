"""Features as points: each one's shares in one head or in two, the largest of very many.

A layer of GPT-2 has tens of thousands of features, whose points would be one grey blot and megabytes on their
way to the browser: drawn are those with the largest shares, while correlations are of all features.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from atlas.errors import StoreError
from atlas.store.queries.heads import MEASURES, share_scatter
from atlas.store.queries.ranks import rank_correlations
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


def in_head(
    con: duckdb.DuckDBPyConnection, sae: str, head: int, also: tuple[int, ...] = (), most: int = MOST
) -> Points:
    """Decoder share, FVE and DFA share of features in one head; features ``also`` are always among them."""
    shares = share_scatter(con, sae, head)
    rho = rank_correlations(shares, list(MEASURES))
    return Points(largest(shares, list(MEASURES), most, also), shares.num_rows, rho)


def in_two_heads(con: duckdb.DuckDBPyConnection, sae: str, one: int, other: int, most: int = MOST) -> Points:
    """Decoder shares of one SAE's firing features in two heads: feature, one, other."""
    rows = arrow(
        con,
        """
        SELECT head, feature, decoder_share FROM head_attribution
        WHERE sae = $sae AND head IN ($one, $other)
          AND feature IN (SELECT feature FROM features WHERE sae = $sae AND alive)
        """,
        {"sae": sae, "one": one, "other": other},
    )
    (feature, mine), (others, theirs) = (_of_head(rows, head) for head in (one, other))
    if not np.array_equal(feature, others):
        raise StoreError(f"heads {one} and {other} of SAE {sae!r} do not have the same features")
    table = pa.table({"feature": feature, "one": mine, "other": theirs})
    rho = rank_correlations(table, ["one", "other"])
    return Points(largest(table, ["one", "other"], most), table.num_rows, rho)


def _of_head(rows: pa.Table, head: int) -> tuple[np.ndarray, np.ndarray]:
    """Features in their order, and their shares in one head.

    Rows come as they are stored, nearly always in order: DuckDB would sort them all the same.
    """
    mine = rows.filter(pc.equal(rows["head"], head))
    feature, share = mine["feature"].to_numpy(), mine["decoder_share"].to_numpy()
    if np.any(feature[1:] < feature[:-1]):
        order = np.argsort(feature, kind="stable")
        feature, share = feature[order], share[order]
    return feature, share
