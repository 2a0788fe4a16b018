"""Studies of heads as people meet them: reports, commands, views, and published facts beside a release."""

import itertools
import json
import math
import shutil

import duckdb
import pytest
from click.testing import CliRunner

from app import navigation
from atlas.cli import cli
from atlas.cli.study import STUDIES, study_config
from atlas.errors import StoreError
from atlas.settings import load_settings
from atlas.store import reference
from atlas.store import release as releases
from atlas.store.connection import cursor, open_release
from atlas.store.queries import induction as asked
from atlas.store.reference import compare, reference_of, references
from atlas.tables import TABLES
from tests.synthetic import build_synthetic_release, to_arrow
from tests.synthetic_heads import head_rows
from tests.test_app_views import show, words

SIZE = {"n_layers": 2, "n_heads": 3, "d_sae": 24, "n_blocks": 16, "context": 24}


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """A release of a model that nobody has written about, and one that is called gpt2."""
    root = tmp_path_factory.mktemp("homes")
    build_synthetic_release(root / "plain" / "releases", **SIZE)
    shutil.copytree(root / "plain", root / "gpt2")
    path = releases.current(root / "gpt2" / "releases").path
    made = head_rows("gpt2", 12, 12, 4)
    with duckdb.connect(str(path)) as con:
        for (table,) in con.execute(
            "SELECT table_name FROM duckdb_columns() WHERE column_name = 'model' AND NOT internal AND "
            "table_name IN (SELECT table_name FROM duckdb_tables())"
        ).fetchall():
            con.execute(f"UPDATE {table} SET model = 'gpt2'")
        con.execute("UPDATE models SET n_layers = 12, n_heads = 12")
        for table, rows in [("head_scores", []), *made.items()]:
            con.execute(f"DELETE FROM {table}")
            if rows:
                con.register("arriving", to_arrow(table, rows))
                con.execute(f"INSERT INTO {table} FROM arriving")
        published = {one.name: one.values for one in reference_of("gpt2", 12, 12).numbers}
        scores = []
        for layer, head in itertools.product(range(12), range(12)):
            at = ("gpt2", layer, head)
            scores += [
                (*at, "previous_token", math.tanh(published["previous_token"][layer][head]), 1, "made up"),
                (*at, "ablation_mean", -published["mean_ablation"][layer][head], 1, "made up"),
                (*at, "induction", float((layer, head) in ((5, 1), (5, 5), (6, 9), (0, 0))), 1, "made up"),
            ]
        names = TABLES["head_scores"].schema.names
        rows = [dict(zip(names, row, strict=True)) for row in scores]
        con.register("arriving", to_arrow("head_scores", rows))
        con.execute("INSERT INTO head_scores FROM arriving")
    return root


@pytest.fixture
def plain(homes, tmp_path, monkeypatch):
    return _home(homes / "plain", tmp_path, monkeypatch)


@pytest.fixture
def gpt2(homes, tmp_path, monkeypatch):
    return _home(homes / "gpt2", tmp_path, monkeypatch)


def _home(home, tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(home))
    monkeypatch.setenv("ATLAS_DATABASE_URL", f"sqlite:///{tmp_path / 'notes.sqlite'}")
    monkeypatch.setenv("ATLAS_ANNOTATOR", "ann")
    return load_settings()


@pytest.fixture
def con(plain):
    return cursor(open_release(releases.current(plain.releases).path))


def run(*words):
    return CliRunner().invoke(cli, list(words), catch_exceptions=True)


# ---------------------------------------------------------------- the rule


def test_the_rule_names_heads_from_their_curves(con):
    rows = {(r["layer"], r["head"]): r for r in asked.head_induction(con, "synthetic").to_pylist()}
    assert len(rows) == 6
    assert {at: row["kind"] for at, row in rows.items() if row["kind"]} == {
        (1, 0): "short-prefix",
        (1, 1): "long-prefix",
    }
    for (layer, head), row in rows.items():
        curve = asked.of_head(con, "head_prefixes", "synthetic", layer, head).to_pylist()
        attention = [one["attention"] for one in curve]
        assert row["attention_1"] == attention[0]
        assert row["attention_long"] == pytest.approx(sum(attention[4:]) / 5)
        assert row["dla_long"] == pytest.approx(sum(one["dla"] for one in curve[4:]) / 5)
        text = asked.of_head(con, "head_text_prefixes", "synthetic", layer, head).to_pylist()
        n = [one["n"] for one in text if one["threshold"] == 0.3]
        assert (row["n_attended"], row["n_1"], row["n_longer"]) == (sum(n), n[1], sum(n[2:]))
        assert row["longer_share"] == pytest.approx(sum(n[2:]) / sum(n[1:]))


