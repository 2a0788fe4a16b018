"""Tasks without a head: which heads a task needs, layer by layer (seed 001, B9)."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from app import charts, induction_charts, part_tables, state, style
from app.state import Scope
from app.views.induction import recompute
from atlas.store import reports_induction
from atlas.store.queries import induction as asked


def _layer(scope: Scope, rows: pa.Table, task: str) -> int:
    """The layer of the address; without one, that of the head with the largest effect."""
    of_task = [row for row in rows.to_pylist() if row["task"] == task and row["ablation"] == "zero"]
    best = max(of_task, key=lambda row: (row["effect"], -row["layer"], -row["head"]))
    options = [str(layer) for layer in range(scope.model.n_layers)]
    chosen = st.segmented_control(
        "Layer", options, default=str(best["layer"]), required=True, key="layer", bind="query-params"
    )
    return int(chosen)


def _bars(rows: pa.Table, layer: int, tasks: list[dict[str, Any]]) -> None:
    """A chart per task, of the heads of one layer: a head that stands out in several does several things."""
    rows = rows.filter(pc.equal(rows["layer"], layer))
    for place, task in zip(st.columns(max(1, min(3, len(tasks)))) * len(tasks), tasks, strict=False):
        mine = []
        for row in rows.to_pylist():
            if row["task"] == task["task"]:
                error = 2 * (row["standard_error"] or 0.0)
                bounds = {"low": row["effect"] - error, "high": row["effect"] + error}
                mine.append({**row, **bounds, "name": f"H{row['head']}"})
        with place:
            style.section(
                task["task"], f"{task['n_prompts']} prompts, loss {style.number(task['loss'])} nats"
            )
            charts.draw(
                pa.Table.from_pylist(mine), induction_charts.effects(), 240, f"task_{task['task']}",
                f"Rise of the loss on {task['task']} without each head of layer {layer}",
            )  # fmt: skip
            # As code: Markdown would make links of addresses.
            st.code(f"{task['template']}\n{task['example']}", language=None, wrap_lines=True)


def render() -> None:
    """The effects on every task, for one layer and over all heads."""
    scope = state.scope()
    model = scope.model.model
    if not scope.ask(asked.has_tasks, model):
        style.title("Tasks", model)
        st.info("No task was measured in this release. Build it again, with prompts above 0 under [heads].")
        return
    tasks, rows = scope.ask(asked.tasks, model), scope.ask(asked.task_effects, model)
    names = [task["task"] for task in tasks]
    style.title("Tasks without a head", f"{model} · {', '.join(names)}")
    layer = _layer(scope, rows, names[0])
    _bars(rows, layer, tasks)
    for part in scope.ask(reports_induction.tasks, model)[1:]:
        part_tables.draw(part)
    style.section("Made again by", "measures all heads anew and compares every number")
    st.code(recompute(scope), language="bash")
    st.caption("Tasks of your own are templates in the build's TOML file (see docs/heads.md), or:")
    st.code(f"atlas tasks MY_TASKS.toml --model {model}", language="bash")
