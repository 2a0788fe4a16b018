"""Charts of heads read on queries and keys: patterns, products by position, curves of repeats, scans."""

import json
from collections.abc import Sequence

from app.charts import LEGEND, Spec, axis, tips
from app.colours import BLUE, GREEN, ORANGE, PURPLE, RED

COLOURS = {
    "original": "#8c8c8c", "rebuilt": BLUE, "ablated": RED, "only": ORANGE, "scaled": GREEN,
    "subtracted": PURPLE,
}  # fmt: skip
TOLD = {
    "original": "the model as it is", "rebuilt": "q and k rebuilt", "ablated": "rebuilt, without the feature",
    "only": "rebuilt, only the feature", "scaled": "rebuilt, only the feature, scaled",
    "subtracted": "the model without the feature", "without": "rebuilt, without the feature",
}  # fmt: skip


def pattern(words: Sequence[str]) -> Spec:
    """A pattern as a heat map; fields query, source, attention, from and to; ``words`` are the tokens."""
    named = {"labelExpr": f"{json.dumps(list(words))}[datum.value]"}
    cells: Spec = {"titlePadding": 4, "labelFontSize": 9.5, "labelLimit": 70, "labelOverlap": len(words) > 22}
    shown = {**cells, **named} if len(words) <= 40 else {**cells, "labels": False}
    return {
        "mark": {"type": "rect"},
        "encoding": {
            "x": axis("source", "source", "ordinal", axis={**shown, "labelAngle": -60}),
            "y": axis("query", "query", "ordinal", axis=shown),
            "color": {"field": "attention", "type": "quantitative", "title": "attention",
                      "scale": {"domain": [0, 1], "scheme": "blues"}, "legend": {"gradientLength": 80}},
            "tooltip": [{"field": "to", "title": "query"}, {"field": "from", "title": "source"},
                        *tips(("query", "position"), ("source", "position of source"),
                              ("attention", "attention"))],
        },
    }  # fmt: skip


def products(x: tuple[str, str], y: tuple[str, str], most: float) -> Spec:
    """Products by position, white at zero; (field, title) of both axes, and the largest magnitude."""
    return {
        "mark": {"type": "rect"},
        "encoding": {
            "x": axis(*x, "ordinal", axis={"labelOverlap": True, "labelAngle": 0}),
            "y": axis(*y, "ordinal", axis={"labelOverlap": True}),
            "color": {"field": "product", "type": "quantitative", "title": "product",
                      "scale": {"domain": [-most, 0, most], "range": [ORANGE, "#f7f7f7", BLUE]},
                      "legend": {"gradientLength": 80, "tickCount": 8, "format": ".2~g"}},
            "tooltip": tips(x, y, ("product", "product")),
        },
    }  # fmt: skip


def curves(field: str, title: str, place: int | None) -> Spec:
    """Variants against the predicted position; fields position, told (the variant), and the measure."""
    colour: Spec = {
        "field": "told", "type": "nominal", "title": None, "legend": {**LEGEND, "columns": 3},
        "scale": {"domain": [TOLD[v] for v in COLOURS], "range": list(COLOURS.values())},
    }  # fmt: skip
    lines: Spec = {
        "mark": {"type": "line", "strokeWidth": 1.5},
        "encoding": {
            "x": axis("position", "predicted position", axis={"format": "d", "tickCount": 10}),
            "y": axis(field, title, axis={"tickCount": 5}),
            "color": colour,
            "tooltip": [{"field": "told", "title": "variant"},
                        *tips(("position", "position"), (field, title), ("n", "blocks"))],
        },
    }  # fmt: skip
    if place is None:
        return lines
    rule = {
        "data": {"values": [{"at": place}]},
        "mark": {"type": "rule", "strokeDash": [3, 3], "color": "#8c8c8c"},
        "encoding": {"x": {"field": "at", "type": "quantitative"}},
    }
    return {"layer": [rule, lines]}


def scan() -> Spec:
    """What removing each feature does to a score; fields feature, change, activation, what."""
    return {
        "mark": {"type": "bar", "cornerRadiusEnd": 1},
        "encoding": {
            "x": axis("what", "feature", "ordinal", sort={"field": "change"},
                      axis={"labelAngle": -60, "labelOverlap": True}),
            "y": axis("change", "change of the score without it"),
            "color": {"condition": {"test": "datum.change < 0", "value": BLUE}, "value": ORANGE},
            "tooltip": [{"field": "what", "title": "feature"},
                        *tips(("change", "change"), ("activation", "activation"))],
        },
    }  # fmt: skip
