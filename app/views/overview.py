"""The SAEs of a release, how good they are, and where the release comes from."""

import html
import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from app import charts, navigation, part_tables, state, style
from app.state import Scope
from atlas.store import reports
from atlas.store.queries import overview as queries
from atlas.store.queries.features import some_features

SPLITS = {"eval": "without position 0", "eval_with_bos": "with position 0 (BOS)"}
PLOTS = (
    ("Variance explained", "share", (("variance_explained", "variance explained"),), False),
    (
        "Cross-entropy added",
        "nats above clean (log)",
        (("added_spliced", "spliced"), ("added_mean", "mean"), ("added_zero", "zero")),
        None,
    ),
    ("L0", "active features per token", (("l0", "L0"),), True),
    ("Alive features", "share of d_sae", (("alive_share", "alive"),), True),
)


def _columns() -> dict[str, Any]:
    column = st.column_config
    plain = column.NumberColumn
    return {
        "sae": column.TextColumn("SAE", pinned=True),
        "site": column.TextColumn("site", width="small"),
        "layer": plain("layer", width="small"),
        "head": column.TextColumn("head", width="small"),
        "d_sae": plain("d_sae", help="number of features", width="small"),
        "architecture": column.TextColumn("kind", width="small"),
        "l0": plain("L0", help="mean number of active features per token", format="%.1f"),
        "variance_explained": column.ProgressColumn(
            "variance explained", min_value=0, max_value=1, format="percent", color="#0072b2"
        ),
        "ce_clean": plain("CE clean", help="nats", format="%.3f"),
        "ce_spliced": plain("CE spliced", help="nats, site replaced by its reconstruction", format="%.3f"),
        "ce_zero": plain("CE zero", help="nats, site set to zero", format="%.3f"),
        "ce_mean": plain("CE mean", help="nats, site set to its mean", format="%.3f"),
        "ce_recovered": plain("CE recovered", help="(zero - spliced) / (zero - clean)", format="%.3f"),
        "alive": plain("alive", help="features that fire in the evaluation tokens"),
        "dead": plain("dead"),
        "tokens_trained": plain("trained on", help="training tokens", format="compact"),
        "n_tokens": plain("evaluated on", help="evaluation tokens", format="compact"),
    }


def _table(scope: Scope, rows: pa.Table) -> None:
    columns = _columns()
    if rows["head"].null_count == rows.num_rows:
        columns.pop("head")
    else:
        written = pc.fill_null(pc.cast(rows["head"], pa.string()), "")
        rows = rows.set_column(rows.column_names.index("head"), "head", written)
    height = min(640, 38 + 35 * max(1, rows.num_rows))
    chosen = st.dataframe(
        rows,
        column_order=list(columns),
        column_config=columns,
        hide_index=True,
        height=height,
        on_select="rerun",
        selection_mode="single-row",
        key="sae_table",
        alt="One row per SAE with its quality",
    )
    picked = chosen.selection.rows
    if picked and picked[0] < rows.num_rows:
        sae = rows["sae"][picked[0]].as_py()
        order = scope.ask(some_features, sae, "max_activation", 1)
        if order.num_rows:
            navigation.go(navigation.href("feature", sae=sae, feature=order["feature"][0].as_py()))
        st.info("No feature of this SAE fires in the summarised text.")


def _long(rows: pa.Table, fields: tuple[tuple[str, str], ...]) -> pa.Table:
    """Long form for a plot over layers: layer, sae, name, value; rows without the value are left out."""
    parts = []
    for field, name in fields:
        part = rows.select(["layer", "sae", field]).rename_columns(["layer", "sae", "value"])
        part = part.filter(pc.is_valid(part["value"]))
        parts.append(part.append_column("name", pa.array([name] * part.num_rows, pa.string())))
    return pa.concat_tables(parts)


