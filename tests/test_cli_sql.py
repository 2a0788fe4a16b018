"""The command line of SQL, schema and releases; and every query of the documentation, run."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from atlas.api import open_atlas
from atlas.cli.releases import releases
from atlas.cli.schema import schema, to_markdown
from atlas.cli.sql import sql
from atlas.db.annotations import HeadAnnotation, save_head
from atlas.db.arrow import SCHEMAS, arrow_tables
from atlas.db.meanings import ANNOTATIONS
from atlas.errors import ConfigError, ConflictError, QueryError, StoreError
from atlas.schema import entries
from atlas.settings import load_settings
from atlas.store.release import current
from atlas.store.sandbox import run_sql
from atlas.store.studies import study_names, study_tables, write_study
from atlas.tables import TABLES
from tests.synthetic import MODEL, build_synthetic_release
from tests.test_store_studies import ABOUT, path_row

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with a release and two notes about one head."""
    home = tmp_path_factory.mktemp("home")
    settings = load_settings({"ATLAS_HOME": str(home)})
    build_synthetic_release(settings.releases)
    for who, label in (("ada", "previous token"), ("bob", "looks back")):
        note = HeadAnnotation(MODEL, 0, 0, who, label, ("positional",), status="done", confidence=4)
        save_head(settings, note, 0)
    return home


@pytest.fixture
def cli(home, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(home))

    def run(command, *arguments, stdin=None):
        return CliRunner().invoke(command, arguments, input=stdin, catch_exceptions=False)

    return run


def test_table_by_default_with_a_note_when_cut(cli):
    result = cli(sql, "SELECT 'x' AS name, 1 AS n")
    assert result.stdout == "name  n\n----  -\nx     1\n"
    assert result.stderr == ""
    result = cli(sql, "SELECT i FROM range(1000) t(i)")
    assert len(result.stdout.splitlines()) == 102
    assert result.stderr == "note: cut to the first 100 rows; there are more (raise --limit)\n"
    assert cli(sql, "SELECT i FROM range(1000) t(i)", "--limit", "5000").stderr == ""


def test_annotations_join_the_release(cli):
    query = """SELECT annotator, label, value > 0.5 AS strong FROM head_annotations
               JOIN head_scores USING (model, layer, head)
               WHERE score = 'previous_token' ORDER BY annotator"""
    rows = json.loads(cli(sql, query, "--format", "json").stdout)
    assert rows == [
        {"annotator": "ada", "label": "previous token", "strong": True},
        {"annotator": "bob", "label": "looks back", "strong": True},
    ]


def test_query_from_stdin(cli):
    assert cli(sql, "-", stdin="SELECT 42 AS x; -- from a file\n").stdout.splitlines()[-1] == "42"


def read_json(path):
    return pa.Table.from_pylist(json.loads(path.read_text()))


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_files_by_their_ending(cli, tmp_path, kind):
    out = tmp_path / f"out.{kind}"
    result = cli(sql, "SELECT sae, feature, density FROM features", "--out", str(out))
    assert result.output == ""
    read = {"csv": pa.csv.read_csv, "parquet": pq.read_table, "json": read_json}
    assert read[kind](out).num_rows == 192
    assert cli(sql, "SELECT 1 AS x", "--format", "csv").stdout == '"x"\n1\n'


def test_file_in_the_format_asked_for(cli, tmp_path):
    cli(sql, "SELECT 1 AS x", "--out", str(tmp_path / "out.dat"), "--format", "table")
    assert (tmp_path / "out.dat").read_text() == "x\n-\n1\n"
    with pytest.raises(ConfigError, match=r"names no format; allowed endings: .csv .json .parquet .txt"):
        cli(sql, "SELECT 1", "--out", str(tmp_path / "out.dat"))


def test_errors_are_of_the_family(cli, tmp_path):
    with pytest.raises(QueryError, match="COPY statements are refused; allowed: SELECT"):
        cli(sql, f"COPY saes TO '{tmp_path}/x'")
    with pytest.raises(QueryError, match=r"after its bound of 0\.5 seconds"):
        cli(sql, "SELECT sum(hash(a.i, b.i)) FROM range(999999) a(i), range(999999) b(i)", "--seconds", "0.5")
    with pytest.raises(StoreError, match=r"there is no release 'other' in .*; existing: synthetic"):
        cli(sql, "SELECT 1", "--release", "other")
    assert cli(sql, "SELECT 1", "--limit", "0").exit_code == 2
    assert list(tmp_path.iterdir()) == [] or not (tmp_path / "x").exists()


def test_no_database_means_empty_annotations(cli, tmp_path, home, monkeypatch):
    monkeypatch.setenv("ATLAS_DATABASE_URL", f"sqlite:///{tmp_path / 'none.sqlite'}")
    assert cli(sql, "SELECT count(*) AS n FROM head_annotations").stdout.splitlines()[-1].strip() == "0"
    assert not (tmp_path / "none.sqlite").exists()


