"""One of the seeds' tables, as reports have it, drawn as a sortable table."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import streamlit as st

from app import style
from atlas.store.reports import written
from atlas.store.reports_shown import Part, Shown

_NAMES = ("place", "head_name")


def _cell(shown: Shown, value: Any) -> Any:
    """Shares as percentages: what is shown is what is sorted by; no text is an empty cell."""
    if value is None and not shown.form:
        return ""
    return value * 100 if shown.form.endswith("%") and value is not None else value


def draw(part: Part, links: Sequence[str] = ()) -> None:
    """A table, sortable, with its last row (means, the model's own loss) above.

    With ``links``, an address per row, a first column opens it; it is shown by the head that it names.
    """
    config: dict[str, Any] = {}
    for shown in part.columns:
        column, note = st.column_config, shown.help or None
        if not shown.form:
            config[shown.name] = column.TextColumn(shown.title, help=note, pinned=shown.name in _NAMES)
        else:
            form = {"%": f"%{shown.form[:-1]}f%%", "d": "%d"}.get(shown.form[-1], f"%{shown.form}")
            config[shown.name] = column.NumberColumn(shown.title, help=note, format=form.replace(",", ""))
    columns = {
        shown.name: [_cell(shown, value) for value in part.rows[shown.name].to_pylist()]
        for shown in part.columns
        if not (links and shown.name == "head_name")
    }
    if links:
        name = st.column_config.LinkColumn(
            "Head", display_text=r"head=(L\d+H\d+)", width="small", pinned=True
        )
        config, columns = {"open": name, **config}, {"open": list(links), **columns}
    last = [
        f"{shown.title} {written(part.foot[shown.name], shown.form)}"
        for shown in part.columns
        if shown.form and part.foot.get(shown.name) is not None
    ]
    style.section(part.title, f"{part.foot['place']}: {', '.join(last)}" if last else "")
    height = min(480, 38 + 35 * part.rows.num_rows)
    st.dataframe(
        pa.table(columns), column_config=config, hide_index=True, height=height, alt=part.title,
        key=f"part_{part.title}",
    )  # fmt: skip
