"""What a release says about single heads: scores, features, and the numbers that colour the grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from atlas.errors import StoreError, one_of
from atlas.store.queries.rows import arrow
from atlas.tables import DFA_SHARES, FAMILY_NAMES, TABLES

MEASURES = {
    "decoder_share": "decoder share",
    "fve": "FVE",
    "dfa_share": "DFA share",
}

GRID_METRICS = {
    "top10_decoder_share": "mean decoder share of the head's top 10 features",
    "max_decoder_share": "largest decoder share of a feature in the head",
    "top10_fve": "mean FVE of the head's top 10 features",
    "n_top": "features whose largest decoder share is this head's",
    "top10_dfa_share": "mean DFA share of the head's top 10 features",
    "effective_features": "effective number of its features, by decoder share",
    "distance": "mean DFA distance of its features, in tokens, weighted by FVE",
    "corr_decoder_fve": "rank correlation of decoder share and FVE",
    "corr_decoder_dfa": "rank correlation of decoder share and DFA share",
    "corr_fve_dfa": "rank correlation of FVE and DFA share",
    **{name: f"share of its positive DFA {meaning}" for name, meaning in DFA_SHARES.items()},
    **{f"n_{name}": f"features that it leads of the family {name}" for name in FAMILY_NAMES},
}


def score_names(con: duckdb.DuckDBPyConnection, model: str) -> tuple[str, ...]:
    """Names of the scores that the heads of a model have."""
    rows = con.execute("SELECT DISTINCT score FROM head_scores WHERE model = ? ORDER BY score", [model])
    return tuple(row[0] for row in rows.fetchall())


def head_scores(con: duckdb.DuckDBPyConnection, model: str) -> pa.Table:
    """Every score of every head of a model: layer, head, score, value, n, how."""
    return arrow(
        con, "SELECT layer, head, score, value, n, how FROM head_scores WHERE model = ? ORDER BY ALL", [model]
    )


def grid_metrics(con: duckdb.DuckDBPyConnection, saes: Sequence[str]) -> pa.Table:
    """One row per layer x head with the columns of GRID_METRICS, from one z SAE per layer.

    Only features that fire count. ``n_top`` counts features by ``features.top_head``.
    """
    return head_summaries(con, saes).select(["layer", "head", *GRID_METRICS])


def head_summaries(con: duckdb.DuckDBPyConnection, saes: Sequence[str]) -> pa.Table:
    """The ``head_summary`` rows of some SAEs, by layer and head; none in a release made before the table."""
    try:
        return arrow(
            con,
            "SELECT * FROM head_summary WHERE sae IN (SELECT unnest(?::VARCHAR[])) ORDER BY layer, head, sae",
            [list(saes)],
        )
    except duckdb.CatalogException:
        return TABLES["head_summary"].schema.empty_table()


def head_summary(con: duckdb.DuckDBPyConnection, sae: str, head: int) -> dict[str, Any] | None:
    """The ``head_summary`` row of one head; None where the release has none."""
    rows = [row for row in head_summaries(con, [sae]).to_pylist() if row["head"] == head]
    return rows[0] if rows else None


@dataclass(frozen=True)
class HeadFeature:
    """A feature's shares in one head, and its rank there by the measure that was asked for."""

    feature: int
    rank: int
    decoder_share: float | None
    fve: float | None
    dfa_share: float | None


def top_features(
    con: duckdb.DuckDBPyConnection,
    sae: str,
    head: int,
    measure: str = "decoder_share",
    k: int = 10,
    family: str | None = None,
) -> tuple[HeadFeature, ...]:
    """The k firing features with the largest share in a head, of all or of a family; ties go to the smaller.

    ``measure`` is one of MEASURES; a feature without that measure is left out. StoreError names an
    unknown measure or family.
    """
    one_of("measure", measure, MEASURES, StoreError)
    members, given = "", [sae, head]
    if family is not None:
        one_of("family", family, FAMILY_NAMES, StoreError)
        members = "AND a.feature IN (SELECT feature FROM feature_families WHERE sae = ? AND family = ?)"
        given += [sae, family]
    rows = con.execute(
        f"""
        SELECT a.feature, a.decoder_share, a.fve, a.dfa_share
        FROM head_attribution a JOIN features f USING (sae, feature)
        WHERE a.sae = ? AND a.head = ? AND f.alive AND a.{measure} IS NOT NULL AND NOT isnan(a.{measure})
        {members}
        ORDER BY a.{measure} DESC, a.feature LIMIT ?
        """,  # noqa: S608
        [*given, k],
    ).fetchall()
    return tuple(HeadFeature(row[0], rank, *row[1:]) for rank, row in enumerate(rows))


def share_scatter(con: duckdb.DuckDBPyConnection, sae: str, head: int) -> pa.Table:
    """Decoder share, FVE and DFA share of every firing feature in one head."""
    return arrow(
        con,
        """
        SELECT feature, decoder_share, fve, dfa_share FROM head_attribution
        WHERE sae = $sae AND head = $head
          AND feature IN (SELECT feature FROM features WHERE sae = $sae AND alive) ORDER BY feature
        """,
        {"sae": sae, "head": head},
    )


def score_rows(scores: pa.Table, layer: int, head: int) -> list[dict[str, Any]]:
    """The scores of one head out of ``head_scores``, each with its rank among all heads (1 = largest)."""
    rows = scores.to_pylist()
    found = []
    for row in rows:
        if row["layer"] == layer and row["head"] == head:
            same = [r["value"] for r in rows if r["score"] == row["score"] and r["value"] is not None]
            above = sum(value > row["value"] for value in same) if row["value"] is not None else None
            found.append({**row, "rank": None if above is None else above + 1, "of": len(same)})
    return found
