"""The evidence about a feature beyond where it fires: what it reads, what it writes, and what is near it.

Rows come in the order of their table's key, without the columns that were asked by. A release that was
made before a table existed has no rows there.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from atlas.errors import StoreError, one_of
from atlas.store.queries.rows import arrow
from atlas.tables import FAMILY_NAMES, TABLES


def _rows(con: duckdb.DuckDBPyConnection, name: str, **key: Any) -> pa.Table:
    """The rows of a table with these key values, in the order of the rest of the key."""
    declared = TABLES[name]
    shown = [column.name for column in declared.columns if column.name not in key]
    order = ", ".join(column for column in declared.key if column not in key) or "1"
    where = " AND ".join(f"{column} = ${column}" for column in key)
    sql = f"SELECT {', '.join(shown)} FROM {name} WHERE {where} ORDER BY {order}"  # noqa: S608
    try:
        return arrow(con, sql, key)
    except duckdb.CatalogException:
        return declared.schema.empty_table().select(shown)


def neighbours(con: duckdb.DuckDBPyConnection, sae: str, feature: int) -> pa.Table:
    """Nearest features: direction (decoder, encoder), scope (within, across), rank, which one, cosine."""
    return _rows(con, "neighbours", sae=sae, feature=feature)


def coactivation(con: duckdb.DuckDBPyConnection, sae: str, feature: int) -> pa.Table:
    """Features that fire together with it: rank, other, n_both, jaccard, pearson, pmi, n_tokens."""
    return _rows(con, "coactivation", sae=sae, feature=feature)


def dfa_summary(con: duckdb.DuckDBPyConnection, sae: str, feature: int) -> dict[str, Any] | None:
    """Where the evidence of its top examples lies; None where the SAE has no DFA."""
    found = _rows(con, "dfa_summary", sae=sae, feature=feature).to_pylist()
    return found[0] if found else None


def dfa_distances(con: duckdb.DuckDBPyConnection, sae: str, feature: int) -> pa.Table:
    """Its DFA by distance to the source: low, high (-1: BOS), share, negative."""
    return _rows(con, "dfa_distances", sae=sae, feature=feature)


def dfa_tokens(con: duckdb.DuckDBPyConnection, sae: str, feature: int) -> pa.Table:
    """The source tokens that its evidence comes from: rank, token, share, n."""
    return _rows(con, "dfa_tokens", sae=sae, feature=feature)


def logit_histogram(con: duckdb.DuckDBPyConnection, sae: str, feature: int) -> pa.Table:
    """Equal bins of its logit effects over the vocabulary: low, high, n."""
    found = _rows(con, "logit_histogram", sae=sae, feature=feature).to_pylist()
    if not found:
        return pa.table({"low": pa.array([], pa.float64()), "high": pa.array([], pa.float64()),
                         "n": pa.array([], pa.int32())})  # fmt: skip
    low, high, counts = found[0]["low"], found[0]["high"], found[0]["n"]
    edges = [low + (high - low) * i / len(counts) for i in range(len(counts) + 1)]
    return pa.table({"low": edges[:-1], "high": edges[1:], "n": pa.array(counts, pa.int32())})


def head_logit_effects(
    con: duckdb.DuckDBPyConnection, sae: str, feature: int, heads: Sequence[int] | None = None
) -> pa.Table:
    """What heads' slices of its decoder row promote (sign 1) and suppress (-1), of all kept heads or some."""
    found = _rows(con, "head_logit_effects", sae=sae, feature=feature)
    if heads is None:
        return found
    keep = [head in set(heads) for head in found["head"].to_pylist()]
    return found.filter(pa.array(keep, pa.bool_()))


def position_products(con: duckdb.DuckDBPyConnection, sae: str, feature: int) -> pa.Table:
    """Rows A7 and A8 of the seeds: position, and its product with the feature as it is and centred."""
    found = _rows(con, "position_products", sae=sae, feature=feature).to_pylist()
    products, centred = (found[0]["products"], found[0]["centred"]) if found else ([], [])
    columns = {"product": pa.array(products, pa.float32()), "centred": pa.array(centred, pa.float32())}
    return pa.table({"position": pa.array(range(len(products)), pa.int32()), **columns})


def other_sides(con: duckdb.DuckDBPyConnection, sae: str) -> tuple[str, ...]:
    """SAEs of the other side of a q or k SAE's head with which it has products."""
    try:
        found = con.execute("SELECT DISTINCT other_sae FROM qk_partners WHERE sae = ? ORDER BY 1", [sae])
    except duckdb.CatalogException:
        return ()
    return tuple(name for (name,) in found.fetchall())


