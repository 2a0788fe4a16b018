"""The tables of the seeds as they are shown: which columns, under which headings, in which form.

The app's overview and ``atlas report`` both show these, each in its own way; the SQL is in
``atlas.store.queries``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from atlas.store.queries import quality, training
from atlas.store.reports_families import families
from atlas.store.reports_induction import induction, tasks
from atlas.store.reports_shown import Part, Shown

__all__ = ["KINDS", "Part", "Shown", "written"]

SIDES = {"q": "Query", "k": "Key"}
LETTERS = {"attn_out": "A", "mlp_out": "M", "resid_pre": "R", "z": "Z"}
"""Seed 003 writes L5A for the attention output of layer 5 and L5M for its MLP's."""


_SAE = Shown("sae", "SAE")
_EXPLAINED = Shown("variance_explained", "Var. explained", ".2%")
_L0 = Shown("l0", "L0", ".2f", "mean number of active features per token")
_SCORE = Shown("ce_recovered", "CE score", ".2%", "(zero - spliced) / (zero - clean)")
_LOSS = Shown("ce_spliced", "CE loss", ".4f", "nats, with the site replaced by its reconstruction")
_WIDTH = Shown("d_sae", "Width", "d", "number of features")


def place(layer: int, head: int | None, site: str) -> str:
    """A site as the seeds write it.

    >>> place(5, None, "attn_out"), place(0, 3, "q")
    ('L5A', 'L0H3 q')
    """
    if head is not None:
        return f"L{layer}H{head} {site}"
    return f"L{layer}{LETTERS.get(site, ' ' + site)}"


def _placed(rows: pa.Table) -> pa.Table:
    """The rows with a first column ``place``."""
    columns = (rows[name].to_pylist() for name in ("layer", "head", "site"))
    named = [place(*at) for at in zip(*columns, strict=True)]
    return rows.add_column(0, "place", pa.array(named, pa.string()))


def _any(rows: pa.Table, *names: str) -> list[str]:
    """The columns among these that hold anything."""
    return [name for name in names if rows[name].null_count < rows.num_rows]


def _only(columns: tuple[Shown, ...], rows: pa.Table) -> tuple[Shown, ...]:
    kept = set(_any(rows, *(column.name for column in columns)))
    return tuple(column for column in columns if column.name in kept)


def layers(con: duckdb.DuckDBPyConnection, model: str, split: str = "eval") -> list[Part]:
    """Row D1: one table per kind of site, a row per layer, and the model's own loss below."""
    parts = []
    for site in quality.layer_sites(con, model):
        rows = quality.layers(con, model, site, split)
        if not rows.num_rows:
            continue
        named = [f"L{n}{LETTERS.get(site, '')}" for n in rows["layer"].to_pylist()]
        rows = rows.add_column(0, "place", pa.array(named, pa.string()))
        rows = rows.append_column("site", pa.array([site] * rows.num_rows, pa.string()))
        several = pc.count_distinct(rows["layer"]).as_py() < rows.num_rows
        columns = (Shown("place", "Layer"), *((_SAE,) if several else ()), _EXPLAINED, _L0, _SCORE, _LOSS)
        foot = {"place": "Original", "ce_spliced": pc.mean(rows["ce_clean"]).as_py()}
        parts.append(Part(f"{site} by layer", columns, rows, foot))
    return parts


