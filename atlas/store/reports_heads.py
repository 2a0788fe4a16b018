"""Everything measured of heads by themselves, as tables to print or to show."""

import duckdb
import pyarrow as pa

from atlas.store.queries import heads as asked
from atlas.store.queries import induction
from atlas.store.queries.quality import missing
from atlas.store.reports_shown import Part, Shown

FIRST = (
    "previous_token", "duplicate", "induction", "duplicate_text", "induction_text", "first_token",
    "self_attention", "entropy", "distance", "distance_std", "reach", "copying", "matching", "copying_top10",
    "copy_suppression", "successor", "ov_rank", "qk_rank", "ablation_zero", "ablation_mean",
)  # fmt: skip
"""The order in which scores are shown; others follow by name."""


def in_order(names: list[str]) -> list[str]:
    """Names of scores in the order in which they are shown.

    >>> in_order(["zz", "induction", "previous_token"])
    ['previous_token', 'induction', 'zz']
    """
    return sorted(names, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))


def all_scores(con: duckdb.DuckDBPyConnection, model: str) -> list[Part]:
    """A row per head, a column per score."""
    rows = asked.head_scores(con, model).to_pylist()
    names = in_order(sorted({row["score"] for row in rows}))
    values = {(row["layer"], row["head"], row["score"]): row["value"] for row in rows}
    places = sorted({(row["layer"], row["head"]) for row in rows})
    if not places:
        return []
    data = {"head_name": pa.array([f"L{layer}H{head}" for layer, head in places], pa.string())}
    for name in names:
        data[name] = pa.array([values.get((*at, name)) for at in places], pa.float64())
    columns = (Shown("head_name", "Head"), *(Shown(n, n.replace("_", " "), ".3f") for n in names))
    return [Part("Scores of heads", columns, pa.table(data))]


def one_head(con: duckdb.DuckDBPyConnection, model: str, layer: int, head: int) -> list[Part]:
    """The scores of one head with their ranks, its spectra, its prefix curve, its tasks."""
    name = f"L{layer}H{head}"
    rows = asked.score_rows(asked.head_scores(con, model), layer, head)
    if not rows:
        return []
    order = in_order([row["score"] for row in rows])
    rows.sort(key=lambda row: order.index(row["score"]))
    columns = (
        Shown("score", "Score"), Shown("value", "Value", ".4f"),
        Shown("rank", "Rank", "d", "1 is the largest"),
        Shown("of", "Of", "d"), Shown("n", "Counted", "d"), Shown("how", "How"),
    )  # fmt: skip
    parts = [Part(f"Scores of {name}", columns, pa.Table.from_pylist(rows))]
    if not missing(con, "head_spectra"):
        spectra = (
            Shown("circuit", "Circuit"), Shown("frobenius", "Frobenius", ".3f"),
            Shown("spectral", "Spectral", ".3f"), Shown("effective_rank", "Effective rank", ".2f"),
            Shown("eigenvalue_share", "Eigenvalue share", "+.3f"),
        )  # fmt: skip
        found = induction.of_head(con, "head_spectra", model, layer, head)
        parts.append(Part(f"Circuits of {name}", spectra, found))
    if induction.has_induction(con, model):
        curve = (
            Shown("prefix", "Repeated tokens", "d"), Shown("attention", "Attention", ".4f"),
            Shown("dla", "Direct logit attribution", "+.4f"), Shown("n", "Sequences", "d"),
        )  # fmt: skip
        found = induction.of_head(con, "head_prefixes", model, layer, head)
        parts.append(Part(f"Prefix curve of {name}", curve, found))
    if induction.has_tasks(con, model):
        effects = (
            Shown("task", "Task"), Shown("ablation", "Ablation"), Shown("effect", "Effect", "+.4f", "nats"),
            Shown("standard_error", "Standard error", ".4f"),
        )  # fmt: skip
        found = induction.of_head(con, "head_task_effects", model, layer, head)
        parts.append(Part(f"Tasks without {name}", effects, found))
    return parts
