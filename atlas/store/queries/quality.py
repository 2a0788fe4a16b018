"""How good are the SAEs? The tables of the seeds, worked out once for the app and for ``atlas report``.

Every query gives one row per SAE and takes a model and a split (eval: without position 0). A release that
was made before a table or a column existed has no rows there.
"""

from collections.abc import Sequence

import duckdb
import pyarrow as pa

from atlas.store.queries.rows import arrow

STAGES = ("trained", "pruned", "finetuned")
_ORDER = "s.layer, s.head NULLS FIRST, s.site DESC, s.d_sae, s.l1_coefficient, s.k, s.sae"
_STAGE_MEASURES = ("variance_explained", "ce_recovered", "ce_spliced", "l0", "l2_ratio")
_PATTERN = ("partner", "pattern_kl", "pattern_top1", "score_correlation", "ce_pattern_recovered")


def present(con: duckdb.DuckDBPyConnection, table: str) -> set[str]:
    """The columns that a table of the release has; empty where it lacks the table."""
    try:
        found = con.execute("SELECT name FROM pragma_table_info(?)", [table]).fetchall()
    except duckdb.CatalogException:
        return set()
    return {name for (name,) in found}


def missing(con: duckdb.DuckDBPyConnection, table: str, columns: Sequence[str] = ()) -> bool:
    """Whether the release lacks a table or any of these columns of it."""
    found = present(con, table)
    return not found or not found.issuperset(columns)


def layer_sites(con: duckdb.DuckDBPyConnection, model: str) -> list[str]:
    """Kinds of sites that have SAEs of whole layers, by name."""
    rows = con.execute(
        "SELECT DISTINCT site FROM saes WHERE model = ? AND head IS NULL ORDER BY site", [model]
    ).fetchall()
    return [site for (site,) in rows]


def layers(con: duckdb.DuckDBPyConnection, model: str, site: str, split: str = "eval") -> pa.Table:
    """Seed 003's table (row D1) of one kind of site: variance explained, L0, CE score and CE loss by layer.

    The CE score is ce_recovered, the CE loss ce_spliced; ce_clean is what the table calls Original.
    """
    return arrow(
        con,
        f"""
        SELECT s.layer, s.sae, s.architecture, s.d_sae, m.variance_explained, m.l0, m.ce_recovered,
               m.ce_spliced, m.ce_clean
        FROM saes s JOIN sae_metrics m ON m.sae = s.sae AND m.split = ?
        WHERE s.model = ? AND s.site = ? AND s.head IS NULL ORDER BY {_ORDER}
        """,  # noqa: S608
        [split, model, site],
    )


def qk(con: duckdb.DuckDBPyConnection, model: str, split: str = "eval") -> pa.Table:
    """Seed 000's table (row A1): the q and k SAEs of every head, with the fidelity of rebuilt patterns."""
    known = not missing(con, "sae_metrics", _PATTERN)
    pattern = ", ".join(f"m.{name}" if known else f"NULL::DOUBLE AS {name}" for name in _PATTERN)
    return arrow(
        con,
        f"""
        SELECT s.layer, s.head, s.site, s.sae, m.l0, m.ce_recovered, m.alive, s.d_sae, s.architecture,
               s.l1_coefficient, s.k, {pattern}
        FROM saes s JOIN sae_metrics m ON m.sae = s.sae AND m.split = ?
        WHERE s.model = ? AND s.site IN ('q', 'k') ORDER BY {_ORDER}
        """,  # noqa: S608
        [split, model],
    )


def sweep(con: duckdb.DuckDBPyConnection, model: str, split: str = "eval") -> pa.Table:
    """Sites with several SAEs of one architecture (row A19): settings beside what came of them.

    ``dead_share`` is dead / d_sae in the evaluation tokens; ``dead_fraction`` is the last of the training
    log, NULL where an SAE has none.
    """
    return arrow(
        con,
        """
        WITH last AS (
            SELECT sae, arg_max(dead_fraction, step) AS dead_fraction FROM training_log GROUP BY sae
        )
        SELECT s.sae, s.site, s.layer, s.head, s.architecture, s.d_sae, s.l1_coefficient, s.k, m.l0,
               m.variance_explained, m.ce_recovered, m.dead / s.d_sae AS dead_share, last.dead_fraction
        FROM saes s JOIN sae_metrics m ON m.sae = s.sae AND m.split = ? LEFT JOIN last ON last.sae = s.sae
        WHERE s.model = ?
        QUALIFY count(*) OVER (PARTITION BY s.site, s.layer, s.head, s.architecture) > 1
        ORDER BY s.layer, s.head NULLS FIRST, s.site, s.architecture, s.d_sae, s.l1_coefficient, s.k, s.sae
        """,
        [split, model],
    )


def pruning(con: duckdb.DuckDBPyConnection, model: str) -> pa.Table:
    """Seed 003's table (row D2): features that meet each criterion, the overlaps, and the share pruned."""
    if missing(con, "pruning"):
        return pa.table({})
    return arrow(
        con,
        f"""
        SELECT s.layer, s.head, s.site, p.*, p.n_pruned / p.n_features AS pruned_share
        FROM pruning p JOIN saes s USING (sae) WHERE s.model = ? ORDER BY {_ORDER}
        """,  # noqa: S608
        [model],
    )


def stages(con: duckdb.DuckDBPyConnection, model: str, split: str = "eval") -> pa.Table:
    """Quality after each stage (rows D3 to D5), one column per measure and stage; NULL where not done.

    Columns are called ``variance_explained_trained``, ``l2_ratio_finetuned`` and so on.
    """
    if missing(con, "sae_stages"):
        return pa.table({})
    columns = ", ".join(
        f"any_value(t.{measure}) FILTER (t.stage = '{stage}') AS {measure}_{stage}"
        for measure in _STAGE_MEASURES
        for stage in STAGES
    )
    return arrow(
        con,
        f"""
        SELECT s.layer, s.head, s.site, s.sae, {columns}
        FROM sae_stages t JOIN saes s USING (sae) WHERE s.model = ? AND t.split = ?
        GROUP BY ALL ORDER BY s.layer, s.head NULLS FIRST, s.site DESC, s.sae
        """,  # noqa: S608
        [model, split],
    )