def _plots(scope: Scope, rows: pa.Table) -> None:
    chosen = [ref.sae for ref in scope.z_saes.values()] or rows["sae"].to_pylist()
    rows = rows.filter(pc.is_in(rows["sae"], pa.array(chosen, pa.string())))
    for name in ("spliced", "mean", "zero"):
        added = pc.subtract(rows[f"ce_{name}"], rows["ce_clean"])
        # On a logarithmic axis there is no place for what does no harm at all.
        added = pc.if_else(pc.greater(added, 0.0), added, None)
        rows = rows.append_column(f"added_{name}", added)
    joined = len(pc.unique(rows["layer"])) == rows.num_rows
    with st.container(key="charts"):
        columns = st.columns(len(PLOTS))
    for column, (title, unit, fields, zero) in zip(columns, PLOTS, strict=True):
        with column:
            style.section(title)
            spec = charts.by_layer(fields, unit, scope.model.n_layers, zero, joined=joined)
            charts.draw(_long(rows, fields), spec, 170, f"plot_{title}", f"{title} by layer, {unit}")


def _reports(scope: Scope, split: str) -> None:
    """The tables of the seeds for which this release has rows, each under its own heading."""
    model = scope.model.model
    found = {
        "By layer": scope.ask(reports.layers, model, split),
        "q and k": scope.ask(reports.qk, model, split),
        "Sweeps": scope.ask(reports.sweep, model, split),
        "Stages": scope.ask(reports.stages, model, split),
        "Pruning": scope.ask(reports.pruning, model),
    }
    found = {name: parts for name, parts in found.items() if parts}
    if not found:
        return
    style.section("Quality", "click a heading to sort; atlas report prints the same tables")
    for tab, (name, parts) in zip(st.tabs(list(found)), found.items(), strict=True):
        with tab:
            beside = st.container(key=f"charts-{name}").columns(len(parts)) if 1 < len(parts) < 4 else []
            for place, part in enumerate(parts):
                with beside[place] if beside else st.container():
                    part_tables.draw(part)


def _model_facts(scope: Scope) -> None:
    model = scope.model
    shape = f"{model.n_layers} x {model.n_heads} heads"
    style.facts(
        [
            ("model", model.model),
            ("shape", shape),
            ("weights", model.processing),
            ("d_model", str(model.d_model)),
            ("d_head", str(model.d_head)),
            ("vocabulary", f"{model.d_vocab:,}"),
            ("context", f"{model.n_ctx} tokens"),
            ("source", model.source),
            ("SAEs", str(sum(ref.model == model.model for ref in scope.saes))),
            ("release", scope.release.label),
            ("published", scope.release.created[:16].replace("T", " ") + " UTC"),
        ]
    )


def _provenance(scope: Scope) -> None:
    rows = []
    for key, value in scope.ask(queries.provenance).items():
        shown = queries.readable(value)
        text = value if isinstance(shown, str) else json.dumps(shown, indent=1, ensure_ascii=False)
        rows.append(
            f"<tr><td class='ha-key'>{html.escape(key)}</td>"
            f"<td class='ha-pre'><pre>{html.escape(text)}</pre></td></tr>"
        )
    st.html(f"<table class='ha-table'>{''.join(rows)}</table>")


def _manifest(scope: Scope) -> None:
    rows = scope.ask(queries.manifest).to_pylist()
    body = "".join(
        f"<tr><td>{html.escape(r['table_name'])}</td><td>{r['rows']:,}</td>"
        f"<td><code>{html.escape(str(r['digest'])[:12])}</code></td></tr>"
        for r in rows
    )
    st.html(f"<table class='ha-table'><tr><th>table</th><th>rows</th><th>digest</th></tr>{body}</table>")


def render() -> None:
    """Quality of every SAE, plots by layer, provenance."""
    scope = state.scope()
    style.title("Overview", "What was measured, how well the SAEs describe it, and where it comes from")
    _model_facts(scope)
    split = st.segmented_control(
        "Statistics", list(SPLITS), default="eval", format_func=SPLITS.__getitem__, required=True,
        key="split", label_visibility="collapsed",
    )  # fmt: skip
    rows = scope.ask(queries.sae_table, scope.model.model, split)
    if not rows.num_rows:
        st.info(f"This release holds no SAE of {state.plain(scope.model.model)}.")
        return
    _plots(scope, rows)
    _reports(scope, split)
    style.section("SAEs", "tick a row to open the strongest feature of that SAE; click a heading to sort")
    _table(scope, rows)
    left, right = st.columns([3, 2])
    with left:
        style.section("Where it comes from")
        _provenance(scope)
    with right:
        style.section("Tables")
        _manifest(scope)