def qk(con: duckdb.DuckDBPyConnection, model: str, split: str = "eval") -> list[Part]:
    """Row A1: L0, recovered loss, alive features, width and coefficient of every head's q and k SAEs."""
    rows = quality.qk(con, model, split)
    if not rows.num_rows:
        return []
    pairs = zip(rows["layer"].to_pylist(), rows["head"].to_pylist(), strict=True)
    heads = [f"L{layer}H{head}" for layer, head in pairs]
    sides = [SIDES[site] for site in rows["site"].to_pylist()]
    rows = rows.add_column(0, "place", pa.array(heads, pa.string()))
    rows = rows.add_column(1, "side", pa.array(sides, pa.string()))
    several = len(set(zip(heads, sides, strict=True))) < rows.num_rows
    columns = (
        Shown("place", "Head"), Shown("side", "Side"), *((_SAE,) if several else ()),
        Shown("l0", "L0 norm", ".1f", _L0.help), Shown("ce_recovered", "Recovered loss", ".1%", _SCORE.help),
        Shown("alive", "# Alive features", "d", "features that fire in the evaluation tokens"),
        Shown("d_sae", "# Features", "d"),
        Shown("l1_coefficient", "L1 coefficient", "g"), Shown("k", "k", "d"),
        Shown("ce_pattern_recovered", "Recovered, pattern", ".1%",
              "with the head's pattern rebuilt: (zero - pattern) / (zero - clean)"),
        Shown("pattern_kl", "Pattern KL", ".4f", "nats per query, pattern against rebuilt pattern"),
        Shown("pattern_top1", "Top-1", ".1%", "queries whose strongest source stays the same"),
    )  # fmt: skip
    return [Part("q and k of single heads", _only(columns, rows), rows)]


_BOX = ("l0", "ce_recovered", "ce_pattern_recovered", "pattern_kl", "pattern_top1", "alive", "d_sae",
        "l1_coefficient", "k")  # fmt: skip


def heads(con: duckdb.DuckDBPyConnection, model: str, split: str = "eval") -> list[Part]:
    """Row A1 as seed 000 prints it: a box per head and kind of SAE, with a column for each side."""
    found = qk(con, model, split)
    if not found:
        return []
    shown = {column.name: column for column in found[0].columns}
    boxes: dict[str, dict[str, dict[str, Any]]] = {}
    for row in found[0].rows.to_pylist():
        kind = row["sae"].rpartition(f".{row['site']}.")[2]
        boxes.setdefault(f"{row['place']}, {kind}", {})[row["side"]] = row
    columns = (Shown("metric", "Metric"), *(Shown(side, side) for side in SIDES.values()))
    return [Part(title, columns, _box(shown, sides)) for title, sides in boxes.items()]


def _box(shown: Mapping[str, Shown], sides: Mapping[str, Mapping[str, Any]]) -> pa.Table:
    """One row per metric that either side has, values as they are shown."""
    lines = []
    for name in (name for name in _BOX if name in shown):
        values = {side: written(row.get(name), shown[name].form) for side, row in sides.items()}
        if any(values.values()):
            lines.append({"metric": shown[name].title} | {s: values.get(s, "") for s in SIDES.values()})
    names = ("metric", *SIDES.values())
    return pa.table({name: pa.array([line[name] for line in lines], pa.string()) for name in names})


def sweep(con: duckdb.DuckDBPyConnection, model: str, split: str = "eval") -> list[Part]:
    """Row A19: a row per SAE of every site that has several of one architecture."""
    rows = quality.sweep(con, model, split)
    if not rows.num_rows:
        return []
    columns = (
        Shown("place", "Site"), _SAE, Shown("architecture", "Kind"), _WIDTH,
        Shown("l1_coefficient", "Coefficient", "g", "weight of the sparsity penalty"), Shown("k", "k", "d"),
        _L0, _EXPLAINED, Shown("ce_recovered", "CE recovered", ".2%", _SCORE.help),
        Shown("dead_share", "Dead", ".1%", "share of d_sae that never fires in the evaluation tokens"),
        Shown("dead_fraction", "Dead, training", ".1%", "silent for the dead window when training ended"),
    )  # fmt: skip
    rows = _placed(rows)
    return [Part("Sweep", _only(columns, rows), rows)]


