"""Questions of one's own: SQL over the release and the annotations, inside a sandbox."""

import csv
import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import streamlit as st

from app import access, saved_view, sql_errors, sql_parts, sql_schema, state, style
from app.components import draw
from app.sql_errors import Wrong
from app.state import Scope
from app.whole import Newer
from atlas.db.arrow import arrow_tables
from atlas.db.saved import note_query
from atlas.errors import QueryError
from atlas.store.sandbox import RESULT_BYTES, Result, prewarm, run_sql
from atlas.store.studies import study_tables

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


def _fill(sql: str) -> None:
    st.session_state["sql"] = sql


def _examples() -> None:
    style.section("Examples", "click one to put it into the editor")
    with st.container(key="sql-examples"):
        for name, sql in EXAMPLES.items():
            st.button(name, on_click=_fill, args=(sql,), type="tertiary", key=f"example_{name}")


def _ask(scope: Scope, sql: str) -> Result | Wrong:
    settings = scope.settings
    try:
        with st.spinner("Asking"):
            return run_sql(
                sql, scope.release.path, {**arrow_tables(settings), **study_tables(settings)},
                seconds=settings.query_seconds, memory=settings.query_memory, rows=settings.query_rows,
                cancel=Newer(),
            )  # fmt: skip
    except QueryError as error:
        return Wrong(str(error), sql_errors.place(str(error), sql))
    finally:
        prewarm()


def _go_to(place: sql_errors.Place) -> None:
    """Let the editor select the place of the error."""
    seq = (st.session_state.get("sql_goto") or {}).get("seq", 0) + 1
    st.session_state["sql_goto"] = {**place._asdict(), "seq": seq}


def _wrong(wrong: Wrong) -> None:
    """What went wrong and where; what a bound that was met means."""
    place = wrong.place
    where = f" Line {place.line}, column {place.column}." if place else ""
    st.error(f"The query was not run, or did not finish.{where}", icon=":material/error:")
    # Not wrapped: the mark below a line points at the place that is wrong.
    st.code(wrong.error, language=None)
    if told := sql_errors.advice(wrong.error):
        st.caption(told)
    if place:
        st.button(
            "Show the place in the editor", key="sql_show_error", icon=":material/my_location:",
            on_click=_go_to, args=(place,),
        )  # fmt: skip


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


def size_told(result: Result, most_rows: int) -> str:
    """How much came back and how long it took; where a bound cut it, which.

    >>> size_told(Result(pa.table({"a": [1, 2]}), True, 0.5), 2)
    '2 rows x 1 columns in 0.50 s. There are more rows: at most 2 are shown and downloaded.'
    """
    table = result.table
    told = f"{table.num_rows:,} rows x {table.num_columns} columns in {result.seconds:.2f} s"
    if not result.truncated:
        return told
    bound = f"{most_rows:,}" if table.num_rows >= most_rows else f"{RESULT_BYTES // 1_000_000} MB of them"
    return f"{told}. There are more rows: at most {bound} are shown and downloaded."


def _show(result: Result, most_rows: int) -> None:
    table = result.table
    st.caption(size_told(result, most_rows))
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
        f"{s.query_seconds:g} s, {s.query_memory} of memory and {s.query_rows:,} rows. Ctrl+Enter runs it, "
        "Ctrl+Space suggests names."
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
        known = sql_schema.tables(scope)
        sql_parts.table_queries(known, _fill)
        st.html(sql_schema.schema_html(known))
    with left:
        sql = st.text_area(
            "SQL", key="sql", height=190, label_visibility="collapsed", persist_state="session"
        )
        goto = st.session_state.get("sql_goto")
        draw.sql_complete("sql_words", {**sql_schema.suggestions(scope), "goto": goto})
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
    """Show the result, asked again only when the query or the release has changed, or at the button."""
    key: tuple[Any, ...] = (sql, scope.release.digest)
    kept = st.session_state.get("sql_result")
    if kept is None or kept[0] != key or st.session_state.get("run"):
        kept = (key, _ask(scope, sql))
        st.session_state["sql_result"] = kept
        if isinstance(kept[1], Result) and access.can("annotate"):
            note_query(scope.settings, state.annotator(scope.settings), sql)
    if isinstance(kept[1], Wrong):
        _wrong(kept[1])
    else:
        _show(kept[1], scope.settings.query_rows)
