"""Small charts as Vega-Lite specifications: axes named with their units, colours all can tell apart."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import streamlit as st

from app.colours import BLUE, GREEN, ORANGE, PURPLE, RED

SERIES = (BLUE, ORANGE, GREEN)
Spec = dict[str, Any]
POWERS = [0, *(10**power for power in range(8))]
LEGEND = {"orient": "top", "offset": 2, "labelFontSize": 11, "symbolSize": 50}


def axis(field: str, title: str, kind: str = "quantitative", **more: Any) -> Spec:
    """One encoding channel with its title."""
    drawn = {"titlePadding": 4, "titleFontSize": 11, "labelFontSize": 10.5, **more.pop("axis", {})}
    return {"field": field, "type": kind, "title": title, "axis": drawn, **more}


def tips(*fields: tuple[str, str]) -> list[Spec]:
    """Tooltip lines from (field, title) pairs."""
    return [{"field": f, "title": title, "format": ".4~g", "type": "quantitative"} for f, title in fields]


def draw(data: pa.Table, spec: Spec, height: int, key: str, alt: str) -> None:
    """Draw a specification over a table, in the theme of the page."""
    full = {"height": height, "padding": {"left": 2, "right": 4, "top": 2, "bottom": 2}, **spec}
    st.vega_lite_chart(_used(data, full), full, width="stretch", height=height + 30, key=key, alt=alt)


def _used(data: pa.Table, spec: Spec) -> pa.Table:
    """The columns that a specification names: the others would be sent for nothing.

    >>> rows = pa.table({"x": [1], "y": [2], "xy": [3]})
    >>> _used(rows, {"x": {"field": "x"}, "if": "datum.xy > 1"}).column_names
    ['x', 'xy']
    """
    words = set(re.findall(r"\w+", json.dumps(spec)))
    return data.select([name for name in data.column_names if set(re.findall(r"\w+", name)) <= words])


def histogram(name: str = "activation", scale: str = "linear") -> Spec:
    """A histogram of stored bins, the axis linear or log; counts on a symlog axis so that rare ones show."""
    ticks: Spec = {"format": ".2~g", "tickCount": 6}
    shape: Spec = {"type": "log", "nice": False} if scale == "log" else {}
    return {
        "mark": {"type": "bar", "color": BLUE, "binSpacing": 0},
        "encoding": {
            "x": axis("low", name if scale == "linear" else f"{name} (log)", bin="binned", axis=ticks,
                      scale=shape),
            "x2": {"field": "high"},
            "y": axis(
                "n",
                "tokens (log)",
                scale={"type": "symlog"},
                axis={"values": POWERS, "labelExpr": "format(datum.value, '~s')"},
            ),
            "tooltip": tips(("low", "from"), ("high", "to"), ("n", "tokens")),
        },
    }  # fmt: skip


def positions(context: int) -> Spec:
    """Share of the strongest tokens and of all active tokens at each position: position, name, share, n."""
    names = ["its strongest 2000 tokens", "all its tokens"]
    return {
        "mark": {"type": "line", "strokeWidth": 1.4, "interpolate": "step", "clip": True},
        "encoding": {
            "x": axis(
                "position", "position in the block (0 is BOS)", scale={"domain": [0, context]},
                axis={"tickCount": 8, "format": "d"},
            ),
            "y": axis("share", "share of tokens", axis={"format": "~%", "tickCount": 4}),
            "color": {
                "field": "name", "type": "nominal", "sort": names, "title": None,
                "scale": {"domain": names, "range": [ORANGE, BLUE]}, "legend": LEGEND,
            },
            "tooltip": [{"field": "name", "title": "of"},
                        *tips(("position", "position"), ("n", "tokens"), ("share", "share"))],
        },
    }  # fmt: skip


def by_head(n_heads: int, measures: Sequence[str]) -> Spec:
    """Measures (of HEAD_MEASURES) beside each other for every head; fields head, measure, share."""
    colours = [HEAD_MEASURES[name] for name in measures]
    return {
        "mark": {"type": "bar", "cornerRadiusEnd": 1},
        "encoding": {
            "x": axis(
                "head", "head", "ordinal", scale={"domain": list(range(n_heads))}, axis={"labelAngle": 0}
            ),
            "xOffset": {"field": "measure", "sort": list(measures)},
            "y": axis("share", "share", axis={"tickCount": 4, "labelOverlap": False}),
            "color": {
                "field": "measure", "type": "nominal", "sort": list(measures), "title": None,
                "scale": {"domain": list(measures), "range": colours},
                "legend": LEGEND,
            },
            "tooltip": [{"field": "head", "title": "head"}, {"field": "measure", "title": "measure"},
                        *tips(("share", "share"))],
        },
    }  # fmt: skip


HEAD_MEASURES = {
    "decoder share": BLUE, "FVE": ORANGE, "FVE where active": RED, "DFA share": GREEN, "logit share": PURPLE,
}  # fmt: skip
"""How much of a feature is a head's, each measure with its colour."""


