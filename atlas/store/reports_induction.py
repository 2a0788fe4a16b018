"""Induction heads by the length of what they match, and tasks without a head, as the seeds show them.

Source: seed 001, rows B9 and B12 to B16.
"""

import duckdb
import pyarrow as pa

from atlas.store.queries import induction as asked
from atlas.store.queries.rows import arrow
from atlas.store.reports_shown import Part, Shown

_STRONGEST = 10


def induction(con: duckdb.DuckDBPyConnection, model: str, split: str = "eval") -> list[Part]:  # noqa: ARG001
    """A row per head: kind, prefix curve, text, corruption; then the curves of the induction heads."""
    if not asked.has_induction(con, model):
        return []
    rows = _named(asked.head_induction(con, model))
    columns = (
        Shown("head_name", "Head"), Shown("kind", "Kind"),
        Shown("attention_1", "1 token", ".3f", "attention to the right token after one repeated token"),
        Shown("attention_long", "Long", ".3f", "the same after 5 to 9 repeated tokens"),
        Shown("dla_1", "DLA, 1", ".3f", "direct logit attribution to that token, after one repeated token"),
        Shown("dla_long", "DLA, long", ".3f", "the same after 5 to 9 repeated tokens"),
        Shown("n_attended", "Text pairs", "d", "pairs of the text with attention above 0.3, BOS left out"),
        Shown("n_1", "1-prefix", "d", "of these, those with a match of 1 token"),
        Shown("n_longer", "Longer", "d", "of these, those with a match of 2 tokens or more"),
        Shown("longer_share", "Longer share", ".1%", "of those with a match"),
        Shown("before", "Before", ".3f", "attention to the source of long matches in the text"),
        Shown("after", "After", ".3f", "the same with the match cut to 1 token"),
        Shown("n_attended_pairs", "Attended", "d", "of the long matches, those with attention above 0.3"),
        Shown("attended_before", "Their before", ".3f"), Shown("attended_after", "Their after", ".3f"),
    )  # fmt: skip
    return [Part("Induction heads", columns, rows), _curves(con, model, rows)]


def _curves(con: duckdb.DuckDBPyConnection, model: str, rows: pa.Table) -> Part:
    """Attention against the number of repeated tokens, of heads of a kind (or of the ten strongest)."""
    chosen = [row for row in rows.to_pylist() if row["kind"]] or rows.slice(0, _STRONGEST).to_pylist()
    heads = [(row["layer"], row["head"]) for row in chosen]
    curves = asked.prefix_curves(con, model).to_pylist()
    lengths = sorted({row["prefix"] for row in curves})
    found = {(row["layer"], row["head"], row["prefix"]): row["attention"] for row in curves}
    data = {"head_name": pa.array([f"L{layer}H{head}" for layer, head in heads], pa.string())}
    for n in lengths:
        data[f"prefix_{n}"] = pa.array([found.get((*at, n)) for at in heads], pa.float64())
    columns = (Shown("head_name", "Head"), *(Shown(f"prefix_{n}", f"{n}", ".3f") for n in lengths))
    return Part("Attention to the right token, by repeated tokens", columns, pa.table(data))


def tasks(con: duckdb.DuckDBPyConnection, model: str, split: str = "eval") -> list[Part]:  # noqa: ARG001
    """The tasks, and for each the heads without which its loss rises most (zero-ablation)."""
    if not asked.has_tasks(con, model):
        return []
    known = asked.tasks(con, model)
    columns = (
        Shown("task", "Task"), Shown("template", "Template"), Shown("n_prompts", "Prompts", "d"),
        Shown("n", "Predictions", "d"), Shown("loss", "Loss", ".3f", "nats, of the model as it is"),
    )  # fmt: skip
    kinds = [pa.string(), pa.string(), pa.int64(), pa.int64(), pa.float64()]
    data = {
        c.name: pa.array([row[c.name] for row in known], kind) for c, kind in zip(columns, kinds, strict=True)
    }
    return [Part("Tasks", columns, pa.table(data)), *(_task(con, model, row["task"]) for row in known)]


def _task(con: duckdb.DuckDBPyConnection, model: str, task: str) -> Part:
    rows = arrow(
        con,
        """
        SELECT layer, head, max(effect) FILTER (ablation = 'zero') AS zero,
          max(standard_error) FILTER (ablation = 'zero') AS zero_error,
          max(effect) FILTER (ablation = 'mean') AS mean, rank() OVER (PARTITION BY layer ORDER BY zero DESC)
          AS place
        FROM head_task_effects WHERE model = $model AND task = $task GROUP BY layer, head
        ORDER BY zero DESC, layer, head
        """,
        {"model": model, "task": task},
    )
    columns = (
        Shown("head_name", "Head"), Shown("zero", "Zero-ablated", "+.3f", "rise of the loss, nats"),
        Shown("zero_error", "Standard error", ".3f"), Shown("mean", "Mean-ablated", "+.3f"),
        Shown("place", "Rank in its layer", "d"),
    )  # fmt: skip
    return Part(f"Heads that {task} needs most", columns, _named(rows.slice(0, _STRONGEST)))


def _named(rows: pa.Table) -> pa.Table:
    pairs = zip(rows["layer"].to_pylist(), rows["head"].to_pylist(), strict=True)
    return rows.append_column("head_name", pa.array([f"L{i}H{j}" for i, j in pairs], pa.string()))
