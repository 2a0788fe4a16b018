"""Beside the SQL editor: a query for every table, one's own last queries, and the result as a chart."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import streamlit as st

from app import charts, state, style
from app.charts import Spec, axis
from app.colours import BLUE, GREEN, ORANGE, PURPLE, RED, SKY
from app.sql_schema import Known
from atlas.db import saved
from atlas.settings import Settings

SHOWN_QUERIES = 12
MOST_MARKS = 5_000
"""Rows that a chart draws; more would only hide each other."""
KINDS = {"bar": "bars", "line": "lines", "circle": "points"}
_PALETTE = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY]


def first_query(table: Known) -> str:
    """A query that shows a table, a view or the annotations: its first rows, in the order of its key.

    >>> print(first_query(Known("pruning", "table", "One row per pruned SAE", ("sae",), ())))
    -- one row per pruned SAE
    SELECT *
    FROM pruning
    ORDER BY sae
    LIMIT 50
    """
    order = f"\nORDER BY {', '.join(table.key)}" if table.key else ""
    said = table.row[:1].lower() + table.row[1:].split(";")[0]
    return f"-- {said}\nSELECT *\nFROM {table.name}{order}\nLIMIT 50"


def table_queries(tables: tuple[Known, ...], fill: Callable[[str], None]) -> None:
    """A choice of tables; choosing one puts a query for it into the editor."""
    known = {table.name: table for table in tables}

    def chosen() -> None:
        name = st.session_state["sql_table"]
        if name:
            fill(first_query(known[name]))
            st.session_state["sql_table"] = None

    st.selectbox(
        "A query for a table", list(known), index=None, key="sql_table", on_change=chosen,
        placeholder="choose a table",
    )  # fmt: skip


def history(settings: Settings, who: str, fill: Callable[[str], None]) -> None:
    """One's own last queries; a click puts one into the editor."""
    found = saved.history(settings, who)[:SHOWN_QUERIES]
    if not found:
        return
    style.section("History", "one's own last queries")
    with st.container(key="sql-history"):
        for one in found:
            told = " ".join(one.body.split())
            st.button(
                state.plain(told[:60] + ("…" if len(told) > 60 else "")), key=f"history_{one.name}",
                type="tertiary", on_click=fill, args=(one.body,), help=state.plain(told[:300]),
            )  # fmt: skip


def _numeric(table: pa.Table) -> list[str]:
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return [f.name for f in table.schema if any(kind(f.type) for kind in kinds)]


def chart_spec(table: pa.Table, kind: str, x: str, y: str, colour: str | None) -> Spec:
    """A chart of one column against another; classes get colours, amounts viridis."""
    numeric = _numeric(table)
    shown: dict[str, Any] = {
        "x": axis(_field(x), x, "quantitative" if x in numeric else "nominal"),
        "y": axis(_field(y), y),
        "tooltip": [{"field": _field(name), "title": name} for name in table.column_names[:8]],
    }
    if colour is not None:
        amount = colour in numeric
        shown["color"] = {
            "field": _field(colour), "title": colour, "type": "quantitative" if amount else "nominal",
            "scale": {"scheme": "viridis"} if amount else {"range": _PALETTE},
        }  # fmt: skip
    mark: dict[str, Any] = {"type": kind, **({} if colour else {"color": BLUE})}
    return {"mark": mark | ({"size": 30} if kind == "circle" else {}), "encoding": shown}


def _field(name: str) -> str:
    r"""A column's name as Vega-Lite reads it: dots and brackets are not paths.

    >>> _field("a.b[0]")
    'a\\.b\\[0\\]'
    """
    return "".join(f"\\{c}" if c in ".[]\\'\"" else c for c in name)


def chart(table: pa.Table) -> None:
    """The result as a chart, where it has a column of numbers."""
    numeric = _numeric(table)
    if not numeric or not table.num_rows:
        return
    names = table.column_names
    with st.expander("As a chart", key="sql_chart", on_change="rerun") as box:
        if not box.open:
            return
        one, two, three, four = st.columns(4)
        kind = one.selectbox("Kind", list(KINDS), format_func=KINDS.__getitem__, key="chart_kind")
        x = two.selectbox("Across", names, key="chart_x")
        y = three.selectbox("Up", numeric, index=min(len(numeric) - 1, int(numeric[0] == x)), key="chart_y")
        colour = four.selectbox("Colour", names, index=None, placeholder="none", key="chart_colour")
        drawn = table.slice(0, MOST_MARKS)
        if drawn.num_rows < table.num_rows:
            st.caption(f"The first {MOST_MARKS:,} rows are drawn.")
        plain = pa.table({name: _plain(drawn[name]) for name in names})
        charts.draw(plain, chart_spec(plain, kind, x, y, colour), 340, "sql_drawn", f"{y} against {x}")


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """What charts can draw: lists and bytes as text."""
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        return pa.array([None if one is None else str(one) for one in column.to_pylist()], pa.string())
    return column