def by_layer(
    fields: Sequence[tuple[str, str]], title: str, n_layers: int, zero: bool | None, *, joined: bool
) -> Spec:
    """Values over layers for long data with fields layer, name, value; ``zero`` None: a logarithmic axis.

    Points are ``joined`` by lines where a layer has one value of a name.
    """
    names = [label for _, label in fields]
    ticks: Spec = {"format": ".3~g", "tickCount": 5}
    if zero is None:
        ticks["values"] = [10.0**power for power in range(-6, 3)]
    colour: Spec = {
        "field": "name", "type": "nominal", "sort": names, "title": None,
        "scale": {"domain": names, "range": [*SERIES, "#cc79a7"][: len(names)]},
        "legend": LEGEND if len(names) > 1 else None,
    }  # fmt: skip
    return {
        "mark": {"type": "line", "point": {"size": 28}, "strokeWidth": 1.5}
        if joined
        else {"type": "circle", "size": 28, "opacity": 0.8},
        "encoding": {
            "x": axis(
                "layer", "layer", axis={"values": list(range(n_layers)), "labelAngle": 0, "format": "d"}
            ),
            "y": axis("value", title, scale={"type": "log"} if zero is None else {"zero": zero},
                      axis=ticks),
            "color": colour,
            "tooltip": [{"field": "sae", "title": "SAE"}, {"field": "name", "title": "value"},
                        *tips(("layer", "layer"), ("value", "is"))],
        },
    }  # fmt: skip


def scatter(x: tuple[str, str], y: tuple[str, str]) -> Spec:
    """One point per feature; the chosen ones (field chosen) stand out."""
    return {
        "mark": {"type": "circle", "opacity": 0.75},
        "encoding": {
            "x": axis(*x), "y": axis(*y),
            "color": {"field": "chosen", "type": "nominal", "title": None, "legend": None,
                      "scale": {"domain": [False, True], "range": ["#8c8c8c", ORANGE]}},
            "size": {"field": "chosen", "type": "nominal", "legend": None,
                     "scale": {"domain": [False, True], "range": [14, 60]}},
            "order": {"field": "chosen"},
            "tooltip": tips(("feature", "feature"), x, y),
        },
    }  # fmt: skip


def densities(saes: Sequence[str]) -> Spec:
    """Share of each SAE's features by how often they fire; fields sae, low, high, share, n."""
    return {
        "mark": {"type": "bar", "opacity": 0.55, "binSpacing": 0},
        "encoding": {
            "x": axis("low", "density: share of tokens on which a feature fires (log)",
                      axis={"format": "~g", "tickCount": 8}, scale={"type": "log"}),
            "x2": {"field": "high"},
            "y": axis("share", "share of features", axis={"format": "~%", "tickCount": 5}, stack=None),
            "y2": {"datum": 0},
            "color": {
                "field": "sae", "type": "nominal", "sort": list(saes), "title": None, "legend": LEGEND,
                "scale": {"domain": list(saes), "range": list(SERIES)},
            },
            "tooltip": [{"field": "sae", "title": "SAE"},
                        *tips(("low", "from"), ("high", "to"), ("n", "features"), ("share", "share"))],
        },
    }  # fmt: skip
