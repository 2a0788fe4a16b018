"""The SQL view beside its editor: a query per table, history, saved and shared queries, charts."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import pyarrow as pa
import pytest

from app import sql_parts
from atlas.db import saved
from atlas.db.arrow import arrow_tables
from atlas.store import release as releases
from atlas.store.sandbox import run_sql
from tests.test_app_views import atlas, home, show

ASKED = "SELECT sae, l0, alive FROM sae_summary ORDER BY sae"


def test_the_query_of_every_table_runs(atlas):
    path, notes = releases.current(atlas.releases, None).path, arrow_tables(atlas)
    # One statement for all: each query in parentheses is a part of it.
    parts = [f"SELECT '{name}' AS name, count(*) AS n FROM (\n{sql_parts.first_query(name)}\n)"
             for name in sql_parts.every_table()]  # fmt: skip
    found = run_sql(" UNION ALL ".join(parts), path, notes).table.to_pylist()
    assert {row["name"] for row in found} == set(sql_parts.every_table())
    assert all(row["n"] <= 50 for row in found)


def test_choosing_a_table_fills_the_editor(atlas):
    at = show("sql")
    at.selectbox(key="sql_table").set_value("features").run()
    assert at.text_area(key="sql").value == sql_parts.first_query("features")
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
