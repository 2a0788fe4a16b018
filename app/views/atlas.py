"""The grid of heads: how far the annotation is, what was judged, and any number that heads have."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from app import colours, families, layer_rows, navigation, state, style
from app.components import draw
from app.feature_evidence import READS
from app.state import Scope
from atlas.db import annotations
from atlas.db.annotations import HeadProgress
from atlas.store.queries import heads
from atlas.tables import DFA_SHARES, FAMILY_NAMES

Place = tuple[int, int]
PROGRESS, SEMANTICITY = "annotation progress", "semanticity"
SHORT = {
    "top10_decoder_share": "top-10 decoder share",
    "max_decoder_share": "largest decoder share",
    "top10_fve": "top-10 FVE",
    "n_top": "features led",
    "top10_dfa_share": "top-10 DFA share",
    "effective_features": "effective features",
    "distance": "DFA distance",
    "corr_decoder_fve": "rank correlation: decoder, FVE",
    "corr_decoder_dfa": "rank correlation: decoder, DFA",
    "corr_fve_dfa": "rank correlation: FVE, DFA",
    **{name: f"DFA from {told}" for name, told in READS.items() if name in DFA_SHARES},
    **{f"n_{name}": f"features: {families.spoken(name)}" for name in FAMILY_NAMES},
}
SHOWN = 9
"""Numbers that a head's tooltip has room for."""


@dataclass(frozen=True)
class Numbers:
    """One number per head, with what it means."""

    name: str
    unit: str
    values: Mapping[Place, float]


def head_numbers(scope: Scope) -> dict[str, Numbers]:
    """Every number that can colour the grid, by name: head scores first, then what features say."""
    found: dict[str, dict[Place, float]] = {}
    units: dict[str, str] = {}
    for row in scope.ask(heads.head_scores, scope.model.model).to_pylist():
        if row["value"] is not None and row["value"] == row["value"]:
            found.setdefault(row["score"], {})[row["layer"], row["head"]] = row["value"]
            units[row["score"]] = row["how"]
    saes = tuple(ref.sae for ref in scope.z_saes.values())
    for row in scope.ask(heads.grid_metrics, saes).to_pylist() if saes else []:
        for name in heads.GRID_METRICS:
            if row[name] is not None:
                found.setdefault(name, {})[row["layer"], row["head"]] = row[name]
                units[name] = heads.GRID_METRICS[name]
    return {
        name: Numbers(SHORT.get(name, name.replace("_", " ")), units[name], values)
        for name, values in found.items()
    }


def _tip(
    place: Place, note: HeadProgress | None, numbers: Mapping[str, Numbers], colour: str
) -> list[list[str]]:
    """What the tooltip of a head says; of its numbers, the one that colours the grid comes first."""
    lines = [[f"L{place[0]}H{place[1]}"]]
    if note is not None:
        lines.append(["status", note.status])
        if note.label:
            lines.append(["label", note.label])
        if note.semanticity:
            lines.append(["semanticity", note.semanticity.replace("_", " ")])
        if note.groupings:
            lines.append(["groupings", ", ".join(note.groupings)])
    else:
        lines.append(["status", "not begun"])
    first = [numbers[colour]] if colour in numbers else []
    shown = [n for n in [*first, *(n for name, n in numbers.items() if name != colour)] if place in n.values]
    return lines + [[n.name, style.number(float(n.values[place]))] for n in shown[:SHOWN]]


def _by_class(scope: Scope, notes: Mapping[Place, HeadProgress], colour: str) -> dict[str, Any]:
    """Cells and legend where the colour is a class: status or semanticity."""
    table = colours.STATUS if colour == PROGRESS else colours.SEMANTICITY
    cells: dict[Place, dict[str, str]] = {}
    counts: Counter[str | None] = Counter()
    for layer in range(scope.model.n_layers):
        for head in range(scope.model.n_heads):
            note = notes.get((layer, head))
            name = None if note is None else note.status if colour == PROGRESS else note.semanticity
            counts[name] += 1
            one = table[name]
            cells[layer, head] = {"bg": one.bg, "fg": one.fg, "text": one.mark}
    classes = [
        {"name": one.name, "bg": one.bg, "fg": one.fg, "mark": one.mark, "n": counts[name]}
        for name, one in table.items()
    ]
    return {"cells": cells, "classes": classes, "scale": None}


def _by_number(scope: Scope, numbers: Numbers) -> dict[str, Any]:
    """Cells and legend where the colour is an amount; zero is on the scale unless values are negative."""
    low = min(0.0, *numbers.values.values(), 0.0)
    high = max([*numbers.values.values(), low + 1e-12])
    cells = {}
    for layer in range(scope.model.n_layers):
        for head in range(scope.model.n_heads):
            value = numbers.values.get((layer, head))
            if value is None:
                cells[layer, head] = {"bg": colours.EMPTY, "fg": colours.INK, "text": "–"}
                continue
            bg = colours.viridis((value - low) / (high - low))
            text = f"{value:,}" if isinstance(value, int) else short(value)
            cells[layer, head] = {"bg": bg, "fg": colours.ink_on(bg), "text": text}
    scale = {"low": low, "high": high, "stops": list(colours.VIRIDIS), "unit": numbers.unit}
    return {"cells": cells, "classes": [], "scale": scale}


