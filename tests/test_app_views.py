"""Every view on a synthetic release: what it shows, what it refuses, what it never lets through as markup."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from streamlit.components.v2.component_manager import BidiComponentManager
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from app.head_form import Place
from app.views.sql import EXAMPLES
from atlas.cli.app import main_file
from atlas.db import annotations, runs
from atlas.db.arrow import arrow_tables
from atlas.db.leases import claim_step, heartbeat
from atlas.db.notes import FeatureAnnotation, HeadAnnotation
from atlas.settings import load_settings
from atlas.store import release as releases
from atlas.store.parquet import write_table
from atlas.store.sandbox import run_sql
from tests.synthetic import build_synthetic_release, to_arrow

HOSTILE = "<script>alert(1)</script> **bold** [x](javascript:alert(2)) \u202egnp.exe :red[$x$]"
Z0 = "synthetic/L00.z.topk-64"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    build_synthetic_release(folder / "releases")
    return folder


@pytest.fixture
def atlas(home, tmp_path, monkeypatch):
    """Settings of a published release with an empty annotation database."""
    monkeypatch.setenv("ATLAS_HOME", str(home))
    monkeypatch.setenv("ATLAS_DATABASE_URL", f"sqlite:///{tmp_path / 'notes.sqlite'}")
    monkeypatch.setenv("ATLAS_ANNOTATOR", "ann")
    return load_settings()


# AppTest looks for components in the installed packages in every test, for 0.4 s; a server does it once.
BidiComponentManager.discover_and_register_components = lambda *_, **__: None


def show(view, **params):
    at = AppTest.from_file(str(main_file()), default_timeout=300)
    at._page_hash = calc_hash(view)
    for name, value in params.items():
        at.query_params[name] = value
    at.run()
    assert not at.exception, [e.message for e in at.exception]
    return at


def markup(at):
    return [e.proto.body for e in at.get("html")]


def words(at):
    parts = markup(at) + [
        str(e.value) for kind in ("markdown", "caption", "error", "info") for e in at.get(kind)
    ]
    return "\n".join(parts)


@pytest.mark.parametrize(
    ("view", "title"),
    [
        ("overview", "Overview"),
        ("atlas", "Atlas of synthetic"),
        ("head", "L0H0"),
        ("sql", "SQL"),
        ("jobs", "Jobs"),
    ],
)
def test_every_view_opens(atlas, view, title):
    at = show(view)
    assert f"<h1>{title}</h1>" in words(at)
    assert not at.error


def test_feature_view_opens_on_the_strongest_feature_and_on_any_other(atlas):
    assert "<h1>Feature " in words(show("feature"))
    at = show("feature", sae=Z0, feature="5")
    assert "<h1>Feature 5</h1>" in words(at)
    assert "promotes" in words(at)


def test_feature_of_a_q_sae_shows_products_in_place_of_shares_of_heads(atlas):
    said = words(show("feature", sae="synthetic/L01.H00.q.relu-32"))
    assert "Products with positions" in said
    assert "keys that it looks for" in said
    assert "Where it reads from" not in said
    assert "promotes" not in said


@pytest.mark.parametrize(
    ("view", "params", "said"),
    [
        ("head", {"head": "L7H1"}, "head 'L7H1' does not exist in synthetic; allowed: L0H0 to L1H3"),
        ("head", {"head": "first"}, "head 'first' does not exist"),
        ("head", {"layer": "9", "head": "1"}, "layer of synthetic '9' does not exist; allowed: 0 to 1"),
        ("head", {"layer": "0", "head": "4"}, "head of synthetic '4' does not exist; allowed: 0 to 3"),
        ("head", {"model": "gpt9"}, "model 'gpt9' is not known; allowed: synthetic"),
        (
            "feature",
            {"sae": "no/such"},
            "SAE 'no/such' is not in this release; allowed: synthetic/L00.z.topk-64",
        ),
        ("feature", {"sae": Z0, "feature": "64"}, f"feature of {Z0} '64' does not exist; allowed: 0 to 63"),
        ("feature", {"sae": Z0, "feature": "-1"}, "'-1' does not exist"),
        ("feature", {"sae": Z0, "feature": "²"}, "'²' does not exist"),
        ("atlas", {"release": "gone"}, "there is no release 'gone'"),
    ],
)
def test_an_unknown_address_names_the_value_and_what_exists(atlas, view, params, said):
    at = show(view, **params)
    assert said in at.error[0].value.replace("\\", "")


def test_without_a_release_the_app_says_which_command_makes_one(tmp_path):
    for view in ("atlas", "overview", "head", "feature", "sql"):
        at = show(view)
        assert "no release yet" in words(at)
        assert at.code[0].value.startswith("atlas build")
    assert "Nothing was built yet" in words(show("jobs"))


def test_a_newer_release_is_picked_up_at_the_next_rerun(tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path))
    size = {"n_layers": 1, "n_heads": 2, "d_sae": 8, "n_blocks": 4, "context": 16}
    build_synthetic_release(tmp_path / "releases", **size)
    at = show("overview")
    assert "synthetic@1" in words(at)
    build_synthetic_release(tmp_path / "releases", seed=1, **{**size, "n_heads": 3})
    at.run()
    assert "synthetic@2" in words(at)
    assert "1 x 3 heads" in words(at)
    build_synthetic_release(tmp_path / "releases", name="other", **size)
    assert "other@1" in words(show("overview"))
    assert "synthetic@2" in words(show("overview", release="synthetic"))


def test_a_release_without_saes_still_opens(tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path))
    rows = {"model": "bare", "processing": "raw", "source": "local folder", "digest": "0"}
    rows |= {"n_layers": 1, "n_heads": 2, "d_model": 4, "d_head": 2, "d_vocab": 9, "n_ctx": 8}
    write_table(tmp_path / "models.parquet", "models", to_arrow("models", [rows]))
    releases.publish(tmp_path / "releases", "bare", {"models": [tmp_path / "models.parquet"]}, {})
    assert "Atlas of bare" in words(show("atlas"))
    assert "This release has no SAE on z of layer 0" in words(show("head"))
    assert "holds no SAE of bare" in words(show("overview")).replace("\\", "")
    assert "this release holds no SAE" in show("feature").error[0].value


def label_of(at):
    return next(t for t in at.text_input if t.label == "Label")


def test_a_change_is_kept_as_a_draft_and_save_marks_it_done(atlas):
    at = show("head", head="L0H1")
    label_of(at).input("copies names").run()
    note = annotations.load_head(atlas, "synthetic", 0, 1, "ann")
    assert (note.label, note.status, note.version) == ("copies names", "draft", 1)
    at.run()
    assert annotations.load_head(atlas, "synthetic", 0, 1, "ann").version == 1
    at.button(key="note_save").click().run()
    assert annotations.load_head(atlas, "synthetic", 0, 1, "ann").status == "done"
    assert "1/8 done, 0 drafts" in words(at)
    at.button(key="note_reopen").click().run()
    assert annotations.load_head(atlas, "synthetic", 0, 1, "ann").status == "draft"


def test_save_and_next_goes_to_the_next_open_head(atlas):
    annotations.save_head(atlas, HeadAnnotation("synthetic", 0, 1, "ann", status="done"), 0)
    at = show("head", head="L0H0")
    label_of(at).input("x")
    at.button(key="note_next").click().run()
    assert at.query_params["head"] in ("L0H2", ["L0H2"])
    assert label_of(at).value == ""
    assert "2/8 done" in words(at)


def test_every_field_is_stored_and_shown_again(atlas):
    at = show("head", head="L1H0")
    label_of(at).input("lists").run()
    next(t for t in at.text_area if t.label == "Notes").input("*notes*").run()
    next(t for t in at.toggle if t.label == "Star").set_value(True).run()
    next(t for t in at.get("button_group") if t.label == "Semanticity").set_value("bisemantic").run()
    next(t for t in at.get("button_group") if t.label == "Confidence").set_value(4).run()
    next(t for t in at.multiselect if t.label.startswith("Groupings")).select("induction").run()
    assert not at.exception
    note = annotations.load_head(atlas, "synthetic", 1, 0, "ann")
    assert (note.label, note.notes, note.star) == ("lists", "*notes*", True)
    assert (note.semanticity, note.confidence, note.groupings) == ("bisemantic", 4, ("induction",))
    again = show("head", head="L1H0")
    assert label_of(again).value == "lists"
    assert next(t for t in again.multiselect if t.label.startswith("Groupings")).value == ["induction"]


def conflict(atlas):
    at = show("head", head="L0H3")
    annotations.save_head(atlas, HeadAnnotation("synthetic", 0, 3, "ann", label="from elsewhere"), 0)
    label_of(at).input("from here").run()
    return at


def test_a_conflict_shows_both_texts_and_loses_none(atlas):
    at = conflict(atlas)
    assert any("changed elsewhere" in w.value for w in at.warning)
    shown = "\n".join(t.value for t in at.get("text"))
    assert "from here" in shown
    assert "from elsewhere" in shown
    assert annotations.load_head(atlas, "synthetic", 0, 3, "ann").label == "from elsewhere"


def test_a_conflict_is_resolved_by_either_text(atlas):
    at = conflict(atlas)
    next(b for b in at.button if b.label == "Keep mine").click().run()
    assert annotations.load_head(atlas, "synthetic", 0, 3, "ann").label == "from here"
    assert not at.warning
    stored = annotations.load_head(atlas, "synthetic", 0, 3, "ann")
    annotations.save_head(atlas, HeadAnnotation("synthetic", 0, 3, "ann", label="third"), stored.version)
    label_of(at).input("fourth").run()
    next(b for b in at.button if b.label == "Take the stored").click().run()
    assert label_of(at).value == "third"
    assert annotations.load_head(atlas, "synthetic", 0, 3, "ann").label == "third"


def test_annotators_write_beside_each_other(atlas):
    annotations.save_head(atlas, HeadAnnotation("synthetic", 0, 0, "bea", label="hers", status="done"), 0)
    at = show("head", head="L0H0")
    assert label_of(at).value == ""
    assert "0/8 done" in words(at)
    assert any("What others wrote (1)" in e.label for e in at.expander)
    at.text_input(key="annotator").set_value("bea").run()
    assert label_of(at).value == "hers"
    assert "1/8 done" in words(at)


def test_hostile_text_is_only_ever_text(atlas):
    at = show("head", head="L0H0")
    label_of(at).input(HOSTILE).run()
    annotations.save_head(atlas, HeadAnnotation("synthetic", 0, 0, HOSTILE[:70], notes=HOSTILE * 90), 0)
    annotations.save_feature(atlas, FeatureAnnotation(Z0, 1, "ann", label=HOSTILE, tags=("<b>",)), 0)
    for view, params in (("head", {"head": "L0H0"}), ("atlas", {}), ("feature", {"sae": Z0, "feature": "1"})):
        at = show(view, annotator=HOSTILE, **params)
        assert not any("<script" in body or "<b>bold" in body for body in markup(at)), view
        text = [str(e.value) for kind in ("markdown", "caption", "info", "error") for e in at.get(kind)]
        assert not any("<script" in t.replace("\\<", "") for t in text), view
    at = show("head", head=HOSTILE)
    assert at.error[0].value.count("\\<") >= 1


def test_what_cannot_be_stored_is_said_and_not_lost(atlas):
    at = show("head", head="L0H2")
    words_of = next(t for t in at.multiselect if t.label.startswith("Groupings"))
    words_of.set_value(["induction", "x" * 70]).run()
    assert any("has 70 characters; allowed: 1 to 60" in e.value.replace("\\", "") for e in at.error)
    words_of = next(t for t in at.multiselect if t.label.startswith("Groupings"))
    assert words_of.value == ["induction", "x" * 70]
    words_of.set_value(["induction"]).run()
    assert not at.error
    assert annotations.load_head(atlas, "synthetic", 0, 2, "ann").groupings == ("induction",)


def test_feature_notes_are_kept(atlas):
    at = show("feature", sae=Z0, feature="3")
    label_of(at).input("digits").run()
    next(t for t in at.get("button_group") if t.label == "Rating").set_value("partly").run()
    note = annotations.load_feature(atlas, Z0, 3, "ann")
    assert (note.label, note.interpretability, note.version) == ("digits", "partly", 2)


def test_sql_runs_a_shared_query_and_joins_the_notes(atlas):
    annotations.save_head(atlas, HeadAnnotation("synthetic", 1, 2, "ann", label="joined"), 0)
    at = show("sql", q="SELECT label, label FROM head_annotations JOIN models USING (model)")
    table = at.dataframe[0].value
    assert table.iloc[0].tolist() == ["joined", "joined"]
    assert "1 rows x 2 columns" in words(at)


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE saes",
        "WITH a AS (COPY (SELECT 1) TO '/tmp/x_atlas') SELECT 1",
        "SELECT nope FROM saes",
        "SEL",
    ],
)
def test_sql_errors_are_said_politely(atlas, sql):
    at = show("sql", q=sql)
    assert at.error[0].value.startswith("The query was not run, or did not finish.")
    assert at.code[0].value
    assert not at.dataframe


def test_sql_says_when_rows_are_left_out(atlas, monkeypatch):
    monkeypatch.setenv("ATLAS_QUERY_ROWS", "5")
    at = show("sql", q="SELECT feature FROM features")
    assert len(at.dataframe[0].value) == 5
    assert "There are more rows: at most 5 are shown" in words(at)


def test_sql_examples_all_run(atlas):
    path = releases.current(atlas.releases).path
    for sql in EXAMPLES.values():
        assert run_sql(sql, path, arrow_tables(atlas)).table.num_columns > 1


def test_jobs_show_steps_with_their_progress_and_errors(atlas):
    step = SimpleNamespace(name="train L00.z", kind="train", digest="d", queue="cpu", needs=())
    config = SimpleNamespace(release_name="docs", to_json=lambda: "{}")
    run = runs.create_run(atlas, SimpleNamespace(config=config, steps=(step,)))
    assert claim_step(atlas, run.id, step.name, "me")
    heartbeat(atlas, run.id, step.name, "me", done=30, total=120, message="<i>batch</i> 3")
    said = words(show("jobs"))
    assert "train L00.z" in said
    assert "30 / 120" in said
    assert "&lt;i&gt;batch&lt;/i&gt; 3" in said
    assert "width:25.0%" in said


def test_places_step_round_the_end_and_skip_what_is_done():
    last = Place(1, 3, 4, 8)
    assert last.step(1).name == "L0H0"
    assert Place(0, 0, 4, 8).step(-1).name == "L1H3"
    assert last.next_open({(0, 0), (0, 1)}).name == "L0H2"
    everything = {(layer, head) for layer in range(2) for head in range(4)}
    assert last.next_open(everything).name == "L0H0"


def test_the_app_never_imports_torch():
    code = (
        "import sys, json, pkgutil, importlib, app\n"
        "for m in pkgutil.walk_packages(app.__path__, 'app.'):\n"
        "    if m.name != 'app.main': importlib.import_module(m.name)\n"
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'jax')]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == []


def test_the_list_of_features_has_ones_own_labels_then_those_of_others_and_no_others_if_blind(atlas):
    for feature, who, said in (
        (1, "aa", "theirs"),
        (1, "ann", "mine"),
        (2, "zoe", "last"),
        (2, "bea", "first"),
    ):
        annotations.save_feature(atlas, FeatureAnnotation(Z0, feature, who, label=said), 0)

    def labels(**params):
        at = show("feature", sae=Z0, feature="3", **params)
        at.session_state["browse"] = True
        table = next(one.value for one in at.run().dataframe if "label" in one.value)
        return {row.feature: row.label for row in table.itertuples() if row.label}

    assert labels() == {1: "mine", 2: "first"}
    assert labels(blind="1") == {1: "mine"}
