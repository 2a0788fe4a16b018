"""Charts of trainings: curves over tokens, firing rates over time, watched features, sweeps."""

import html
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from app import charts, style
from app.colours import BLUE, ORANGE, VIRIDIS
from atlas import figures

LOSSES = {
    "mse_loss": "squared error",
    "sparsity_loss": "sparsity",
    "aux_loss": "auxiliary",
    "objective_loss": "objective",
    "loss": "sum",
}
CURVES = (
    ("L0", "l0", "active features per token", ".3~r"),
    ("Variance explained", "variance_explained", "share", "~%"),
    ("Dead features", "dead_fraction", "share of d_sae", "~%"),
    ("Learning rate", "lr", "learning rate", "~e"),
    ("Speed", "tokens_per_second", "tokens per second", "~s"),
)
MOST_STEPS = 400
NEVER = -7.5
"""Where features that never fired are drawn, below the lowest bin of log10(firing rate)."""
_RATES = {
    "values": [NEVER + 0.125, -6, -5, -4, -3, -2, -1, 0],
    "labelExpr": "datum.value < -7 ? 'never' : format(pow(10, datum.value), '~e')",
}
Row = dict[str, Any]


def thin(rows: pa.Table, most: int = MOST_STEPS) -> pa.Table:
    """At most about ``most`` steps of a log, evenly taken, the last one kept.

    >>> thin(pa.table({"step": [0, 1, 2, 3, 4]}), 2)["step"].to_pylist()
    [0, 3, 4]
    """
    steps = pc.unique(rows["step"]).sort()
    if len(steps) <= most:
        return rows
    stride = -(-len(steps) // most)
    kept = [*range(0, len(steps), stride), len(steps) - 1]
    return rows.filter(pc.is_in(rows["step"], steps.take(pa.array(sorted(set(kept))))))


def _with_settings(rows: pa.Table, saes: Sequence[Row]) -> pa.Table:
    """The rows with the settings that colours and dashes stand for."""
    known = {sae["sae"]: sae for sae in saes}
    names = rows["sae"].to_pylist()
    for field in {f for f in figures.channels(saes) if f not in (None, "sae")}:
        rows = rows.append_column(field, pa.array([known[name].get(field) for name in names]))
    return rows


def _bare(spec: figures.Spec) -> figures.Spec:
    """A chart without its legends, which stand once above all charts."""
    for channel in ("color", "strokeDash"):
        if "field" in spec["encoding"].get(channel, {}):
            spec["encoding"][channel]["legend"] = None
    return spec


def legend(saes: Sequence[Row]) -> None:
    """What colours and dashes mean, once for all charts."""
    if len(saes) < 2:
        return
    first, second = figures.channels(saes)
    colour = figures.colour(saes, first)
    dashes = figures.dash(saes, second).get("strokeDash", {}).get("scale")
    at = dict(zip(dashes["domain"], dashes["range"], strict=True)) if dashes else {}
    scale = colour["scale"]
    groups = [(first, [
        (value, shown, at.get(value, [1, 0]) if second is None else [1, 0])
        for value, shown in zip(scale["domain"], scale["range"], strict=True)
    ])]  # fmt: skip
    if second is not None:
        groups.append((second, [(value, "currentColor", pattern) for value, pattern in at.items()]))
    parts = []
    for field, entries in groups:
        keys = "".join(_key(str(value), shown, pattern) for value, shown, pattern in entries)
        parts.append(f"<div><span>{html.escape(figures.TITLES[field])}</span>{keys}</div>")
    st.html(f'<div class="ha-keys">{"".join(parts)}</div>')


def _key(value: str, colour: str, pattern: Sequence[int]) -> str:
    """A short line in a colour and its dashes, and the value that it stands for."""
    stops, at = [], 0
    for place, length in enumerate(pattern):
        ink = colour if place % 2 == 0 else "transparent"
        stops.append(f"{ink} {at}px {at + length}px")
        at += length
    line = f"background: repeating-linear-gradient(90deg, {', '.join(stops)})"
    return f'<i><b style="{line}"></b>{html.escape(value.rpartition("/")[2])}</i>'


def _losses(log: pa.Table, saes: Sequence[Row], key: str) -> None:
    style.section("Loss", "its parts, log" if len(saes) == 1 else "log")
    if len(saes) > 1:
        part = st.selectbox(
            "Part of the loss", list(LOSSES), format_func=LOSSES.__getitem__, key=f"{key}_part",
            label_visibility="collapsed",
        )  # fmt: skip
        rows = _with_settings(log.filter(pc.greater(log[part], 0.0)), saes)
        spec = _bare(figures.over_tokens(saes, part, f"{LOSSES[part]} (log)", True))
        charts.draw(rows, spec, 165, f"{key}_loss", f"{LOSSES[part]} over tokens, one line per SAE")
        return
    long = [
        log.select(["sae", "step", "tokens", name])
        .rename_columns(["sae", "step", "tokens", "value"])
        .append_column("part", pa.array([shown] * log.num_rows, pa.string()))
        for name, shown in LOSSES.items()
    ]
    rows = pa.concat_tables(long)
    rows = rows.filter(pc.greater(rows["value"], 0.0))
    present = [name for name in LOSSES.values() if name in set(rows["part"].to_pylist())]
    spec = figures.over_tokens([{}], "value", "loss (log)", True)
    colours = dict(zip(LOSSES.values(), figures.NAMED, strict=False))
    spec["encoding"]["color"] = {
        "field": "part", "type": "nominal", "title": None, "sort": present, "legend": charts.LEGEND,
        "scale": {"domain": present, "range": [colours[name] for name in present]},
    }  # fmt: skip
    spec["encoding"]["detail"] = {"field": "part"}
    spec["encoding"]["tooltip"].insert(1, {"field": "part", "title": "part"})
    charts.draw(rows, spec, 205, f"{key}_losses", "Parts of the loss over tokens")


def curves(log: pa.Table, saes: Sequence[Row], key: str) -> None:
    """Loss, L0, variance explained, dead features, learning rate and speed over the tokens seen."""
    log = thin(log)
    legend(saes)
    with st.container(key=f"charts-{key}"):
        cells = [cell for _ in range(2) for cell in st.columns(3)]
        with cells[0]:
            _losses(log, saes, key)
        rows = _with_settings(log, saes)
        for cell, (title, field, unit, form) in zip(cells[1:], CURVES, strict=True):
            with cell:
                style.section(title)
                spec = _bare(figures.over_tokens(saes, field, unit, form=form))
                here = rows.filter(pc.is_valid(rows[field]))
                charts.draw(here, spec, 205, f"{key}_{field}", f"{title} over tokens, one line per SAE")


def _rates(rows: pa.Table) -> pa.Table:
    """Histograms with the edges at which they are drawn, and the step at which the next one begins."""
    steps = sorted(set(rows["step"].to_pylist()))
    wide = steps[-1] - steps[-2] if len(steps) > 1 else 1
    after = dict(zip(steps, [*steps[1:], steps[-1] + wide], strict=True))
    low = [NEVER if at is None else at for at in rows["low"].to_pylist()]
    return pa.table({
        "step": rows["step"], "until": [after[step] for step in rows["step"].to_pylist()],
        "low": low, "high": [at + 0.25 for at in low], "n": rows["n"],
        "what": ["never fired" if at == NEVER else "fired" for at in low],
    })  # fmt: skip


def density(rows: pa.Table, key: str) -> None:
    """Firing rates over time as a heat map, and the latest histogram as bars."""
    if not rows.num_rows:
        st.caption("No histogram of firing rates was logged for this SAE.")
        return
    shown = _rates(rows)
    tips = charts.tips(("step", "step"), ("low", "log10 of the rate from"), ("n", "features"))
    place: dict[str, Any] = {"scale": {"domain": [NEVER, 0], "nice": False}}
    left, right = st.columns([3, 2])
    with left:
        style.section("Firing rates over time", "number of features by firing rate")
        spec = {
            "mark": {"type": "rect"},
            "encoding": {
                "x": charts.axis("step", "optimiser step", axis={"format": "~s", "grid": False}),
                "x2": {"field": "until"},
                "y": charts.axis("low", "firing rate (log)", axis={**_RATES, "grid": False}, **place),
                "y2": {"field": "high"},
                "color": {"field": "n", "type": "quantitative", "title": "features",
                          "scale": {"type": "symlog", "range": list(VIRIDIS)},
                          "legend": {"gradientLength": 150, "tickCount": 4}},
                "tooltip": tips,
            },
        }  # fmt: skip
        charts.draw(shown, spec, 210, f"{key}_heat", "Heat map: features by firing rate and step")
    with right:
        last = max(shown["step"].to_pylist())
        style.section("Firing rates now", f"at step {last:,}")
        spec = {
            "mark": {"type": "bar", "binSpacing": 0},
            "encoding": {
                "x": charts.axis("low", "firing rate (log)", bin="binned", axis=_RATES, **place),
                "x2": {"field": "high"},
                "y": charts.axis("n", "features", axis={"tickCount": 4}),
                "color": {"field": "what", "type": "nominal", "legend": None,
                          "scale": {"domain": ["fired", "never fired"], "range": [BLUE, ORANGE]}},
                "tooltip": tips,
            },
        }  # fmt: skip
        latest = shown.filter(pc.equal(shown["step"], last))
        charts.draw(latest, spec, 210, f"{key}_bars", "Histogram of firing rates at the last step")


def watched(rows: pa.Table, key: str) -> None:
    """The strongest activation of each watched feature over time."""
    style.section("Watched features", "strongest activation in the batch")
    if not rows.num_rows:
        st.caption("No feature of this SAE was watched.")
        return
    features = sorted(set(rows["feature"].to_pylist()))
    domain = [str(f) for f in features]
    colours = [figures.NAMED[i % len(figures.NAMED)] for i in range(len(domain))]
    rows = thin(rows)
    named = pc.cast(rows["feature"], pa.string())
    rows = rows.set_column(rows.column_names.index("feature"), "feature", named)
    spec = {
        "mark": {"type": "line", "strokeWidth": 1.5},
        "encoding": {
            "x": charts.axis("step", "optimiser step", axis={"format": "~s", "tickCount": 5}),
            "y": charts.axis("max_activation", "activation", axis={"tickCount": 4}),
            "color": {"field": "feature", "type": "nominal", "title": "feature", "sort": domain,
                      "scale": {"domain": domain, "range": colours},
                      "legend": {**charts.LEGEND, "columns": 12}},
            "tooltip": [{"field": "feature", "title": "feature"},
                        *charts.tips(("step", "step"), ("max_activation", "activation"))],
        },
    }  # fmt: skip
    charts.draw(rows, spec, 205, f"{key}_watched", "Strongest activation of watched features over steps")


def sweep(rows: Sequence[Row], key: str, said: str) -> None:
    """Dead features, L0 and variance explained against a setting in which the SAEs differ."""
    axes = figures.swept(rows)
    if not axes:
        return
    style.section("Sweep", said)
    x = axes[0]
    if len(axes) > 1:
        x = st.segmented_control(
            "Against", axes, default=axes[0], format_func=figures.TITLES.__getitem__, key=f"{key}_x",
            required=True,
        )  # fmt: skip
    data = pa.Table.from_pylist(list(rows))
    with st.container(key=f"charts-{key}-sweep"):
        for cell, (field, title, form) in zip(st.columns(3), figures.SWEEP, strict=True):
            with cell:
                spec = figures.sweep(rows, x, field, title, form)
                charts.draw(data, spec, 220, f"{key}_sweep_{field}", f"{title} against {figures.TITLES[x]}")