def short(value: float) -> str:
    """A number that fits into a cell.

    >>> short(0.1234), short(17.53), short(1234.6)
    ('0.12', '17.5', '1,235')
    """
    size = abs(value)
    return f"{value:.2f}" if size < 10 else f"{value:.1f}" if size < 100 else f"{value:,.0f}"


def grid_data(
    scope: Scope, notes: Mapping[Place, HeadProgress], numbers: Mapping[str, Numbers], colour: str, only: str
) -> dict[str, Any]:
    """What the grid component draws."""
    chosen = numbers.get(colour)
    drawn = _by_class(scope, notes, colour) if chosen is None else _by_number(scope, chosen)
    cells = []
    for (layer, head), cell in drawn["cells"].items():
        note = notes.get((layer, head))
        label = "" if note is None else note.label
        status = note.status if note else "not begun"
        cells.append(
            {
                "layer": layer, "head": head, **cell,
                "label": ("★ " if note and note.star else "") + label,
                "tip": _tip((layer, head), note, numbers, colour),
                "faded": only not in ("all", status),
            }
        )  # fmt: skip
    return {
        "n_layers": scope.model.n_layers,
        "n_heads": scope.model.n_heads,
        "title": colour if chosen is None else chosen.name,
        "cells": cells,
        "classes": drawn["classes"],
        "scale": drawn["scale"],
    }


def mini_map(scope: Scope, notes: Mapping[Place, HeadProgress], here: Place) -> dict[str, Any]:
    """The grid as a small map of the annotation's progress, with one head marked."""
    data = grid_data(scope, notes, {}, PROGRESS, "all")
    for cell in data["cells"]:
        cell["here"] = (cell["layer"], cell["head"]) == here
    return {**data, "mini": True}


def progress_bar(done: int, drafts: int, n: int) -> str:
    """Done and drafts of n as a thin bar, in HTML."""
    parts = ((done, colours.BLUE), (drafts, colours.YELLOW))
    bars = "".join(f'<i style="width:{100 * k / max(1, n):.2f}%;background:{c}"></i>' for k, c in parts)
    return (
        f'<div class="ha-progress" role="img" aria-label="{done} of {n} done, {drafts} drafts">{bars}</div>'
    )


def _table(
    scope: Scope, notes: Mapping[Place, HeadProgress], numbers: Mapping[str, Numbers], only: str
) -> None:
    rows = []
    for layer in range(scope.model.n_layers):
        for head in range(scope.model.n_heads):
            note = notes.get((layer, head))
            row: dict[str, Any] = {
                "open": navigation.href("head", model=scope.model.model, head=f"L{layer}H{head}"),
                "layer": layer,
                "head": head,
                "status": note.status if note else "not begun",
                "label": note.label if note else "",
                "semanticity": note.semanticity if note else None,
                "groupings": list(note.groupings) if note else [],
                "star": bool(note and note.star),
                **{name: n.values.get((layer, head)) for name, n in numbers.items()},
            }
            if only in ("all", row["status"]):
                rows.append(row)
    column = st.column_config
    name_of = r"head=(L\d+H\d+)"
    config: dict[str, Any] = {
        "open": column.LinkColumn("head", display_text=name_of, width="small", pinned=True)
    }
    for name, n in numbers.items():
        config[name] = st.column_config.NumberColumn(n.name, help=n.unit, format="%.3f")
    for name in ("n_top", *(f"n_{family}" for family in FAMILY_NAMES)):
        if name in numbers:
            config[name] = st.column_config.NumberColumn(numbers[name].name, help=numbers[name].unit)
    st.dataframe(rows, column_config=config, hide_index=True, height=min(720, 37 + 35 * max(1, len(rows))))


def render() -> None:
    """The grid or the table of heads, and how many are done."""
    scope = state.scope()
    who = state.annotator(scope.settings)
    notes = annotations.head_progress(scope.settings, scope.model.model, who)
    numbers = head_numbers(scope)
    counts = Counter(note.status for note in notes.values())
    n = scope.n_heads_all
    style.title(
        f"Atlas of {scope.model.model}",
        f"{counts['done']}/{n} heads done, {counts['draft']} drafts · annotating as {who}",
    )
    st.html(progress_bar(counts["done"], counts["draft"], n))
    colour, only, form = _controls(numbers)
    if form == "Table":
        _table(scope, notes, numbers, only)
        return
    draw.heads_grid("heads", grid_data(scope, notes, numbers, colour, only), scope.model.model)
    if not notes:
        st.caption("No head is annotated yet: click one, or move with the arrow keys and press Enter.")
    layer_rows.show(scope, notes)


def _controls(numbers: Mapping[str, Numbers]) -> tuple[str, str, str]:
    one, two, three = st.columns([3, 2, 1.4], vertical_alignment="bottom")
    options = [PROGRESS, SEMANTICITY, *numbers]
    names = {key: n.name for key, n in numbers.items()}
    navigation.bound_param("colour", names)
    colour = one.selectbox(
        "Colour", options, format_func=lambda key: names.get(key, key), key="colour", bind="query-params"
    )
    only = two.selectbox("Show", ["all", "not begun", "draft", "done"], key="only", bind="query-params")
    form = three.segmented_control(
        "Form", ["Grid", "Table"], default="Grid", required=True, key="form", bind="query-params"
    )
    return str(colour), str(only), str(form)
