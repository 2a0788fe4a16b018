"""Checks that tables in another order hold the rows of the tables that they are made of."""

from atlas.store.checks.check import Check
from atlas.store.indexes import INDEXES
from atlas.tables import TABLES


def _same(name: str, rows: str) -> Check:
    key = TABLES[name].key
    mine, theirs = f"SELECT * FROM {name} WHERE sae = $sae", f"SELECT * FROM ({rows}) WHERE sae = $sae"  # noqa: S608
    query = (
        f"SELECT {', '.join(key)}, found FROM ("  # noqa: S608
        f"SELECT *, 'in no other table' AS found FROM ({mine} EXCEPT {theirs}) UNION ALL "
        f"SELECT *, 'missing' FROM ({theirs} EXCEPT {mine}))"
    )
    return Check(f"{name}.rows", "its rows are those of the tables that it repeats", query, key, by_sae=True)


CHECKS: tuple[Check, ...] = tuple(_same(name, rows) for name, rows in INDEXES.items())
