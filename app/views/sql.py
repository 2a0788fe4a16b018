"""Questions of one's own: SQL over the release and the annotations, inside a sandbox."""

import csv
import html
import io
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import streamlit as st

from app import access, saved_view, sql_parts, state, style
from app.state import Scope
from atlas.db.arrow import SCHEMAS, arrow_tables
from atlas.db.saved import note_query
from atlas.errors import QueryError
from atlas.store.sandbox import Result, prewarm, run_sql
from atlas.store.studies import study_tables
from atlas.store.study_tables import STUDY_TABLES
from atlas.store.views import VIEWS
from atlas.tables import TABLES, Column

EXAMPLES = {
    "SAEs and their quality": "SELECT sae, l0, variance_explained, ce_recovered, alive\nFROM sae_summary\n"
    "ORDER BY layer, sae",
    "Heads with the highest score": "SELECT layer, head, score, value, n\nFROM head_scores\n"
    "WHERE score LIKE 'induction%'\nORDER BY value DESC\nLIMIT 20",
    "Top features of a head": "SELECT feature, decoder_share, fve, dfa_share, density\nFROM head_features\n"
    "WHERE layer = 5 AND head = 3 AND decoder_rank < 10\nORDER BY decoder_rank",
    "Features that fire on one token": "SELECT t.sae, t.feature, v.text, t.precision, t.recall, t.n_active\n"
    "FROM token_stats t\nJOIN saes s USING (sae)\nJOIN vocab v ON v.model = s.model AND v.token = t.token\n"
    "WHERE t.role = 'at' AND t.rank = 0 AND t.precision > 0.9 AND t.n_active >= 20\n"
    "ORDER BY t.recall DESC\nLIMIT 50",
    "Heads that own many features": "SELECT s.layer, f.top_head AS head, count(*) AS n_features\n"
    "FROM features f JOIN saes s USING (sae)\nWHERE f.alive AND f.top_head IS NOT NULL\n"
    "GROUP BY ALL ORDER BY n_features DESC",
    "Where DFA looks back furthest": "SELECT sae, feature, distance\nFROM dfa_summary\n"
    "WHERE n = 20 AND bos < 0.5\nORDER BY distance DESC NULLS LAST\nLIMIT 50",
    "Heads by the families of their features": "SELECT layer, head, n_top, n_induction, n_previous_token,\n"
    "  n_duplicate_token, n_local_context, distance\nFROM head_summary\nORDER BY n_induction DESC",
    "Features of a family": "SELECT m.sae, m.feature, m.value, f.density, v.text AS commonest_token\n"
    "FROM feature_families m\nJOIN features f USING (sae, feature)\nJOIN saes s USING (sae)\n"
    "LEFT JOIN vocab v ON v.model = s.model AND v.token = f.top_token\n"
    "WHERE m.family = 'induction'\nORDER BY m.value DESC\nLIMIT 50",
    "What people wrote": "SELECT layer, head, annotator, label, semanticity, groupings, status\n"
    "FROM head_annotations\nORDER BY layer, head",
}
NOTE_TABLES = {
    "head_annotations": "what each annotator says about each head",
    "feature_annotations": "what each annotator says about features",
    "annotation_history": "every save of an annotation",
}


def _fill(sql: str) -> None:
    st.session_state["sql"] = sql


def _examples() -> None:
    style.section("Examples", "click one to put it into the editor")
    with st.container(key="sql-examples"):
        for name, sql in EXAMPLES.items():
            st.button(name, on_click=_fill, args=(sql,), type="tertiary", key=f"example_{name}")


def _details(name: str, meaning: str, columns: Iterable[tuple[str, str]]) -> str:
    """One table that unfolds, as HTML; every text escaped."""
    lines = "".join(f"<dt>{html.escape(c)}</dt><dd>{html.escape(said)}</dd>" for c, said in columns)
    told = f"<summary>{html.escape(name)}<span>{html.escape(meaning)}</span></summary>"
    return f"<details>{told}<dl>{lines}</dl></details>"


@st.cache_resource(show_spinner=False)
def schema_html() -> str:
    """Tables, views and notes with their columns and what these mean."""
    parts = []
    for table in (*TABLES.values(), *STUDY_TABLES.values()):
        columns = [(c.name, _meaning(c)) for c in table.columns]
        parts.append(_details(table.name, f"one row per {table.row}", columns))
    parts += [_details(view.name, "view", [("", view.meaning)]) for view in VIEWS]
    for name, meaning in NOTE_TABLES.items():
        parts.append(_details(name, meaning, [(f.name, _kind(f.type)) for f in SCHEMAS[name]]))
    return f"<div class='ha-details'>{''.join(parts)}</div>"


