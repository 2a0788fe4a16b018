"""Everything the tables hold about one feature, and the short form of it that a card shows."""

from collections.abc import Sequence
from typing import Any

import duckdb
import pyarrow as pa

from atlas.errors import StoreError, one_of
from atlas.store.queries.overview import SaeRef
from atlas.store.queries.rows import arrow


def find_sae(refs: Sequence[SaeRef], sae: str) -> SaeRef:
    """The SAE of that name; StoreError names an unknown one and some that exist."""
    for ref in refs:
        if ref.sae == sae:
            return ref
    known = [ref.sae for ref in refs]
    more = f", ... ({len(known)} in all)" if len(known) > 12 else ""
    raise StoreError(f"SAE {sae!r} is not in this release; allowed: {', '.join(known[:12])}{more}")


def feature_row(con: duckdb.DuckDBPyConnection, sae: str, feature: int) -> dict[str, Any]:
    """The ``features`` row; StoreError names a feature that does not exist and the range that does."""
    found = arrow(con, "SELECT * FROM features WHERE sae = ? AND feature = ?", [sae, feature]).to_pylist()
    if found:
        return found[0]
    ((count,),) = con.execute("SELECT count(*) FROM features WHERE sae = ?", [sae]).fetchall()
    last = count - 1
    raise StoreError(f"feature {feature} is not in {sae}; allowed: 0 to {last}")


def alive_around(con: duckdb.DuckDBPyConnection, sae: str, feature: int) -> tuple[int | None, int | None]:
    """The nearest firing features before and after this one."""
    ((before, after),) = con.execute(
        "SELECT max(feature) FILTER (feature < $f), min(feature) FILTER (feature > $f) "
        "FROM features WHERE sae = $s AND alive",
        {"f": feature, "s": sae},
    ).fetchall()
    return before, after


def firing(con: duckdb.DuckDBPyConnection, sae: str) -> tuple[int, ...]:
    """Every feature that fires, in order."""
    rows = con.execute("SELECT feature FROM features WHERE sae = ? AND alive ORDER BY feature", [sae])
    return tuple(feature for (feature,) in rows.fetchall())


def histogram(con: duckdb.DuckDBPyConnection, sae: str, feature: int, scale: str = "linear") -> pa.Table:
    """Bins of the feature's activations where it is active: low, high, n.

    They are of equal width, on the scale log of equal ratio. StoreError names an unknown scale.
    """
    one_of("scale", scale, ("linear", "log"), StoreError)
    return arrow(
        con,
        "SELECT low, high, n FROM activation_histogram "
        "WHERE sae = ? AND feature = ? AND scale = ? ORDER BY bin",
        [sae, feature, scale],
    )


def positions(con: duckdb.DuckDBPyConnection, sae: str, feature: int) -> pa.Table:
    """Where it fires: position, share_top (of its strongest tokens) and share_all (of all its tokens)."""
    return arrow(
        con,
        """
        SELECT position, n_top, n_active, sum_activation,
               n_top / nullif(sum(n_top) OVER (), 0) AS share_top,
               n_active / nullif(sum(n_active) OVER (), 0) AS share_all
        FROM positions WHERE sae = ? AND feature = ? ORDER BY position
        """,
        [sae, feature],
    )


def logits(con: duckdb.DuckDBPyConnection, sae: str, features: Sequence[int], k: int = 20) -> pa.Table:
    """The k most promoted (sign 1) and most suppressed (sign -1) tokens of some features."""
    return arrow(
        con,
        "SELECT feature, sign, rank, token, value FROM logit_effects WHERE sae = ? "
        "AND feature IN (SELECT unnest(?::INTEGER[])) AND rank < ? ORDER BY feature, sign DESC, rank",
        [sae, list(features), k],
    )


def token_stats(con: duckdb.DuckDBPyConnection, sae: str, feature: int, k: int = 50) -> pa.Table:
    """The tokens on which (role at) and before which (role next) it fires, strongest first."""
    return arrow(
        con,
        "SELECT role, rank, token, n_active, sum_activation, max_activation, precision, recall "
        "FROM token_stats WHERE sae = ? AND feature = ? AND rank < ? ORDER BY role, rank",
        [sae, feature, k],
    )


def attribution(con: duckdb.DuckDBPyConnection, sae: str, feature: int) -> pa.Table:
    """Every head's part in the feature, by head: the columns of ``head_attribution`` but sae and feature."""
    return arrow(
        con,
        "SELECT * EXCLUDE (sae, feature) FROM head_attribution WHERE sae = ? AND feature = ? ORDER BY head",
        [sae, feature],
    )


def summaries(con: duckdb.DuckDBPyConnection, sae: str, features: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Density, strongest activation, top head and commonest token of some features, by feature."""
    rows = arrow(
        con,
        "SELECT feature, n_active, density, max_activation, top_head, top_token, alive FROM features "
        "WHERE sae = ? AND feature IN (SELECT unnest(?::INTEGER[]))",
        [sae, list(features)],
    )
    return {row["feature"]: row for row in rows.to_pylist()}


def some_features(con: duckdb.DuckDBPyConnection, sae: str, order: str = "feature", k: int = 200) -> pa.Table:
    """Firing features of an SAE to choose from, in order of one of a few columns."""
    orders = {
        "feature": "feature",
        "density": "density DESC, feature",
        "max_activation": "max_activation DESC, feature",
    }
    if order not in orders:
        raise StoreError(f"order {order!r} is not known; allowed: {', '.join(orders)}")
    return arrow(
        con,
        f"SELECT feature, n_active, density, max_activation, top_head FROM features "  # noqa: S608
        f"WHERE sae = ? AND alive ORDER BY {orders[order]} LIMIT ?",
        [sae, k],
    )


def block_length(con: duckdb.DuckDBPyConnection) -> int:
    """Tokens in a block of the analysed text, BOS included; 1 where there is no text."""
    rows = con.execute("SELECT len(tokens) FROM docs LIMIT 1").fetchall()
    return int(rows[0][0]) if rows else 1
