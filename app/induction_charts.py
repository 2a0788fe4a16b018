"""Charts of induction and of tasks: one head's curves over all heads', shares of matches, effects by head."""

from app.charts import LEGEND, Spec, axis, tips
from app.colours import BLUE, GREEN, ORANGE

OTHERS = "#8c8c8c"


def curve(field: str, title: str, zero: bool) -> Spec:
    """A measure of every head against the repeated tokens; the chosen head (field chosen) stands out."""
    return {
        "mark": {"type": "line", "point": {"size": 18}, "clip": True},
        "encoding": {
            "x": axis("prefix", "repeated tokens", axis={"format": "d", "tickMinStep": 1}),
            "y": axis(field, title, scale={"zero": zero}, axis={"tickCount": 5}),
            "detail": {"field": "name", "type": "nominal"},
            "order": {"field": "prefix"},
            "color": {"field": "chosen", "type": "nominal", "legend": None, "title": None,
                      "scale": {"domain": [False, True], "range": [OTHERS, ORANGE]}},
            "opacity": {"field": "chosen", "type": "nominal", "legend": None,
                        "scale": {"domain": [False, True], "range": [0.25, 1]}},
            "strokeWidth": {"field": "chosen", "type": "nominal", "legend": None,
                            "scale": {"domain": [False, True], "range": [1, 2.4]}},
            "tooltip": [{"field": "name", "title": "head"},
                        *tips(("prefix", "repeated"), (field, title), ("n", "sequences"))],
        },
    }  # fmt: skip


def matches() -> Spec:
    """Share of the attended pairs by the length of the match, with the number of pairs on each bar."""
    x = axis("label", "tokens that match (0: no induction)", "ordinal", sort=None, axis={"labelAngle": 0})
    y = axis("share", "share of pairs above the threshold", axis={"format": "~%", "tickCount": 4})
    hover = [{"field": "label", "title": "matching tokens"}, *tips(("n", "pairs"), ("share", "share"))]
    return {
        "layer": [
            {"mark": {"type": "bar", "color": BLUE}, "encoding": {"x": x, "y": y, "tooltip": hover}},
            {
                "mark": {"type": "text", "dy": -6, "fontSize": 10},
                "encoding": {"x": x, "y": y, "text": {"field": "n", "format": ",d"}, "tooltip": hover},
            },
        ]
    }


def corruption() -> Spec:
    """Mean attention before and after long matches are cut; fields what, when, attention, n."""
    when = ["as it is", "cut to 1 token"]
    return {
        "mark": {"type": "bar"},
        "encoding": {
            "x": axis("what", "", "nominal", sort=None, axis={"labelAngle": 0}),
            "xOffset": {"field": "when", "sort": when},
            "y": axis("attention", "mean attention to the source", scale={"domainMin": 0},
                      axis={"tickCount": 4}),
            "color": {"field": "when", "type": "nominal", "sort": when, "title": None, "legend": LEGEND,
                      "scale": {"domain": when, "range": [BLUE, ORANGE]}},
            "tooltip": [{"field": "what", "title": "pairs"}, {"field": "when", "title": "text"},
                        *tips(("attention", "attention"), ("n", "pairs"))],
        },
    }  # fmt: skip


def effects() -> Spec:
    """Rise of a task's loss without each head of a layer, by both ablations, with two standard errors."""
    kinds = ["zero", "mean"]
    x = axis("name", "head", "nominal", sort=None, axis={"labelAngle": 0})
    offset = {"field": "ablation", "sort": kinds}
    hover = [{"field": "name", "title": "head"}, {"field": "ablation", "title": "ablation"},
             *tips(("effect", "rise of the loss, nats"), ("standard_error", "standard error"))]  # fmt: skip
    return {
        "layer": [
            {
                "mark": {"type": "bar"},
                "encoding": {
                    "x": x, "xOffset": offset,
                    "y": axis("effect", "rise of the loss (nats)", axis={"tickCount": 5}),
                    "color": {"field": "ablation", "type": "nominal", "sort": kinds, "title": None,
                              "scale": {"domain": kinds, "range": [BLUE, GREEN]}, "legend": LEGEND},
                    "tooltip": hover,
                },
            },
            {
                "mark": {"type": "rule", "strokeWidth": 1},
                "encoding": {
                    "x": x, "xOffset": offset, "y": {"field": "low", "type": "quantitative"},
                    "y2": {"field": "high"}, "tooltip": hover,
                },
            },
        ]
    }  # fmt: skip
