"""Every feature with all that a search narrows, counts and orders by: one table in a process's memory.

``features`` and ``dfa_summary`` are joined, and the rules of the families asked, once per open release
instead of once per click: at GPT-2's size (344,064 features) that takes a fifth of a second and 50 MB, about
150 bytes per feature. Beyond ``MOST`` features the same columns are a view: slower, and nothing is kept.
"""

import threading

import duckdb

from atlas.store.families import FAMILIES
from atlas.store.queries.quality import present
from atlas.tables import DFA_SHARES, TABLES

MOST = 3_000_000
"""Features beyond which nothing is kept in memory."""
NAME = "memory.main.search_features"
SAE = "memory.main.search_sae"
"""The type of its column ``sae``: names of SAEs, in their order."""
_FEATURE_COLUMNS = (
    "density", "n_active", "max_activation", "mean_activation", "encoder_norm", "decoder_norm",
    "encoder_decoder_cosine", "bias", "top_position", "top_position_share", "effective_positions",
    "top_token_share", "top_pair_share", "loss_effect", "n_loss", "logit_std", "logit_skew", "logit_kurtosis",
)  # fmt: skip
_DFA_COLUMNS = (*DFA_SHARES, "local", "long_range", "distance", "matched", "matched_prefix")
COLUMNS = {
    **{name: ("features", name) for name in _FEATURE_COLUMNS},
    **{f"dfa_{name}": ("dfa_summary", name) for name in _DFA_COLUMNS},
}
"""Columns that can be bounded and sorted by: the name here, its table and its column."""
BITS = {name: 1 << place for place, name in enumerate(FAMILIES)}
"""The families as bits of the column ``families``."""
_lock = threading.Lock()


def make_ready(con: duckdb.DuckDBPyConnection) -> None:
    """Make the table for an open release, once for all its cursors."""
    with _lock:
        try:
            con.execute(f"SELECT 1 FROM {NAME} LIMIT 0").fetchall()  # noqa: S608
            return
        except duckdb.CatalogException:
            pass
        ((n_features,),) = con.execute("SELECT count(*) FROM features").fetchall()
        con.execute(f"CREATE TYPE {SAE} AS ENUM (SELECT DISTINCT sae FROM features ORDER BY sae)")  # noqa: S608
        con.execute(f"CREATE {'TABLE' if n_features <= MOST else 'VIEW'} {NAME} AS {_rows(con)}")


def _rows(con: duckdb.DuckDBPyConnection) -> str:
    """The query of its rows."""
    bits = " + ".join(f"CASE WHEN {f.rule} THEN {BITS[f.name]} ELSE 0 END" for f in FAMILIES.values())
    short = {"features": "f", "dfa_summary": "d"}
    columns = ", ".join(f"{short[table]}.{column} AS {name}" for name, (table, column) in COLUMNS.items())
    return f"""
        SELECT sae::{SAE} AS sae, feature, f.alive, f.top_head, f.top_token, ({bits})::USMALLINT AS families,
               {columns}
        FROM {_complete(con, "features")} f LEFT JOIN {_complete(con, "dfa_summary")} d USING (sae, feature)
        """  # noqa: S608


def _complete(con: duckdb.DuckDBPyConnection, table: str) -> str:
    """A table with its declared columns; NULL where an older release lacks one, empty where it lacks all."""
    known = present(con, table)
    columns = [
        column.name if column.name in known else f"NULL AS {column.name}" for column in TABLES[table].columns
    ]
    if not known:
        return f"(SELECT {', '.join(columns)} LIMIT 0)"
    return f"(SELECT {', '.join(columns)} FROM {table})"  # noqa: S608