@pytest.mark.parametrize(
    ("first", "later", "kind"),
    [(0.09, 0.19, None), (0.09, 0.2, "long-prefix"), (0.1, 0.2, "short-prefix"), (0.7, 0.9, "short-prefix")],
)
def test_thresholds_of_the_rule(con, first, later, kind):
    name = f"rule_{first}_{later}".replace(".", "")
    con.execute(f"ATTACH ':memory:' AS {name}")
    for table in ("head_prefixes", "head_text_prefixes", "head_corruption", "head_scores"):
        con.execute(f"CREATE TABLE {name}.{table} AS FROM {table}")
    value = f"CASE WHEN prefix = 1 THEN {first} ELSE {later} END"
    con.execute(f"UPDATE {name}.head_prefixes SET attention = {value} WHERE layer = 0 AND head = 0")
    from atlas.store.induction import induction_view

    con.execute(f"USE {name}")
    con.execute(induction_view())
    assert con.execute("SELECT kind FROM head_induction WHERE layer = 0 AND head = 0").fetchone() == (kind,)


# ---------------------------------------------------------------- commands


def test_reports_and_numbers_of_a_head(plain):
    found = run("report", "induction")
    assert found.exit_code == 0
    assert "| L1H1 | long-prefix" in found.output
    assert "repeated tokens" in found.output
    found = run("report", "tasks")
    assert "Heads that digit-copy needs most" in found.output
    lines = [line for line in found.output.splitlines() if line.startswith("| L")]
    assert lines[0].startswith("| L1H1")
    found = run("heads", "L1H1")
    assert "Prefix curve of L1H1" in found.output
    assert "| induction" in found.output
    assert run("heads").output.count("\n| L") == 6


def test_a_head_that_is_not_there_is_refused(plain):
    found = run("heads", "L2H0")
    assert isinstance(found.exception, StoreError)
    assert "allowed: L0H0 to L1H2" in str(found.exception)


def test_a_release_from_elsewhere_cannot_be_measured_again(plain):
    found = run("heads", "--recompute")
    assert isinstance(found.exception, StoreError)
    assert "does not say how it was built" in str(found.exception)


def test_the_study_has_a_config_with_reports():
    config = study_config("induction")
    assert STUDIES["induction"] == ("induction", "tasks")
    assert config.heads.ablation_blocks
    assert config.heads.prompts
    assert config.sites.layers == "all"


def test_reports_of_an_older_release_say_so(plain, tmp_path, monkeypatch):
    home = tmp_path / "old"
    shutil.copytree(plain.home, home)
    path = releases.current(home / "releases").path
    with duckdb.connect(str(path)) as con:
        con.execute("DROP VIEW head_induction")
        for table in ("head_prefixes", "head_text_prefixes", "head_corruption", "tasks", "head_task_effects",
                      "head_spectra"):  # fmt: skip
            con.execute(f"DROP TABLE {table}")
    monkeypatch.setenv("ATLAS_HOME", str(home))
    for kind in ("induction", "tasks"):
        found = run("report", kind)
        assert isinstance(found.exception, StoreError), found.output
        assert "has no" in str(found.exception)
        assert "older version" in words(show(kind)) or "No task was measured" in words(show(kind))
    assert run("heads", "L0H0").exit_code == 0


# ---------------------------------------------------------------- published facts


def test_every_fact_has_a_source_and_a_place():
    for one in references():
        every = set(itertools.product(range(one.n_layers), range(one.n_heads)))
        for family in one.families:
            assert set(family.heads) <= every
            assert set(family.primary) <= set(family.heads)
            assert family.sources
            assert set(family.sources) <= set(one.sources)
        assert {(note.layer, note.head) for note in one.notes} <= every
        for numbers in one.numbers:
            assert numbers.source in one.sources
            assert [len(row) for row in numbers.values] == [one.n_heads] * one.n_layers
        for source in one.sources:
            assert one.cited(source)


