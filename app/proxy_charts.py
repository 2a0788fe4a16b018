"""Charts of a guess about a feature: specificity with its interval, and activation split by the guess."""

from collections.abc import Sequence
from typing import Any

from app.charts import LEGEND, Spec, axis, tips
from app.colours import BLUE, ORANGE
from atlas.store.proxies import Bin

HOLDS = ["guess holds", "guess does not hold"]


def _place(one: Bin) -> dict[str, Any]:
    return {"low": float(one.low), "high": float(one.high), "middle": (one.low + one.high) / 2}


def rows(bins: Sequence[Bin]) -> list[dict[str, Any]]:
    """One row per bin with firing tokens: low, high, middle, share, from, to, n."""
    return [
        {**_place(one), "share": one.counts.precision, "from": one.interval[0], "to": one.interval[1],
         "n": one.counts.n_fires}
        for one in bins
        if one.counts.n_fires
    ]  # fmt: skip


def mass_rows(bins: Sequence[Bin]) -> list[dict[str, Any]]:
    """Two rows per bin: the activation where the guess holds, and where it does not."""
    found = []
    for one in bins:
        c = one.counts
        parts = ((c.mass_both, c.n_both), (c.mass - c.mass_both, c.n_fires - c.n_both))
        for holds, (mass, n) in zip(HOLDS, parts, strict=True):
            found.append({**_place(one), "holds": holds, "mass": mass, "n": n})
    return found


def specificity(unit: str) -> Spec:
    """Share of the firing tokens at each activation on which the guess holds."""
    x = axis("middle", unit, scale={"zero": True}, axis={"tickCount": 6, "format": ".2~g"})
    y = axis(
        "share", "share on which it holds", scale={"domain": [0, 1]}, axis={"format": "~%", "tickCount": 4}
    )
    tooltip = [*tips(("low", "from"), ("high", "to"), ("share", "holds on"), ("n", "tokens"))]
    return {
        "layer": [
            {"mark": {"type": "rule", "color": BLUE, "opacity": 0.5},
             "encoding": {"x": x, "y": {**axis("from", "share on which it holds")}, "y2": {"field": "to"}}},
            {"mark": {"type": "point", "filled": True, "size": 45, "color": BLUE},
             "encoding": {"x": x, "y": y, "tooltip": tooltip}},
        ]
    }  # fmt: skip


def expected_value(unit: str) -> Spec:
    """Summed activation in each bin, stacked by whether the guess holds."""
    return {
        "mark": {"type": "bar"},
        "encoding": {
            "x": axis("low", unit, bin="binned", axis={"tickCount": 6, "format": ".2~g"}),
            "x2": {"field": "high"},
            "y": axis("mass", "summed activation", axis={"tickCount": 4}),
            "color": {
                "field": "holds", "type": "nominal", "sort": HOLDS, "title": None, "legend": LEGEND,
                "scale": {"domain": HOLDS, "range": [BLUE, ORANGE]},
            },
            "tooltip": [{"field": "holds", "title": "tokens"},
                        *tips(("low", "from"), ("high", "to"), ("mass", "activation"), ("n", "tokens"))],
        },
    }  # fmt: skip