def test_schema_lists_and_describes(cli):
    listed = cli(schema).stdout
    for name in (*TABLES, "head_features", "sae_summary", *SCHEMAS):
        assert re.search(rf"^{name} ", listed, re.MULTILINE), name
    described = cli(schema, "sae_metrics").stdout
    assert "mean KL(p_clean || p_spliced) [nats]" in described
    assert "sorted by and unique in sae, split" in described
    assert "fve_rank" in cli(schema, "head_features").stdout
    assert "NULL for a feature's" in cli(schema, "annotation_history").stdout
    with pytest.raises(StoreError, match="table 'nope' is not known; allowed: models"):
        cli(schema, "nope")


def test_every_annotation_column_has_a_meaning():
    assert {name: set(meanings) for name, (_, meanings) in ANNOTATIONS.items()} == {
        name: set(found.names) for name, found in SCHEMAS.items()
    }


def test_reference_page_is_the_one_that_the_declarations_make(cli):
    page = (ROOT / "docs" / "tables.md").read_text("utf-8")
    assert page == to_markdown(entries()), "run: atlas schema --markdown > docs/tables.md"
    assert cli(schema, "--markdown").stdout == page


def test_releases_lists_and_removes(tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path))
    run = CliRunner().invoke
    assert "no release in" in run(releases).stdout
    for seed in (0, 1):
        build_synthetic_release(tmp_path / "releases", "tiny", seed, 1, 2, 8, 3, 8)
    lines = run(releases).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["RELEASE", "tiny@1", "tiny@2"]
    assert "MB" in lines[1]
    assert not lines[1].endswith("current")
    assert lines[2].endswith("current")
    with pytest.raises(ConflictError, match="tiny@2 is the current one; remove it with --force"):
        run(releases, ["--remove", "tiny@2"], catch_exceptions=False)
    assert run(releases, ["--remove", "tiny@1"]).stdout == "removed tiny@1\n"
    assert run(releases, ["--remove", "tiny@2", "--force"]).stdout == "removed tiny@2\n"


def blocks(language):
    found = []
    for page in PAGES:
        text = page.read_text("utf-8") if page.exists() else ""
        for number, block in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE), 1
        ):
            found.append(pytest.param(block, id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize("query", blocks("sql"))
def test_every_query_of_the_documentation_runs_and_finds_something(home, query):
    settings = load_settings({"ATLAS_HOME": str(home)})
    path = current(settings.releases).path
    if "circuit_paths" in query and not study_names(settings):
        write_study(settings, "paths", ABOUT, {"circuit_paths": [path_row(5)]})
    more = arrow_tables(settings) | study_tables(settings)
    result = run_sql(query, path, more, seconds=300, memory="1GB", rows=1000)
    assert result.table.num_rows > 0


@pytest.mark.parametrize("code", [b for b in blocks("python") if "sql.md" in b.id])
def test_python_of_the_sql_page_runs(home, monkeypatch, capsys, code):
    monkeypatch.setenv("ATLAS_HOME", str(home))
    exec(code, {})
    assert "density" in capsys.readouterr().out


def test_open_atlas(home):
    settings = load_settings({"ATLAS_HOME": str(home)})
    with open_atlas("synthetic", settings) as atlas:
        assert atlas.release.label == "synthetic@1"
        assert {"features", "head_features", "head_annotations", "provenance"} <= set(atlas.tables)
        for name in atlas.tables:
            atlas.sql(f"SELECT * FROM {name} LIMIT 1")
        assert atlas.sql("SELECT count(*) AS n FROM head_annotations").column("n").to_pylist() == [2]
        note = HeadAnnotation(MODEL, 1, 1, "ada", "induction")
        save_head(settings, note, 0)
        assert atlas.sql("SELECT count(*) AS n FROM head_annotations").column("n").to_pylist() == [3]
        with pytest.raises(QueryError, match="LINE 1"):
            atlas.sql("SELECT * FROM nope")
        with pytest.raises(QueryError, match="read-only"):
            atlas.sql("DELETE FROM saes")
        assert atlas.sql("SELECT 1 AS x; -- and no more;").num_rows == 1
        strongest = atlas.relation("features").filter("alive").order("density DESC, sae, feature").limit(3)
        assert strongest.df()["density"].is_monotonic_decreasing
        assert strongest.to_arrow_table().num_rows == 3
        assert atlas.relation("SELECT count(*) FROM head_annotations").fetchall() == [(3,)]
        with pytest.raises(QueryError, match="nope"):
            atlas.relation("FROM nope")
    with pytest.raises(StoreError, match="existing: synthetic"):
        open_atlas("other", settings)
