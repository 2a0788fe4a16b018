"""Heads that resemble each other, layers in a row of numbers, and SAEs side by side."""

from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from atlas.store.queries.heads import head_summaries
from atlas.store.queries.rows import arrow
from atlas.tables import DFA_SHARES, FAMILY_NAMES

LOWEST, BIN = -7.0, 0.25
"""Histograms of density: bins of log10(density) from here on, a quarter of a power of ten wide."""
SYNTACTIC = ("single_token", "bigram", "positional")
"""Families that are about single tokens and places; what seed 001 calls the least abstract."""


def heads_of_one_layer(con: duckdb.DuckDBPyConnection, sae: str, head: int) -> pa.Table:
    """The other heads of a layer by how alike their feature sets are: head, cosine, largest first.

    The cosine of two heads' vectors of decoder shares over the features that fire: 1 where every feature
    belongs to both in the same proportion. Ties go to the lower head.
    """
    shares = arrow(con, "SELECT feature, head, decoder_share FROM head_attribution WHERE sae = ?", [sae])
    fires = arrow(con, "SELECT feature FROM features WHERE sae = ? AND alive", [sae])["feature"].to_numpy()
    feature, place, value = (shares[name].to_numpy() for name in ("feature", "head", "decoder_share"))
    matrix = np.zeros((max(feature.max(initial=0), fires.max(initial=0)) + 1, place.max(initial=head) + 1))
    matrix[feature, place] = np.nan_to_num(value)
    products = matrix[fires].T @ matrix[fires]
    norms = np.sqrt(np.diag(products))
    known = np.unique(place[place != head])
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = products[head, known] / (norms[head] * norms[known])
    order = np.lexsort((known, -np.nan_to_num(cosines, nan=-np.inf).round(12)))
    cosine = pa.array(cosines[order], pa.float64(), from_pandas=True)  # a head without shares has none
    return pa.table({"head": pa.array(known[order], pa.int16()), "cosine": cosine})


def profiles(con: duckdb.DuckDBPyConnection, saes: Sequence[str]) -> dict[tuple[int, int], np.ndarray]:
    """What each head's features are like, as a vector: shares of the families, then of the kinds of source.

    The shares of families are of the features that the head leads; where it leads none they are 0. A source
    share that is not known is 0.
    """
    found = {}
    for row in head_summaries(con, saes).to_pylist():
        led = max(1, row["n_top"])
        families = [row[f"n_{name}"] / led for name in FAMILY_NAMES]
        sources = [row[name] or 0.0 for name in DFA_SHARES]
        found[row["layer"], row["head"]] = np.array([*families, *sources])
    return found


def like_profiles(
    found: dict[tuple[int, int], np.ndarray], place: tuple[int, int], k: int = 8
) -> list[tuple[tuple[int, int], float]]:
    """The k heads whose profiles have the largest cosine with a head's; ties go to the lower layer and head.

    >>> p = {(0, 0): np.array([1.0, 0.0]), (0, 1): np.array([2.0, 0.0]), (1, 0): np.array([1.0, 1.0])}
    >>> [(at, round(value, 3)) for at, value in like_profiles(p, (0, 0))]
    [((0, 1), 1.0), ((1, 0), 0.707)]
    """
    own = found.get(place)
    if own is None or not own.any():
        return []
    others = [(at, vector) for at, vector in found.items() if at != place and vector.any()]
    values = [(at, float(v @ own / (np.linalg.norm(v) * np.linalg.norm(own)))) for at, v in others]
    return sorted(values, key=lambda one: (-round(one[1], 9), one[0]))[:k]


def layer_rows(con: duckdb.DuckDBPyConnection, saes: Sequence[str]) -> list[dict[str, Any]]:
    """A row per layer (row B5): its SAE's quality and what its features are like, from one z SAE per layer.

    ``syntactic``, ``induction`` and ``context`` are shares of the features that fire; ``distance`` is the
    mean over heads of the DFA distance. What a release does not have is None.
    """
    metrics = arrow(
        con,
        """
        SELECT s.layer, s.sae, s.d_sae, m.variance_explained, m.l0, m.ce_recovered, m.alive / s.d_sae AS alive
        FROM saes s LEFT JOIN sae_metrics m ON m.sae = s.sae AND m.split = 'eval'
        WHERE s.sae IN (SELECT unnest(?::VARCHAR[])) ORDER BY s.layer, s.sae
        """,
        [list(saes)],
    ).to_pylist()
    summaries: dict[str, list[dict[str, Any]]] = {}
    for row in head_summaries(con, saes).to_pylist():
        summaries.setdefault(row["sae"], []).append(row)
    return [{**row, **_of_heads(summaries.get(row["sae"], []))} for row in metrics]


def _of_heads(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """What the summaries of a layer's heads say together."""

    def mean(name: str) -> float | None:
        values = [row[name] for row in rows if row[name] is not None]
        return sum(values) / len(values) if values else None

    def share(*names: str) -> float | None:
        led = sum(row["n_top"] for row in rows)
        return sum(row[f"n_{name}"] for row in rows for name in names) / led if led else None

    return {
        "syntactic": share(*SYNTACTIC),
        "induction": share("induction"),
        "context": share("local_context", "long_range_context"),
        "distance": mean("distance"),
        "effective_features": mean("effective_features"),
    }


def densities(con: duckdb.DuckDBPyConnection, saes: Sequence[str]) -> pa.Table:
    """How many features of each SAE fire how often: sae, low, high (log10 of density), n, share.

    Bins are a quarter of a power of ten wide from 1e-7; features that never fire have low and high NULL.
    ``share`` is of the SAE's features.
    """
    return arrow(
        con,
        """
        WITH binned AS (
            SELECT sae, CASE WHEN density > 0
                THEN floor((greatest(log10(density), $lowest) - $lowest) / $bin)::INTEGER END AS bin
            FROM features WHERE sae IN (SELECT unnest($saes::VARCHAR[]))
        )
        SELECT sae, $lowest + $bin * bin AS low, $lowest + $bin * (bin + 1) AS high, count(*) AS n,
               count(*) / sum(count(*)) OVER (PARTITION BY sae) AS share
        FROM binned GROUP BY sae, bin ORDER BY sae, bin NULLS FIRST
        """,
        {"saes": list(saes), "lowest": LOWEST, "bin": BIN},
    )
