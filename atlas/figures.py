"""Figures of training as Vega-Lite specifications, drawn by the app and saved by ``atlas report``.

Colours are Okabe and Ito's for names and a scale like the middle of viridis for amounts, both readable on
light and on dark ground; a second setting is told apart by dashes, so nothing rests on colour alone.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]
Row = Mapping[str, Any]
SETTINGS = ("l1_coefficient", "k", "d_sae", "layer", "head", "site", "architecture")
"""What SAEs that are compared may differ in, the most telling first."""
TITLES = {
    "sae": "SAE", "l1_coefficient": "L1 coefficient", "k": "k", "d_sae": "d_sae", "layer": "layer",
    "head": "head", "site": "site", "architecture": "architecture",
}  # fmt: skip
NAMED = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c", "#b8a800")
AMOUNTS = ("#4667aa", "#2f7a9a", "#21918c", "#28ae80", "#5ec962", "#8fd744")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [1, 3], [12, 3])
LEGEND = {
    "orient": "top",
    "offset": 2,
    "labelFontSize": 11,
    "symbolSize": 60,
    "columns": 6,
    "labelLimit": 320,
}
FROM_ZERO = ("lr", "tokens_per_second", "dead_fraction")
"""Amounts whose axis begins at zero."""
SWEEP = (
    ("dead_share", "dead features, share of d_sae", "~%"),
    ("l0", "L0, active features per token", ".3~r"),
    ("variance_explained", "variance explained, share", "~%"),
)
_NAME = re.compile(r"(?:.*/)?L(\d+)(?:\.H(\d+))?\.(\w+)\.([a-z]+)-(\d+)(?:-(.+))?")
_SWEPT = re.compile(r"(?:^|-)(l[01]_coefficient|k)-([0-9.]+(?:e-?\d+)?)(?=-|$)")


def settings_of(sae: str) -> dict[str, Any]:
    """What the name of an SAE says about it; nothing where it is named otherwise.

    >>> settings_of("docs-2l/L00.H03.q.relu-256-l1_coefficient-0.1")["l1_coefficient"]
    0.1
    >>> settings_of("mine")
    {'sae': 'mine'}
    """
    match = _NAME.fullmatch(sae)
    if match is None:
        return {"sae": sae}
    layer, head, site, architecture, d_sae, label = match.groups()
    # The weight of JumpReLU's L0 penalty stands in the same column as that of L1.
    found = _SWEPT.findall(label or "")
    swept: dict[str, Any] = {key.replace("l0_", "l1_"): float(value) for key, value in found}
    if "k" in swept:
        swept["k"] = int(swept["k"])
    head_number = None if head is None else int(head)
    return {
        "sae": sae, "layer": int(layer), "head": head_number, "site": site, "architecture": architecture,
        "d_sae": int(d_sae), **swept,
    }  # fmt: skip


def varying(rows: Sequence[Row]) -> list[str]:
    """The settings in which SAEs differ.

    >>> varying([{"k": 8, "d_sae": 64}, {"k": 16, "d_sae": 64}])
    ['k']
    """
    return [name for name in SETTINGS if len({row.get(name) for row in rows}) > 1]


def channels(rows: Sequence[Row]) -> tuple[str, str | None]:
    """The fields that colour and dashes stand for: one or two settings where those tell every SAE apart.

    >>> channels([{"sae": "a", "k": 8}, {"sae": "b", "k": 16}])
    ('k', None)
    >>> channels([{"sae": "a", "k": 8}, {"sae": "b", "k": 8}])
    ('sae', None)
    """
    names = varying(rows)
    if len(names) == 1 and len({row.get(names[0]) for row in rows}) == len(rows):
        return names[0], None
    for second in names[1:]:
        values = {row.get(second) for row in rows}
        if len({(row.get(names[0]), row.get(second)) for row in rows}) == len(rows):
            return (names[0], second) if len(values) <= len(DASHES) else ("sae", None)
    return "sae", None


def axis(field: str, title: str, log: bool = False, **more: Any) -> Spec:
    """A quantitative axis with a title that says the unit."""
    drawn = {"titlePadding": 4, "titleFontSize": 11, "labelFontSize": 10.5, **more}
    scale = {"type": "log"} if log else {"zero": False}
    return {"field": field, "type": "quantitative", "title": title, "axis": drawn, "scale": scale}


def colour(rows: Sequence[Row], field: str) -> Spec:
    """Colour of a field over these SAEs: named colours for names, an ordered scale for amounts."""
    values = sorted({row.get(field) for row in rows if row.get(field) is not None}, key=_order)
    amounts = all(isinstance(value, int | float) for value in values)
    shown = _spread(AMOUNTS, len(values)) if amounts else [NAMED[i % len(NAMED)] for i in range(len(values))]
    return {
        "field": field, "type": "ordinal" if amounts else "nominal", "title": TITLES.get(field, field),
        "sort": values, "scale": {"domain": values, "range": shown}, "legend": _legend(field),
    }  # fmt: skip


def _legend(field: str) -> Spec:
    """A legend; names of SAEs are long, so they stand without their model and in few columns."""
    if field != "sae":
        return LEGEND
    return {**LEGEND, "columns": 3, "labelExpr": "replace(datum.label, /^.*[/]/, '')"}


def dash(rows: Sequence[Row], field: str | None) -> Spec:
    """The dashes of a second setting; a ninth name and more are dashed too, so that colours may repeat."""
    if field is None:
        names = sorted({str(row.get("sae")) for row in rows})
        if len(names) <= len(NAMED):
            return {}
        dashes = [list(DASHES[(i // len(NAMED)) % len(DASHES)]) for i in range(len(names))]
        return {"strokeDash": {"field": "sae", "type": "nominal", "sort": names, "legend": _legend("sae"),
                               "title": "SAE", "scale": {"domain": names, "range": dashes}}}  # fmt: skip
    values = sorted({row.get(field) for row in rows if row.get(field) is not None}, key=_order)
    return {
        "strokeDash": {
            "field": field, "type": "ordinal", "title": TITLES.get(field, field), "sort": values,
            "legend": {**LEGEND, "symbolType": "stroke", "symbolSize": 260},
            "scale": {"domain": values, "range": [list(d) for d in DASHES[: len(values)]]},
        }
    }  # fmt: skip


def over_tokens(rows: Sequence[Row], field: str, title: str, log: bool = False, form: str = ".3~r") -> Spec:
    """A curve per SAE over the tokens it has seen; ``rows`` are the SAEs and their settings."""
    first, second = channels(rows)
    y = axis(field, title, log, format=form, tickCount=5)
    if field in FROM_ZERO:
        y["scale"]["zero"] = True
    return {
        "mark": {"type": "line", "strokeWidth": 1.7, "clip": True},
        "encoding": {
            "x": axis("tokens", "tokens seen", format="~s", tickCount=5),
            "y": y,
            "detail": {"field": "sae"},
            **({"color": colour(rows, first)} if len(rows) > 1 else {"color": {"value": NAMED[0]}}),
            **(dash(rows, second) if len(rows) > 1 else {}),
            "tooltip": [{"field": "sae", "title": "SAE"}, _tip("tokens", "tokens", ",d"),
                        _tip("step", "step", ",d"), _tip(field, title, ".4~g")],
        },
    }  # fmt: skip


def swept(rows: Sequence[Row]) -> list[str]:
    """The settings of SAEs that may stand on the axis of a sweep."""
    return [name for name in varying(rows) if name in ("l1_coefficient", "k", "d_sae")]


def sweep(rows: Sequence[Row], x: str, field: str, title: str, form: str) -> Spec:
    """What became of SAEs against a swept setting: points, joined where only that setting differs."""
    others = [name for name in varying(rows) if name != x]
    second = others[0] if others else None
    encoding: Spec = {
        "x": axis(x, TITLES[x], log=all((row.get(x) or 0) > 0 for row in rows), tickCount=5, format="~g"),
        "y": axis(field, title, format=form, tickCount=5),
        "detail": [{"field": name} for name in others],
        "color": colour(rows, second) if second else {"value": NAMED[0]},
        "tooltip": [{"field": "sae", "title": "SAE"}, _tip(x, TITLES[x], "~g"), _tip(field, title, ".4~g")],
    }  # fmt: skip
    encoding["y"]["scale"] = {"zero": True}
    values = [row[x] for row in rows if row.get(x) is not None]
    encoding["x"]["axis"]["values"] = sorted(set(values))
    return {
        "mark": {"type": "line", "point": {"size": 44}, "strokeWidth": 1.5},
        "encoding": encoding,
        "transform": [{"filter": f"isValid(datum.{x}) && isValid(datum.{field})"}],
    }


def beside(specs: Sequence[Spec], data: Sequence[Row], width: int, height: int, columns: int = 3) -> Spec:
    """Several charts of one table as one figure, for a file."""
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"values": [_plain(row) for row in data]},
        "concat": [{"width": width, "height": height, **spec} for spec in specs],
        "columns": columns,
        "config": {"background": "white", "font": "sans-serif"},
    }


def _plain(row: Row) -> dict[str, Any]:
    """A row as JSON can say it: NaN and infinities become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def _tip(field: str, title: str, form: str) -> Spec:
    return {"field": field, "title": title, "type": "quantitative", "format": form}


def _order(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value


def _spread(colours: Sequence[str], n: int) -> list[str]:
    """``n`` colours from an ordered scale, its ends included, interpolated where there are too few."""
    if n <= 1:
        return [colours[len(colours) // 2]] * n
    out = []
    for i in range(n):
        place = i / (n - 1) * (len(colours) - 1)
        low = min(int(place), len(colours) - 2)
        below, above = ([int(c[j : j + 2], 16) for j in (1, 3, 5)] for c in colours[low : low + 2])
        mixed = (round(a + (b - a) * (place - low)) for a, b in zip(below, above, strict=True))
        out.append("#" + "".join(f"{channel:02x}" for channel in mixed))
    return out
