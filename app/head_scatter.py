"""The measures of a head's part in its features, against each other (row B3)."""

import pyarrow as pa
import streamlit as st

from app import charts, style
from app.state import Scope
from atlas.store.queries import shares
from atlas.store.queries.heads import MEASURES
from atlas.store.queries.shares import Points


def of_all(points: Points) -> str:
    """How many of all features are drawn, in words; empty where it is all of them."""
    if points.table.num_rows == points.n:
        return ""
    drawn = f"{points.table.num_rows:,} of {points.n:,} features are drawn, those with the largest shares"
    return f"{drawn}; correlations are of all."


def measures(scope: Scope, sae: str, head: int, chosen: tuple[int, ...]) -> None:
    """Scatters and rank correlations of each pair of measures, made when they are unfolded."""
    with st.expander("The measures side by side", key="scatters", on_change="rerun") as box:
        if not box.open:
            return
        points = scope.ask(shares.in_head, sae, head, chosen)
        marks = [feature in chosen for feature in points.table["feature"].to_pylist()]
        table = points.table.append_column("chosen", pa.array(marks, pa.bool_()))
        for column, ((x, y), rho) in zip(st.columns(3), points.correlations.items(), strict=True):
            with column:
                names = MEASURES[x], MEASURES[y]
                st.caption(f"{names[0]} and {names[1]}: rank correlation {style.number(rho)}")
                charts.draw(table, charts.scatter((x, names[0]), (y, names[1])), 190, f"scatter_{x}_{y}",
                            f"{names[0]} against {names[1]} of features")  # fmt: skip
        if told := of_all(points):
            st.caption(told)