def pruning(con: duckdb.DuckDBPyConnection, model: str) -> list[Part]:
    """Row D2: how many features meet each of the three criteria, the overlaps, and how many were pruned."""
    rows = quality.pruning(con, model)
    if not rows.num_rows:
        return []
    rows = _placed(rows)
    limits = [
        f" < {value[0]:g}" if len(value := pc.unique(rows[name]).to_pylist()) == 1 else ""
        for name in ("max_activation_limit", "decoder_norm_limit", "firing_rate_limit")
    ]
    several = pc.count_distinct(rows["place"]).as_py() < rows.num_rows
    titles = {
        "n_weak": f"Max act{limits[0]}", "n_short": f"Norm{limits[1]}", "n_rare": f"Sparsity{limits[2]}",
        "n_weak_short": "act & norm", "n_weak_rare": "act & sparsity", "n_short_rare": "norm & sparsity",
        "n_all_three": "all three", "n_pruned": "Total pruned", "n_features": "Features",
    }  # fmt: skip
    columns = (
        Shown("place", "Layer"), *((_SAE,) if several else ()),
        *(Shown(name, title, "d") for name, title in titles.items()), Shown("pruned_share", "Share", ".1%"),
    )  # fmt: skip
    foot = {"place": "Mean", "pruned_share": pc.mean(rows["pruned_share"]).as_py()}
    return [Part("Pruning", columns, rows, foot)]


def stages(con: duckdb.DuckDBPyConnection, model: str, split: str = "eval") -> list[Part]:
    """Rows D3 to D5: variance explained, CE score and L2 ratio after training, pruning and finetuning."""
    rows = quality.stages(con, model, split)
    if not rows.num_rows:
        return []
    rows = _placed(rows)
    several = pc.count_distinct(rows["place"]).as_py() < rows.num_rows
    measures = {"variance_explained": "VE", "ce_recovered": "CE score", "l2_ratio": "L2 ratio"}
    shown = [
        Shown(f"{measure}_{stage}", f"{title} {stage}", ".2%")
        for measure, title in measures.items()
        for stage in quality.STAGES
    ]
    columns = _only((Shown("place", "Layer"), *((_SAE,) if several else ()), *shown), rows)
    means = {c.name: pc.mean(rows[c.name]).as_py() for c in columns if c.form}
    return [Part("Stages", columns, rows, {"place": "Mean", **means})]


def trainings(con: duckdb.DuckDBPyConnection, model: str) -> list[Part]:
    """Where every training ended: the last row of its log."""
    rows = training.endings(con, model)
    if not rows.num_rows:
        return []
    columns = (
        Shown("place", "Site"), _SAE, Shown("tokens", "Tokens", ",d"), Shown("step", "Steps", ",d"),
        Shown("loss", "Loss", ".4g"), Shown("mse_loss", "MSE", ".4g"),
        Shown("sparsity_loss", "Sparsity", ".4g"), Shown("aux_loss", "Aux", ".4g"),
        Shown("objective_loss", "Objective", ".4g"), _L0, _EXPLAINED,
        Shown("dead_fraction", "Dead", ".1%"),
        Shown("tokens_per_second", "Tokens/s", ",.0f", "median over the training, of the whole step"),
    )  # fmt: skip
    rows = _placed(rows)
    return [Part("Training", _only(columns, rows), rows)]


KINDS: dict[str, Callable[[duckdb.DuckDBPyConnection, str], list[Part]]] = {
    "qk": qk,
    "heads": heads,
    "sweep": sweep,
    "layers": layers,
    "pruning": pruning,
    "stages": stages,
    "training": trainings,
    "families": families,
    "induction": induction,
    "tasks": tasks,
}
"""The reports, by name."""


def written(value: Any, form: str) -> str:
    """A value as a report shows it; nothing for NULL.

    >>> written(0.9225, ".2%"), written(22458, "d"), written(None, "d"), written("L0A", "")
    ('92.25%', '22458', '', 'L0A')
    """
    if value is None or value != value:
        return ""
    return format(int(value) if form.endswith("d") else value, form)