def qk_partners(con: duckdb.DuckDBPyConnection, sae: str, other_sae: str, feature: int) -> pa.Table:
    """Features of the head's other side that it attends to or is attended by most: rank, other, product."""
    return _rows(con, "qk_partners", sae=sae, other_sae=other_sae, feature=feature)


def qk_products(con: duckdb.DuckDBPyConnection, sae: str, other_sae: str, feature: int) -> tuple[float, ...]:
    """Products of a q feature with every feature of a k SAE, in their order; empty where none are kept."""
    found = _rows(con, "qk_products", sae=sae, other_sae=other_sae, feature=feature)
    return tuple(found["products"][0].as_py()) if found.num_rows else ()


def products_of_key(
    con: duckdb.DuckDBPyConnection, sae: str, other_sae: str, other: int
) -> tuple[tuple[int, float], ...]:
    """The same from the k side: every q feature with its product with one feature of the k SAE."""
    try:
        found = con.execute(
            "SELECT feature, products[?] FROM qk_products WHERE sae = ? AND other_sae = ? ORDER BY feature",
            [other + 1, sae, other_sae],
        )
    except duckdb.CatalogException:
        return ()
    return tuple((feature, product) for feature, product in found.fetchall() if product is not None)


def rules(con: duckdb.DuckDBPyConnection) -> pa.Table:
    """The feature families of the release: family, rule, meaning, in their order."""
    try:
        return arrow(con, "SELECT family, rule, meaning FROM families ORDER BY number")
    except duckdb.CatalogException:
        return pa.table({name: pa.array([], pa.string()) for name in ("family", "rule", "meaning")})


def families(con: duckdb.DuckDBPyConnection, sae: str, features: Sequence[int]) -> dict[int, list[str]]:
    """The families of some features, in the order of the release's rules; features without one are left out.

    The rules are asked all at once of each table, for their view asks them one by one.
    """
    by_table: dict[str, list[tuple[str, str]]] = {}
    try:
        found = con.execute("SELECT table_name, family, rule FROM families ORDER BY number").fetchall()
    except duckdb.CatalogException:
        return {}
    for table, name, rule in found:
        by_table.setdefault(table, []).append((name, rule))
    members = {(feature, name) for table, rules in by_table.items() for feature, name in
               _members(con, table, rules, sae, features)}  # fmt: skip
    order = [name for _, name, _ in found]
    return {
        feature: [name for name in order if (feature, name) in members]
        for feature in sorted({feature for feature, _ in members})
    }


def _members(
    con: duckdb.DuckDBPyConnection,
    table: str,
    rules: Sequence[tuple[str, str]],
    sae: str,
    features: Sequence[int],
) -> Iterator[tuple[int, str]]:
    """Features and families whose rules about one table they meet."""
    met = ", ".join(f"coalesce({rule}, false)" for _, rule in rules)
    found = con.execute(
        f"SELECT feature, {met} FROM {table} "  # noqa: S608
        "WHERE sae = ? AND feature IN (SELECT unnest(?::INTEGER[]))",
        [sae, list(features)],
    )
    for feature, *values in found.fetchall():
        yield from ((feature, name) for (name, _), value in zip(rules, values, strict=True) if value)


def family_features(
    con: duckdb.DuckDBPyConnection, sae: str, family: str, head: int | None = None, k: int = 50
) -> pa.Table:
    """The k most active features of a family, of all heads or of those that one head leads.

    Columns: feature, value (what the family's rule is about), top_head, density, max_activation. Raises
    StoreError for an unknown family.
    """
    one_of("family", family, FAMILY_NAMES, StoreError)
    of_head = "" if head is None else "AND f.top_head = $head"
    given = {"sae": sae, "family": family, "k": k} | ({} if head is None else {"head": head})
    return arrow(
        con,
        f"""
        SELECT feature, m.value, f.top_head, f.density, f.max_activation
        FROM feature_families m JOIN features f USING (sae, feature)
        WHERE sae = $sae AND m.family = $family {of_head}
        ORDER BY f.max_activation DESC, feature LIMIT $k
        """,  # noqa: S608
        given,
    )


def family_counts(con: duckdb.DuckDBPyConnection, sae: str) -> dict[str, int]:
    """How many features of an SAE belong to each family that has any, in the order of the rules."""
    try:
        found = con.execute(
            "SELECT m.family, count(*) FROM feature_families m JOIN families r USING (family) "
            "WHERE m.sae = ? GROUP BY m.family, r.number ORDER BY r.number",
            [sae],
        )
    except duckdb.CatalogException:
        return {}
    return dict(found.fetchall())
