"""Charts of the evidence about one feature: where it reads from, and products with positions."""

from app.charts import Spec, axis, tips
from app.colours import BLUE, PURPLE


def shares(names: list[str]) -> Spec:
    """Horizontal bars of shares that overlap, in the order of ``names``; fields name, meaning, share."""
    y = axis("name", "", "nominal", sort=names, axis={"labelLimit": 190, "ticks": False, "domain": False})
    return {
        "mark": {"type": "bar", "color": BLUE, "cornerRadiusEnd": 1},
        "encoding": {
            "y": y,
            "x": axis("share", "share of its positive DFA", scale={"domain": [0, 1]},
                      axis={"format": "~%", "tickCount": 4}),
            "tooltip": [{"field": "meaning", "title": "share"}, *tips(("share", "is"))],
        },
    }  # fmt: skip


def distances(labels: list[str]) -> Spec:
    """Positive DFA up, negative down, by bin of distance; fields bin, kind, value, share."""
    kinds = ["for", "against"]
    return {
        "mark": {"type": "bar", "cornerRadiusEnd": 1},
        "encoding": {
            "x": axis("bin", "tokens back to the source", "ordinal", sort=labels,
                      scale={"domain": labels}, axis={"labelAngle": 0, "labelFlush": False}),
            "y": axis("value", "of its positive DFA", axis={"format": "~%", "tickCount": 5}),
            "color": {
                "field": "kind", "type": "nominal", "sort": kinds, "title": None,
                "scale": {"domain": kinds, "range": [BLUE, PURPLE]},
                "legend": {"orient": "top", "offset": 2, "labelFontSize": 11, "symbolSize": 50},
            },
            "tooltip": [{"field": "bin", "title": "tokens back"}, {"field": "kind", "title": "which"},
                        *tips(("value", "is"))],
        },
    }  # fmt: skip


def products(title: str) -> Spec:
    """A feature's product with every position; fields position, product."""
    return {
        "mark": {"type": "line", "color": BLUE, "strokeWidth": 1.4},
        "encoding": {
            "x": axis("position", "position in the block (0 is BOS)", axis={"tickCount": 8, "format": "d"}),
            "y": axis("product", title, axis={"tickCount": 5, "format": ".2~g"}),
            "tooltip": tips(("position", "position"), ("product", "product")),
        },
    }
