"""Annotations: stored exactly, never overwritten unseen, every save kept, on both databases."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import duckdb
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from atlas.cli.db import db
from atlas.db.annotations import (
    StaleAnnotationError,
    annotators,
    feature_history,
    head_history,
    head_progress,
    list_features,
    list_heads,
    load_feature,
    load_head,
    save_feature,
    save_head,
)
from atlas.db.arrow import SCHEMAS, arrow_tables
from atlas.db.backup import dump, load
from atlas.db.engine import close_engines
from atlas.db.labels import feature_labels
from atlas.db.models import INTERPRETABILITY, SEMANTICITY
from atlas.db.notes import (
    LABEL_LENGTH,
    MOST_WORDS,
    NOTES_LENGTH,
    ROLE_LENGTH,
    WORD_LENGTH,
    FeatureAnnotation,
    HeadAnnotation,
)
from atlas.db.schema import newest_revision
from atlas.db.session import writing
from atlas.db.vocabulary import known_groupings
from atlas.errors import ConfigError, ConflictError
from atlas.settings import load_settings
from tests.servers import database, empty_database, postgres_server

HEAD = HeadAnnotation("docs-12l", 5, 1, "ann")
FULL = HeadAnnotation(
    model="docs-12l",
    layer=5,
    head=1,
    annotator="ann",
    label="long-prefix induction",
    groupings=("induction", "long prefix"),
    semanticity="monosemantic",
    confidence=4,
    role="induction",
    star=True,
    novel=True,
    notes="**All** ten.\n\n- one\n- two <script>alert(1)</script> ‮עברית 🧠",
    status="done",
    seconds_spent=81.5,
)
FEATURE = FeatureAnnotation("docs-12l/L05.z.topk-1536", 17, "ann", "of", ("bigram",), "partly", "hm")


@pytest.fixture
def sqlite(tmp_path):
    yield load_settings({"ATLAS_HOME": str(tmp_path / "sqlite")})
    close_engines()


def without_times(note):
    return replace(note, version=0, created_at=None, updated_at=None)


def test_a_head_comes_back_as_it_was_written(database):
    before = datetime.now(UTC)
    saved = save_head(database, FULL, 0)
    assert saved.version == 1
    assert without_times(saved) == FULL
    assert load_head(database, "docs-12l", 5, 1, "ann") == saved
    assert before <= saved.created_at == saved.updated_at <= datetime.now(UTC)
    assert load_head(database, "docs-12l", 5, 1, "ann").created_at.utcoffset() == timedelta(0)
    again = save_head(database, replace(saved, label="induction", confidence=None), 1)
    assert (again.version, again.label, again.confidence) == (2, "induction", None)
    assert again.created_at == saved.created_at < again.updated_at


def test_a_feature_comes_back_as_it_was_written(database):
    saved = save_feature(database, FEATURE, 0)
    assert without_times(saved) == FEATURE
    assert load_feature(database, FEATURE.sae, 17, "ann") == saved
    save_feature(database, replace(FEATURE, annotator="bob", interpretability=None), 0)
    assert [n.annotator for n in list_features(database, FEATURE.sae)] == ["ann", "bob"]
    assert [n.annotator for n in list_features(database, FEATURE.sae, annotator="bob")] == ["bob"]
    with pytest.raises(StaleAnnotationError):
        save_feature(database, FEATURE, 0)
    assert [(s.annotator, s.version) for s in feature_history(database, FEATURE.sae, 17)] == [
        ("ann", 1),
        ("bob", 1),
    ]


def test_labels_of_some_features_are_ones_own_first(database):
    other = "docs-12l/L06.z.topk-1536"
    for sae, feature, annotator, label in [
        (FEATURE.sae, 17, "zoe", "z"), (FEATURE.sae, 17, "bob", "b"), (FEATURE.sae, 18, "ann", "a"),
        (FEATURE.sae, 19, "ann", ""), (other, 17, "ann", "o"), (other, 20, "bob", "p"),
    ]:  # fmt: skip
        note = replace(FEATURE, sae=sae, feature=feature, annotator=annotator, label=label)
        save_feature(database, note, 0)
    asked = {FEATURE.sae: [17, 18, 19], other: {17}, "none": []}
    of_all = {(FEATURE.sae, 17): "b", (FEATURE.sae, 18): "a", (other, 17): "o"}
    assert feature_labels(database, asked) == of_all
    assert feature_labels(database, asked, annotator="zoe") == {**of_all, (FEATURE.sae, 17): "z"}
    own = {(FEATURE.sae, 18): "a", (other, 17): "o"}
    assert feature_labels(database, asked, annotator="ann", alone=True) == own
    assert feature_labels(database, {FEATURE.sae: []}) == {}


def test_nothing_written_is_nothing_found(database):
    assert load_head(database, "docs-12l", 5, 1, "ann") is None
    assert load_feature(database, "x", 0, "ann") is None
    assert head_progress(database, "docs-12l", "ann") == {}
    assert known_groupings(database, "docs-12l") == annotators(database, "docs-12l") == ()


@pytest.mark.parametrize("expected", [0, 1, 3])
def test_a_stale_save_changes_nothing_and_shows_both_texts(database, expected):
    save_head(database, replace(HEAD, label="one"), 0)
    stored = save_head(database, replace(HEAD, label="two"), 1)
    with pytest.raises(StaleAnnotationError) as caught:
        save_head(database, replace(HEAD, label="late"), expected)
    assert isinstance(caught.value, ConflictError)
    assert (caught.value.yours.label, caught.value.theirs) == ("late", stored)
    assert f"version {expected}, it is now at version 2" in str(caught.value)
    assert load_head(database, "docs-12l", 5, 1, "ann") == stored
    assert len(head_history(database, "docs-12l", 5, 1)) == 2


def test_a_save_on_top_of_what_never_was(database):
    with pytest.raises(StaleAnnotationError, match="version 7, it is now at version 0"):
        save_head(database, HEAD, 7)
    assert head_history(database, "docs-12l", 5, 1) == []


def test_every_save_is_in_the_history(database):
    version = 0
    for label in ("a", "b", "c"):
        version = save_head(database, replace(HEAD, label=label), version).version
    save_head(database, replace(HEAD, annotator="bob", label="other"), 0)
    saves = head_history(database, "docs-12l", 5, 1, "ann")
    assert [(s.version, s.payload["label"]) for s in saves] == [(1, "a"), (2, "b"), (3, "c")]
    assert [s.annotator for s in head_history(database, "docs-12l", 5, 1)] == ["ann", "ann", "ann", "bob"]


def test_progress_and_lists(database):
    save_head(database, FULL, 0)
    save_head(database, replace(FULL, head=2, label="dup", semanticity=None, status="draft"), 0)
    save_head(database, replace(FULL, annotator="bob", groupings=("induction",)), 0)
    save_head(database, replace(FULL, model="gpt2", groupings=("elsewhere",)), 0)
    progress = head_progress(database, "docs-12l", "ann")
    assert {key: (p.status, p.label, p.semanticity) for key, p in progress.items()} == {
        (5, 1): ("done", "long-prefix induction", "monosemantic"),
        (5, 2): ("draft", "dup", None),
    }
    assert known_groupings(database, "docs-12l") == ("induction", "long prefix")
    assert annotators(database, "docs-12l") == ("ann", "bob")
    assert [(n.head, n.annotator) for n in list_heads(database, "docs-12l", layer=5)] == [
        (1, "ann"),
        (1, "bob"),
        (2, "ann"),
    ]
    assert [n.annotator for n in list_heads(database, "docs-12l", layer=5, head=1)] == ["ann", "bob"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"semanticity": "mono"}, "semanticity 'mono' is not known; allowed: monosemantic, nearly_mono"),
        ({"status": "finished"}, "status 'finished' is not known; allowed: draft, done"),
        ({"confidence": 6}, "confidence 6 is not known; allowed: 1, 2, 3, 4, 5, None"),
        ({"label": "x" * (LABEL_LENGTH + 1)}, f"label has 121 characters; allowed: 0 to {LABEL_LENGTH}"),
        ({"notes": "x" * (NOTES_LENGTH + 1)}, f"notes has 20001 characters; allowed: 0 to {NOTES_LENGTH}"),
        ({"role": "x" * (ROLE_LENGTH + 1)}, "role has 201 characters"),
        ({"groupings": ("",)}, "groupings entry '' has 0 characters; allowed: 1 to 60"),
        ({"groupings": ("y" * (WORD_LENGTH + 1),)}, "has 61 characters"),
        (
            {"groupings": tuple(map(str, range(MOST_WORDS + 1)))},
            "groupings has 21 entries; allowed: at most 20",
        ),
        ({"notes": "a\0b"}, "notes holds a NUL"),
        ({"annotator": ""}, "annotator has 0 characters; allowed: 1 to 80"),
        ({"annotator": "ann "}, "annotator 'ann ' begins or ends with a space"),
        ({"layer": -1}, "layer -1 is not allowed; allowed: 0 to 32767"),
        ({"head": 40_000}, "head 40000 is not allowed"),
        ({"seconds_spent": float("nan")}, "seconds_spent nan is not allowed"),
    ],
)
def test_what_a_head_may_not_hold(sqlite, changes, message):
    with pytest.raises(ConfigError) as caught:
        save_head(sqlite, replace(FULL, **changes), 0)
    assert message in str(caught.value)
    assert arrow_tables(sqlite)["annotation_history"].num_rows == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interpretability": "no"}, "interpretability 'no' is not known; allowed: interpretable, partly"),
        ({"tags": ("a" * 61,)}, "tags entry"),
        ({"feature": -1}, "feature -1 is not allowed"),
        ({"sae": "s" * 301}, "sae has 301 characters; allowed: 1 to 300"),
    ],
)
def test_what_a_feature_may_not_hold(sqlite, changes, message):
    with pytest.raises(ConfigError) as caught:
        save_feature(sqlite, replace(FEATURE, **changes), 0)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change",
    ["semanticity = 'mono'", "status = 'finished'", "confidence = 6", "layer = -1", "label = NULL"],
)
def test_the_database_itself_refuses_it_too(database, change):
    save_head(database, FULL, 0)
    with pytest.raises(IntegrityError), writing(database) as session:
        session.execute(text(f"UPDATE head_annotations SET {change}"))
    assert without_times(load_head(database, "docs-12l", 5, 1, "ann")) == FULL


@pytest.mark.parametrize("value", [*SEMANTICITY, None])
def test_every_class_of_semanticity(database, value):
    assert save_head(database, replace(FULL, semanticity=value), 0).semanticity == value


@pytest.mark.parametrize("value", [*INTERPRETABILITY, None])
def test_every_rating_of_interpretability(database, value):
    assert save_feature(database, replace(FEATURE, interpretability=value), 0).interpretability == value


_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=LABEL_LENGTH)


@hypothesis_settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(label=_TEXT, notes=_TEXT, words=st.lists(_TEXT.map(lambda t: t[:WORD_LENGTH]), max_size=5))
def test_any_text_comes_back(sqlite, label, notes, words):
    words = tuple(w for w in words if w.split())
    found = load_head(sqlite, "docs-12l", 5, 1, "ann")
    saved = save_head(
        sqlite, replace(FULL, label=label, notes=notes, groupings=words), found.version if found else 0
    )
    assert load_head(sqlite, "docs-12l", 5, 1, "ann") == saved
    assert (saved.label, saved.notes) == (label, notes)
    assert saved.groupings == tuple(dict.fromkeys(" ".join(w.split()) for w in words))
    history = head_history(sqlite, "docs-12l", 5, 1)
    assert len(history) == saved.version
    assert history[-1].payload["notes"] == notes


def test_eight_threads_writing_at_once_lose_nothing(database, monkeypatch):
    """Each adds its mark 12 times to one shared text, reading again after every conflict."""
    threads, marks = 8, 12
    gate = threading.Barrier(threads)
    conflicts = []
    # SQLite gives a lock to whoever asks next, not to who waits longest.
    monkeypatch.setattr("atlas.db.engine.BUSY_SECONDS", 500)
    close_engines()

    def write(mine):
        for number in range(marks):
            waits = number == 0
            while True:
                found = load_head(database, "docs-12l", 5, 1, "ann")
                note = found or HEAD
                if waits:
                    gate.wait()  # all have read before any writes
                    waits = False
                try:
                    save_head(database, replace(note, notes=f"{note.notes} {mine}.{number}"), note.version)
                    break
                except StaleAnnotationError:
                    conflicts.append(mine)
            save_head(database, replace(HEAD, head=10 + mine, label=str(number)), number)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(threads)))
    shared = load_head(database, "docs-12l", 5, 1, "ann")
    assert sorted(shared.notes.split()) == sorted(f"{t}.{n}" for t in range(threads) for n in range(marks))
    assert shared.version == threads * marks
    assert conflicts, "the threads never met, so nothing was tried"
    for mine in range(threads):
        assert load_head(database, "docs-12l", 5, 10 + mine, "ann").label == str(marks - 1)
    assert arrow_tables(database)["annotation_history"].num_rows == 2 * threads * marks


def test_arrow_schemas_hold_without_a_database(tmp_path):
    settings = load_settings({"ATLAS_HOME": str(tmp_path / "none")})
    tables = arrow_tables(settings)
    assert {name: t.schema for name, t in tables.items()} == SCHEMAS
    assert all(t.num_rows == 0 for t in tables.values())
    assert not (tmp_path / "none").exists()


def test_arrow_tables_hold_what_was_written(database):
    saved = save_head(database, FULL, 0)
    save_head(database, replace(FULL, layer=0, semanticity=None, groupings=()), 0)
    save_feature(database, FEATURE, 0)
    tables = arrow_tables(database)
    assert {name: t.schema for name, t in tables.items()} == SCHEMAS
    rows = tables["head_annotations"].to_pylist()
    assert [r["layer"] for r in rows] == [0, 5]
    assert (rows[0]["semanticity"], rows[0]["groupings"]) == (None, [])
    expected = {k: getattr(saved, k) for k in SCHEMAS["head_annotations"].names}
    for time in ("created_at", "updated_at"):
        expected[time] = expected[time].replace(tzinfo=None)
    assert rows[1] == {**expected, "groupings": ["induction", "long prefix"]}
    payload = json.loads(tables["annotation_history"].to_pylist()[0]["payload"])
    assert payload["label"] == FULL.label
    connection = duckdb.connect()
    for name, table in tables.items():
        connection.register(name, table)
    query = "SELECT g FROM (SELECT unnest(groupings) AS g FROM head_annotations) ORDER BY g"
    assert connection.sql(query).fetchall() == [("induction",), ("long prefix",)]


def test_dump_and_load_into_another_database(database, sqlite):
    save_head(database, FULL, 0)
    save_head(database, replace(FULL, label="second"), 1)
    save_feature(database, FEATURE, 0)
    lines = list(dump(database))
    assert len(lines) == 1 + 1 + 3
    assert load(sqlite, lines) == 5
    assert list(dump(sqlite)) == lines
    assert load(sqlite, lines) == 0
    assert load_head(sqlite, "docs-12l", 5, 1, "ann") == load_head(database, "docs-12l", 5, 1, "ann")
    save_head(sqlite, replace(FULL, label="third"), 2)


def test_load_never_overwrites_and_is_all_or_nothing(database, sqlite):
    save_head(sqlite, replace(FULL, layer=0), 0)
    save_head(sqlite, replace(FULL, label="mine"), 0)
    save_head(database, replace(FULL, label="theirs"), 0)
    with pytest.raises(ConflictError, match=r"line 2: .* is already there with another .*label"):
        load(database, dump(sqlite))
    assert [n.label for n in list_heads(database, "docs-12l")] == ["theirs"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda line: line[:-5],
        lambda line: line.replace('"head_annotations"', '"runs"'),
        lambda line: line.replace('"monosemantic"', '"mono"'),
        lambda line: line.replace('"label"', '"lable"'),
        lambda line: line.replace("+00:00", ""),
        lambda line: "[1]",
    ],
)
def test_a_line_that_dump_did_not_write(sqlite, tmp_path, spoil):
    save_head(sqlite, FULL, 0)
    line = next(iter(dump(sqlite)))
    other = load_settings({"ATLAS_HOME": str(tmp_path / "other")})
    with pytest.raises(ConfigError, match="line 1 is no annotation"):
        load(other, [spoil(line)])
    assert list(dump(other)) == []
    assert load(other, ["", line]) == 1


def test_the_commands(tmp_path):
    environment = {"ATLAS_HOME": str(tmp_path / "home")}
    file = tmp_path / "notes.jsonl"

    def atlas_db(*arguments, env=environment):
        return CliRunner().invoke(db, arguments, env=env, catch_exceptions=False).output

    assert f"schema {newest_revision()}" in atlas_db("upgrade")
    assert f"schema {newest_revision()}" in atlas_db("check")
    save_head(load_settings(environment), FULL, 0)
    atlas_db("dump", str(file))
    assert file.read_text().splitlines() == atlas_db("dump").splitlines()
    assert "loaded 2 new rows" in atlas_db("load", str(file), env={"ATLAS_HOME": str(tmp_path / "b")})
    assert "loaded 0 new rows" in atlas_db("load", str(file))
    assert "schema base" in atlas_db("downgrade", "base")
    close_engines()