def _meaning(column: Column) -> str:
    unit = f" [{column.unit}]" if column.unit else ""
    return f"{column.meaning}{unit} · {_kind(column.type)}"


def _kind(kind: pa.DataType) -> str:
    return "list" if pa.types.is_list(kind) else str(kind)


def _ask(scope: Scope, sql: str) -> Result | None:
    settings = scope.settings
    try:
        with st.spinner("Asking"):
            return run_sql(
                sql, scope.release.path, {**arrow_tables(settings), **study_tables(settings)},
                seconds=settings.query_seconds, memory=settings.query_memory, rows=settings.query_rows,
            )  # fmt: skip
    except QueryError as error:
        st.error("The query was not run, or did not finish.", icon=":material/error:")
        # Not wrapped: the mark below a line points at the place that is wrong.
        st.code(str(error), language=None)
        return None
    finally:
        prewarm()


def as_csv(table: pa.Table) -> bytes:
    """The table as UTF-8 CSV with a heading; lists in their Python form."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(table.column_names)
    for row in table.to_pylist():
        writer.writerow(row.values())
    return out.getvalue().encode()


def as_parquet(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _shown(table: pa.Table) -> pa.Table:
    """Column names made unique, for the table on the page refuses twins."""
    names: list[str] = []
    for name in table.column_names:
        twin, n = name, 2
        while twin in names:
            twin, n = f"{name} ({n})", n + 1
        names.append(twin)
    return table.rename_columns(names)


def _show(result: Result) -> None:
    table = result.table
    more = "; there are more rows, only these are shown" if result.truncated else ""
    st.caption(f"{table.num_rows:,} rows x {table.num_columns} columns in {result.seconds:.2f} s{more}")
    height = min(640, 40 + 35 * max(1, table.num_rows))
    st.dataframe(_shown(table), hide_index=True, height=height, key="result")
    sql_parts.chart(_shown(table))
    icon = ":material/download:"
    with st.container(horizontal=True):
        st.download_button(
            "CSV", lambda: as_csv(table), "query.csv", "text/csv", on_click="ignore", icon=icon
        )
        st.download_button(
            "Parquet", lambda: as_parquet(_shown(table)), "query.parquet", "application/vnd.apache.parquet",
            on_click="ignore", icon=icon,
        )  # fmt: skip


def _limits(scope: Scope) -> str:
    s = scope.settings
    return (
        f"One SELECT over release {scope.release.label} and the annotations, read only; at most "
        f"{s.query_seconds:g} s, {s.query_memory} of memory and {s.query_rows:,} rows. Ctrl+Enter runs it."
    )


def render() -> None:
    """The editor, the result, and what can be asked."""
    scope = state.scope()
    style.title("SQL", _limits(scope))
    if "sql" not in st.session_state:
        st.session_state["sql"] = st.query_params.get("q") or next(iter(EXAMPLES.values()))
        st.session_state["sql_run"] = st.session_state["sql"] if "q" in st.query_params else None
    left, right = st.columns([2.9, 1])
    with right:
        _examples()
        who = state.annotator(scope.settings)
        saved_view.saved_questions("sql", st.session_state["sql"], _fill, can_save=access.can("annotate"))
        sql_parts.history(scope.settings, who, _fill)
        style.section("Tables", "click one for its columns")
        sql_parts.table_queries(_fill)
        st.html(schema_html())
    with left:
        sql = st.text_area(
            "SQL", key="sql", height=190, label_visibility="collapsed", persist_state="session"
        )
        if st.button("Run", type="primary", icon=":material/play_arrow:", shortcut="Ctrl+Enter", key="run"):
            st.session_state["sql_run"] = sql
        asked = st.session_state.get("sql_run")
        if asked:
            st.query_params["q"] = asked
            _answer(scope, asked)
        else:
            prewarm()
            st.caption("Run shows the result here and puts the query into the address, to be shared.")


def _answer(scope: Scope, sql: str) -> None:
    """Show the result, asked again only when the query, the release or the notes have changed."""
    key: tuple[Any, ...] = (sql, scope.release.digest)
    kept = st.session_state.get("sql_result")
    if kept is None or kept[0] != key or st.session_state.get("run"):
        kept = (key, _ask(scope, sql))
        st.session_state["sql_result"] = kept
        if kept[1] is not None and access.can("annotate"):
            note_query(scope.settings, state.annotator(scope.settings), sql)
        if kept[1] is None:
            st.session_state.pop("sql_result")
    if kept[1] is not None:
        _show(kept[1])