def test_published_facts_are_those_of_the_seeds():
    one = reference_of("gpt2", 12, 12)
    heads = {family.name: set(family.heads) for family in one.families}
    assert heads["Induction heads (features)"] == {(5, 1), (5, 5), (6, 9), (7, 2), (7, 10)}
    assert heads["Long-prefix induction head"] == {(5, 1)}
    assert sum(note.star for note in one.notes) == 13
    counts = json.loads((reference.FOLDER / "gpt2.json").read_text())["counts"]
    assert counts["monosemantic"] == 14
    top = {n.name: max(range(144), key=lambda i, n=n: n.values[i // 12][i % 12]) for n in one.numbers}
    assert divmod(top["previous_token"], 12) == (4, 11)


def test_rank_correlations_with_what_was_published(gpt2):
    con = cursor(open_release(releases.current(gpt2.releases).path))
    numbers, families = compare(con, "gpt2", 12, 12)
    found = {row["name"]: row for row in numbers.rows.to_pylist()}
    assert found["attention to the token before"]["spearman"] == pytest.approx(1, abs=1e-3)
    assert found["rise of the loss under mean ablation, nats"]["spearman"] == pytest.approx(-1, abs=1e-3)
    assert all(row["heads"] == 144 for row in found.values() if "head_spectra" in row["column"])
    assert found["evenness of the attention"]["heads"] == 0
    assert found["evenness of the attention"]["spearman"] is None
    auc = {row["family"]: row["auc"] for row in families.rows.to_pylist()}
    # 3 of the 5 published heads are 1, and so is one of the 139 others: ties count half.
    expected = (3 * (138 + 0.5) + 2 * 138 * 0.5) / (5 * 139)
    assert auc["Induction heads (features)"] == pytest.approx(expected)


def test_spectra_are_compared_by_energy(gpt2):
    con = cursor(open_release(releases.current(gpt2.releases).path))
    found = reference.column_values(con, "gpt2", "head_spectra:OV:top_2_energy")
    rows = asked.of_head(con, "head_spectra", "gpt2", 3, 4).to_pylist()
    s = next(row["singular_values"] for row in rows if row["circuit"] == "OV")
    assert found[3, 4] == pytest.approx((s[0] ** 2 + s[1] ** 2) / sum(x * x for x in s))
    for wrong in ("elsewhere:x", "head_spectra:OV:colour"):
        with pytest.raises(StoreError, match="is unknown"):
            reference.column_values(con, "gpt2", wrong)


def test_compare_reference_on_gpt2_and_on_others(gpt2, plain, homes, monkeypatch):
    found = run("compare-reference")
    assert isinstance(found.exception, StoreError)
    assert "nothing published is known here about the heads of model 'synthetic'" in str(found.exception)
    with pytest.raises(StoreError, match="is another model"):
        reference_of("gpt2", 24, 16)
    monkeypatch.setenv("ATLAS_HOME", str(homes / "gpt2"))
    found = run("compare-reference")
    assert found.exit_code == 0, found.exception
    assert "| attention to the token before" in found.output
    assert "Wang et al." not in found.output.split("Published heads")[0]
    assert run("compare-reference", "--format", "csv").output.count("\n") == 17


# ---------------------------------------------------------------- views


def test_induction_opens_on_the_strongest_head_and_on_any(plain):
    at = show("induction")
    assert "<h1>Induction: L1H1</h1>" in words(at)
    assert "1 long-prefix and 1 short-prefix heads of 6" in words(at)
    at = show("induction", head="L0H2", threshold="0.5")
    text = words(at)
    assert "<h1>Induction: L0H2</h1>" in text
    assert "above 0.5" in text
    assert any("atlas heads --recompute --release synthetic@1" in block.value for block in at.code)
    tables = [frame.value for frame in at.dataframe]
    assert len(tables[0]) == 6
    assert "induction?" in tables[0]["open"].iloc[0]
    assert "L9H0" in words(show("induction", head="L9H0"))


def test_tasks_open_on_the_layer_that_matters_and_on_any(plain):
    at = show("tasks")
    assert at.get("button_group")[0].value in ("1", ["1"])
    assert "Heads that url needs most" in words(at)
    assert any("See https" in block.value for block in at.code)
    assert show("tasks", layer="0").get("button_group")[0].value in ("0", ["0"])


def test_what_is_published_waits_until_it_is_asked_for(gpt2):
    at = show("head", head="L5H1")
    assert [box.label for box in at.expander if "Published" in box.label] == ["Published about this head"]
    assert "Long prefix induction head" not in words(at)
    at.session_state["published"] = True
    at.run()
    assert not at.exception


def test_other_models_have_no_published_facts(plain):
    at = show("head", head="L1H1")
    assert not [box.label for box in at.expander if "Published" in box.label]
    assert [box.label for box in at.expander if "Measured" in box.label]


def test_addresses_can_be_shared():
    assert navigation.href("induction", model="m", head="L1H1") == "induction?model=m&head=L1H1"
