# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
"""What several people make of annotations: vocabulary, comments, decisions, surveys, comparisons, changes."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas import access
from atlas.access import Actor
from atlas.agreement import wilson_interval
from atlas.db import adjudication, changes, comments, comparing, surveys, vocabulary
from atlas.db.adjudication import Decision
from atlas.db.annotations import Saved, head_history, load_head, save_feature, save_head
from atlas.db.arrow import arrow_tables
from atlas.db.backup import dump, load
from atlas.db.engine import close_engines
from atlas.db.notes import FeatureAnnotation, HeadAnnotation
from atlas.db.places import FeaturePlace, HeadPlace
from atlas.db.queues import ordered
from atlas.db.surveys import Rating
from atlas.errors import AccessError, ConfigError, ConflictError
from atlas.judging import FeatureVerdict
from atlas.settings import load_settings
from tests.servers import database, empty_database, postgres_server

MODEL, SAE = "docs-12l", "docs-12l/L05.z.topk-768"
HEAD = HeadPlace(MODEL, 5, 1)
VERDICTS = (FeatureVerdict(SAE, 3, "group", "of"), FeatureVerdict(SAE, 9, "odd"))


@pytest.fixture
def sqlite(tmp_path):
    yield load_settings({"ATLAS_HOME": str(tmp_path / "sqlite")})
    close_engines()


@pytest.fixture
def acting():
    """Lets a test say who is acting; the usual source comes back afterwards."""

    def be(name, role):
        access.use_source(lambda: Actor(name, role, known=True))

    yield be
    access.use_source(access.os_user)


def note(layer, head, who, **fields):
    return HeadAnnotation(MODEL, layer, head, who, **{"status": "done", **fields})


def put(settings, *notes):
    for one in notes:
        old = load_head(settings, one.model, one.layer, one.head, one.annotator)
        save_head(settings, one, old.version if old else 0)


def test_verdicts_are_kept_with_the_note_and_in_its_history(database):
    saved = save_head(database, note(5, 1, "ann", verdicts=VERDICTS[::-1]), 0)
    assert saved.verdicts == VERDICTS
    assert load_head(database, MODEL, 5, 1, "ann") == saved
    save_head(database, replace(saved, verdicts=VERDICTS[:1]), 1)
    first, second = head_history(database, MODEL, 5, 1, "ann")
    assert changes.as_it_was(saved, first).verdicts == VERDICTS
    assert [c.field for c in changes.changes(first.payload, second.payload)] == ["verdicts"]
    rows = arrow_tables(database)["head_verdicts"].to_pylist()
    assert [(r["feature"], r["verdict"], r["grouping"], r["status"]) for r in rows] == [
        (3, "group", "of", "done")
    ]


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ((FeatureVerdict(SAE, 3, "group"),), "names no group"),
        ((FeatureVerdict(SAE, 3, "odd", "of"),), "names group 'of'; allowed: none"),
        ((FeatureVerdict(SAE, 3, "maybe"),), "verdict 'maybe' is not known; allowed: group, odd, unsure"),
        ((FeatureVerdict(SAE, -1, "odd"),), "feature -1 is not allowed"),
        ((VERDICTS[0], VERDICTS[0]), "feature 3 of docs-12l/L05.z.topk-768 has two verdicts"),
        ((FeatureVerdict(SAE, 3, "group", "g" * 61),), "has 61 characters"),
        (tuple(FeatureVerdict(SAE, i, "odd") for i in range(201)), "verdicts has 201 entries"),
    ],
)
def test_verdicts_that_are_refused(sqlite, verdicts, said):
    with pytest.raises(ConfigError, match=said):
        save_head(sqlite, note(5, 1, "ann", verdicts=verdicts), 0)


def test_merged_words_count_as_one_and_notes_stay(database):
    put(database, note(0, 0, "ann", groupings=("bigrams", "code")), note(0, 1, "ann", groupings=("bigram",)))
    vocabulary.merge(database, MODEL, "bigrams", "bigram", "ann")
    vocabulary.merge(database, MODEL, "bigram", "pairs", "ann")
    assert vocabulary.same_words(database, MODEL) == {"bigram": "pairs", "bigrams": "pairs"}
    assert [(w.word, w.n, w.merged) for w in vocabulary.vocabulary(database, MODEL)] == [
        ("pairs", 2, ("bigram", "bigrams")),
        ("code", 1, ()),
    ]
    assert load_head(database, MODEL, 0, 0, "ann").groupings == ("bigrams", "code")
    assert load_head(database, MODEL, 0, 0, "ann").version == 1
    with pytest.raises(ConfigError, match="already stands for"):
        vocabulary.merge(database, MODEL, "pairs", "bigrams", "ann")
    vocabulary.unmerge(database, MODEL, "bigram", "ann")
    assert vocabulary.same_words(database, MODEL) == {"bigrams": "bigram"}
    with pytest.raises(ConfigError, match="was not merged"):
        vocabulary.unmerge(database, MODEL, "bigram", "ann")
    assert arrow_tables(database)["grouping_merges"].num_rows == 1


def test_comments_are_said_and_withdrawn_by_their_author_alone(database):
    first = comments.add_comment(database, HEAD, "ann", " why <b>this</b>? ")
    comments.add_comment(database, HEAD, "bob", "because")
    comments.add_comment(database, FeaturePlace(SAE, 1), "bob", "elsewhere")
    assert [(c.author, c.body) for c in comments.list_comments(database, HEAD)] == [
        ("ann", "why <b>this</b>?"),
        ("bob", "because"),
    ]
    with pytest.raises(ConfigError, match="has no comment"):
        comments.withdraw_comment(database, first.id, "bob")
    comments.withdraw_comment(database, first.id, "ann")
    gone = comments.list_comments(database, HEAD)[0]
    assert (gone.body, gone.withdrawn) == ("", True)
    assert "why" not in str(arrow_tables(database)["comments"].to_pylist())
    with pytest.raises(ConfigError, match="comment has 0 characters"):
        comments.add_comment(database, HEAD, "ann", "  ")


def test_decisions_are_versions_and_nobody_passes_another(database):
    one = Decision(HEAD, "ada", "induction", ("long prefix",), "monosemantic", reason="both said so")
    first = adjudication.decide(database, one, 0)
    assert (first.version, first.label, first.groupings) == (1, "induction", ("long prefix",))
    with pytest.raises(ConflictError, match="decided meanwhile"):
        adjudication.decide(database, replace(one, label="late"), 0)
    adjudication.decide(database, replace(one, semanticity=None), 1)
    assert [d.version for d in adjudication.decisions(database, HEAD)] == [1, 2]
    assert adjudication.head_decisions(database, MODEL)[5, 1].semanticity is None
    feature = Decision(FeaturePlace(SAE, 7), "ada", interpretability="partly")
    assert adjudication.decide(database, feature, 0).place == FeaturePlace(SAE, 7)
    with pytest.raises(ConfigError, match="semanticity 'mono' is not known"):
        adjudication.decide(database, replace(one, semanticity="mono"), 2)
    assert [r["version"] for r in arrow_tables(database)["adjudications"].to_pylist()] == [1, 2, 1]


def test_who_may_write_what(sqlite, acting):
    acting("rita", "reader")
    for call in (
        lambda: save_head(sqlite, note(0, 0, "rita"), 0),
        lambda: save_feature(sqlite, FeatureAnnotation(SAE, 1, "rita"), 0),
        lambda: comments.add_comment(sqlite, HEAD, "rita", "x"),
        lambda: vocabulary.merge(sqlite, MODEL, "a", "b", "rita"),
    ):
        with pytest.raises(AccessError, match="rita is reader"):
            call()
    acting("ann", "annotator")
    assert save_head(sqlite, note(0, 0, "ann"), 0).version == 1
    with pytest.raises(AccessError, match="ann cannot write as 'bob'"):
        save_head(sqlite, note(0, 0, "bob"), 0)
    with pytest.raises(AccessError, match="adjudicate"):
        adjudication.decide(sqlite, Decision(HEAD, "ann"), 0)


def test_agreement_of_finished_notes(database):
    put(
        database,
        note(0, 0, "ann", semanticity="monosemantic", groupings=("of", "on"), verdicts=VERDICTS),
        note(0, 0, "bob", semanticity="monosemantic", groupings=("of",), verdicts=VERDICTS),
        note(0, 1, "ann", semanticity="bisemantic", groupings=("code",), role="induction"),
        note(0, 1, "bob", semanticity="polysemantic", groupings=("Code",), role="induction"),
        note(0, 2, "ann", semanticity="unclear"),
        note(0, 2, "bob", semanticity="unclear", status="draft"),
    )
    vocabulary.merge(database, MODEL, "Code", "code", "ann")
    found = {one.field.name: one for one in comparing.agreement(database, MODEL)}
    assert (found["semanticity"].units, found["semanticity"].judgements) == (2, 4)
    assert found["semanticity"].cohen == pytest.approx((0.5 - 0.25) / 0.75)
    # observed 2 x 0.5 / 4; expected 2 x (0.5 + 4 x 1) / (4 x 3)
    assert found["groupings"].alpha == pytest.approx(1 - 0.25 / 0.75)
    assert math.isnan(found["groupings"].cohen)
    assert found["verdicts"].equal == 1.0
    apart = comparing.disputed_heads(database, MODEL)
    assert [one.head for one in apart] == [(0, 1), (0, 0)]
    assert apart[0].distance == pytest.approx((1 + 0 + 0) / 3)
    assert apart[1].distance == pytest.approx((0 + 0.5) / 2)
    assert set(apart[0].fields) == {"semanticity"}
    assert comparing.pairwise_kappa(database, MODEL)["ann", "bob"] == found["semanticity"].cohen


def test_orders_hold_every_head_once_and_follow_their_rule():
    everything = {(layer, head) for layer in range(5) for head in range(7)}
    assert ordered(5, 7) == sorted(everything)
    shuffled = ordered(5, 7, "random", 3)
    assert set(shuffled) == everything
    assert shuffled == ordered(5, 7, "random", 3) != ordered(5, 7, "random", 4)
    assert [h for h in ordered(6, 8, "random", 3) if h in everything] == shuffled
    assert ordered(5, 7, "disagreement", distances={(4, 6): 0.1, (2, 2): 0.9, (0, 1): 0.1})[:4] == [
        (2, 2), (0, 1), (4, 6), (0, 0),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="order 'up' is not known; allowed: layer, random, disagreement"):
        ordered(1, 1, "up")


ALIVE = {"m/L00.z": tuple(range(60)), "m/L01.z": tuple(range(0, 240, 2)), "m/L02.z": (5,)}


def drawn(settings, name="first", n_each=10):
    return surveys.create_survey(
        settings, name, "ann", model=MODEL, release="r@1", alive=ALIVE, n_each=n_each, seed=7
    )


def test_a_survey_keeps_its_sample(database):
    made = drawn(database)
    assert len(made.sample) == len(set(made.sample)) == 10 + 10 + 1
    assert all(feature in ALIVE[sae] for sae, feature in made.sample)
    assert surveys.load_survey(database, "first") == made
    assert made.alive == {"m/L00.z": 60, "m/L01.z": 120, "m/L02.z": 1}
    with pytest.raises(ConflictError, match="'first' is there already"):
        drawn(database)
    with pytest.raises(ConfigError, match="survey 'none' is not known; allowed: first"):
        surveys.load_survey(database, "none")
    rows = arrow_tables(database)["survey_features"].to_pylist()
    assert [(r["sae"], r["feature"]) for r in rows] == list(made.sample)


def test_every_feature_is_as_likely_to_be_drawn():
    hits = [0] * 20
    for seed in range(600):
        for _, feature in surveys.draw({"s": range(20)}, 5, seed):
            hits[feature] += 1
    expected = 600 * 5 / 20
    chi2 = sum((h - expected) ** 2 / (expected * 0.75) for h in hits)
    assert chi2 < 43.8  # 99.9% point of chi-square with 19 degrees of freedom; the draw is fixed by its seeds


def test_shares_of_a_survey(database):
    made = drawn(database, n_each=4)
    rates = iter(["interpretable", "interpretable", "partly", "uninterpretable"] * 9)
    for sae, feature in sorted(made.sample):
        surveys.rate(database, made, Rating(sae, feature, "ann", next(rates)))
    found = {one.sae: one for one in surveys.shares(made, surveys.ratings(database, "first"))}
    assert (found["m/L00.z"].n, found["m/L00.z"].share) == (4, 0.5)
    assert (found["m/L00.z"].low, found["m/L00.z"].high) == pytest.approx(wilson_interval(2, 4))
    weights = [60 / 181, 120 / 181, 1 / 181]
    p = 0.5 * weights[0] + 0.5 * weights[1] + 1.0 * weights[2]
    n = 1 / (weights[0] ** 2 / 4 + weights[1] ** 2 / 4 + weights[2] ** 2)
    assert found[""].share == pytest.approx(p)
    assert (found[""].low, found[""].high) == pytest.approx(wilson_interval(p * n, n))
    assert found[""].n == 9


def test_ratings_of_several_people(database):
    made = drawn(database, n_each=1)
    (sae, feature) = made.sample[0]
    for who, rating in (("ann", "interpretable"), ("bob", "interpretable"), ("eve", "uninterpretable")):
        surveys.rate(database, made, Rating(sae, feature, who, rating))
    assert surveys.shares(made, surveys.ratings(database, "first"))[0].share == 1.0
    with pytest.raises(ConflictError, match="rated by you already"):
        surveys.rate(database, made, Rating(sae, feature, "eve", "partly"))
    again = surveys.rate(database, made, Rating(sae, feature, "eve", "skipped"), 1)
    assert again.version == 2
    with pytest.raises(ConflictError, match="rated again meanwhile"):
        surveys.rate(database, made, Rating(sae, feature, "eve", "partly"), 1)
    assert surveys.shares(made, surveys.ratings(database, "first"))[0].counts == {"interpretable": 1}
    with pytest.raises(ConfigError, match="is not in survey"):
        surveys.rate(database, made, Rating(sae, 10**6, "ann", "partly"))
    with pytest.raises(ConfigError, match="rating 'good' is not known"):
        surveys.rate(database, made, Rating(sae, feature, "ann", "good"))


def test_everything_goes_into_the_backup(database, sqlite):
    put(database, note(5, 1, "ann", verdicts=VERDICTS, groupings=("a",)))
    vocabulary.merge(database, MODEL, "a", "b", "ann")
    comments.add_comment(database, HEAD, "ann", "said")
    adjudication.decide(database, Decision(HEAD, "ann", "agreed"), 0)
    made = drawn(database, n_each=1)
    surveys.rate(database, made, Rating(*made.sample[0], "ann", "partly"))
    lines = list(dump(database))
    assert load(sqlite, lines) == len(lines) == 7
    assert arrow_tables(sqlite) == arrow_tables(database)


_TEXT = st.text(st.sampled_from("ab .\n<é"), max_size=25)


@given(_TEXT, _TEXT)
def test_pieces_rebuild_both_texts(before, after):
    found = changes.pieces(before, after)
    assert "".join(t for mark, t in found if mark in "=-") == before
    assert "".join(t for mark, t in found if mark in "=+") == after


def test_typing_is_one_line_of_the_history():
    start = datetime(2026, 1, 1, tzinfo=UTC)

    def save(version, seconds, **payload):
        return Saved(
            "ann", version, {"label": "", "notes": "", **payload}, start + timedelta(seconds=seconds)
        )

    history = [
        save(1, 0, label="c"), save(2, 5, label="copies"), save(3, 9, label="copies names"),
        save(4, 20, label="copies names", notes="n"), save(5, 400, label="copies names", notes="not"),
    ]  # fmt: skip
    assert [one.version for one in changes.condensed(history)] == [3, 4, 5]
    assert changes.earlier(history, 4).version == 3
    assert changes.earlier(history, 1) is None
    assert changes.changes(None, history[0].payload)[0].pieces == (("+", "c"),)
