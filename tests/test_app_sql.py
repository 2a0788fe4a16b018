"""The SQL view beside its editor: a query per table, history, saved and shared queries, charts."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import duckdb
import pyarrow as pa
import pytest

from app import sql_errors, sql_parts, sql_schema
from atlas.db import saved
from atlas.db.arrow import arrow_tables
from atlas.errors import QueryError
from atlas.store import release as releases
from atlas.store.queries import words
from atlas.store.sandbox import run_sql
from atlas.store.studies import study_tables
from atlas.tables import TABLES
from tests.test_app_views import atlas, home, show

ASKED = "SELECT sae, l0, alive FROM sae_summary ORDER BY sae"


@pytest.fixture
def known(atlas):
    with duckdb.connect(str(releases.current(atlas.releases, None).path), read_only=True) as con:
        return {one.name: one for one in sql_schema.known_tables(words.columns(con))}


def test_the_query_of_every_table_runs(atlas, known):
    path, tables = releases.current(atlas.releases, None).path, {**arrow_tables(atlas), **study_tables(atlas)}
    # One statement for all: each query in parentheses is a part of it.
    parts = [f"SELECT '{name}' AS name, count(*) AS n FROM (\n{sql_parts.first_query(one)}\n)"
             for name, one in known.items()]  # fmt: skip
    found = run_sql(" UNION ALL ".join(parts), path, tables).table.to_pylist()
    assert {row["name"] for row in found} == {*known} >= {*TABLES, "families", "comments", "studies"}
    assert all(row["n"] <= 50 for row in found)


def test_every_column_is_told_with_its_meaning(known):
    view = {one.name: one for one in known["head_features"].fields}
    assert view["decoder_share"].type == "FLOAT"
    assert view["decoder_share"].meaning
    declared = [one for name in (*TABLES, "head_annotations", "comments") for one in known[name].fields]
    assert [one.name for one in declared if not one.meaning] == []
    said = sql_schema.schema_html((known["models"],))
    assert "<dt>n_heads</dt><dd>attention heads per layer · SMALLINT</dd>" in said


def test_keywords_are_duckdbs_and_functions_exist(known):
    with duckdb.connect() as con:
        every = words.keywords(con)
        functions = words.functions(con)
    assert {word for one in sql_schema.KEYWORDS for word in one.lower().split()} <= every
    assert {"count", "avg", "list_contains", "row_number"} <= {one.name for one in functions}
    assert all(one.call.startswith(f"{one.name}(") and one.meaning for one in functions)


@pytest.mark.parametrize(
    ("sql", "place"),
    [
        ("SELECT sae,\n  featre FROM features", (2, 3, 6)),
        ("SELECT * FROM nowhere", (1, 15, 7)),
        ("SELECT '…äö', featre FROM features", (1, 15, 6)),
        ("SELECT sae FROM features\nWHERE cast(sae AS INT) = 3", (2, 7, 16)),
        ("SELECT sae, " + "feature, " * 40 + "featre FROM features", (1, 373, 6)),
        (
            "SELECT sae, " + "feature, " * 20 + "featre, " + "feature, " * 20 + "sae FROM features",
            (1, 193, 6),
        ),
        ("SELECT 1; SELECT 2", None),
    ],
)
def test_an_error_points_at_its_place(atlas, sql, place):
    with pytest.raises(QueryError) as error:
        run_sql(sql, releases.current(atlas.releases, None).path, {})
    assert sql_errors.place(str(error.value), sql) == place


def test_an_error_says_where_and_a_failed_query_is_not_asked_again(atlas, monkeypatch):
    at = show("sql", q="SELECT sae,\n  featre FROM features")
    assert at.error[0].value.endswith("Line 2, column 3.")
    monkeypatch.setattr("app.views.sql.run_sql", lambda *_, **__: pytest.fail("asked again"))
    at.button(key="sql_show_error").click().run()
    assert at.session_state["sql_goto"] == {"line": 2, "column": 3, "length": 6, "seq": 1}


def test_choosing_a_table_fills_the_editor(atlas, known):
    at = show("sql")
    at.selectbox(key="sql_table").set_value("features").run()
    assert at.text_area(key="sql").value == sql_parts.first_query(known["features"])
    assert at.selectbox(key="sql_table").value is None


def test_a_query_that_ran_is_in_the_history_and_comes_back(atlas):
    show("sql", q=ASKED)
    show("sql", q="SELECT nothing FROM nowhere")
    (kept,) = saved.history(atlas, "ann")
    assert kept.body == ASKED
    at = show("sql")
    at.button(key=f"history_{kept.name}").click().run()
    assert at.text_area(key="sql").value == ASKED


def test_a_query_is_kept_and_shared(atlas):
    at = show("sql", q=ASKED)
    at.text_input(key="sql_name").set_value("quality").run()
    at.toggle(key="sql_shared").set_value(True).run()
    at.button(key="sql_keep").click().run()
    (kept,) = saved.list_questions(atlas, "sql", "bob")
    assert (kept.author, kept.name, kept.body, kept.shared) == ("ann", "quality", ASKED, True)


def test_a_chart_colours_classes_and_amounts():
    spec = sql_parts.chart_spec(pa.table({"a.b": ["x"], "n": [1.0]}), "bar", "a.b", "n", "a.b")
    assert spec["encoding"]["x"]["field"] == "a\\.b"
    assert spec["encoding"]["x"]["type"] == "nominal"
    assert spec["encoding"]["color"]["type"] == "nominal"
    amount = sql_parts.chart_spec(pa.table({"a": [1], "n": [1.0]}), "circle", "a", "n", "n")
    assert amount["encoding"]["color"]["scale"] == {"scheme": "viridis"}
    assert "color" not in amount["mark"]


@pytest.mark.parametrize("value", [[[1, 2], None], [b"x", None]])
def test_charts_show_lists_and_bytes_as_text(value):
    shown = sql_parts._plain(pa.chunked_array([value]))
    assert pa.types.is_string(shown.type)
    assert shown.to_pylist()[1] is None
