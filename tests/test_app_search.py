"""The search view and typed texts: addresses, facets, saved searches, what a live answer becomes."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)

import pytest

from app import search_state
from app.search_state import Asked, read, write_range
from atlas.db import annotations, saved
from atlas.db.notes import FeatureAnnotation
from atlas.errors import QueryError
from atlas.live.client import LiveError
from tests.synthetic import MODEL
from tests.test_app_views import HOSTILE, Z0, atlas, home, show, words

COMPONENTS = {}


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """What is handed to the components of links and of examples, by key."""
    COMPONENTS.clear()
    for name in ("related_features", "feature_examples"):
        monkeypatch.setattr(f"app.components.draw.{name}", COMPONENTS.__setitem__)
    return COMPONENTS


def found():
    groups = COMPONENTS["found"]["groups"]
    return [(row["sae"], row["feature"]) for group in groups for row in group["rows"]]


@pytest.mark.parametrize(
    "asked",
    [
        Asked(),
        Asked("at", " the", families=("induction", "bigram"), order="-density", page=2),
        Asked("text", "a b&c", exact=True, sae=Z0, head=3),
        Asked(ranges=(("density", None, 0.01), ("n_active", 5.0, None)), order="dfa_distance"),
    ],
)
def test_an_address_says_the_whole_search(asked):
    params = {k: v if isinstance(v, list) else [v] for k, v in asked.params().items()}
    assert read(params) == asked


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"by": ["colour"]}, "question 'colour' is not known; allowed: at"),
        ({"family": ["odd"]}, "family 'odd' is not known"),
        ({"range": ["density"]}, "range 'density' cannot be read"),
        ({"range": ["colour:1..2"]}, "range 'colour:1..2' cannot be read"),
        ({"range": ["density:a..2"]}, "cannot be read"),
        ({"page": ["-1"]}, "page '-1' is not a number"),
        ({"head": ["²"]}, "head '²' is not a number"),
    ],
)
def test_an_address_that_cannot_be_read_names_the_value(params, said):
    with pytest.raises(QueryError, match=said.replace("?", ".")):
        read(params)


def test_every_feature_without_a_question(atlas):
    at = show("search")
    assert not at.error
    assert len(found()) == 50
    total = next(c.value for c in at.caption if " of " in c.value)
    at = show("search", page="1")
    assert len(found()) == 50
    assert next(c.value for c in at.caption if " of " in c.value).split("of")[1] == total.split("of")[1]


def test_filters_of_the_address_are_applied(atlas):
    at = show("search", sae=Z0, order="-density", range=write_range("n_active", 20, None))
    assert {sae for sae, _ in found()} == {Z0}
    assert any("n active" in b.label and "20" in b.label for b in at.button)
    next(b for b in at.button if b.key == "drop_n_active").click().run()
    assert "range" not in at.query_params
    assert at.query_params["order"] in ("-density", ["-density"])


def test_a_label_is_found_and_shown_harmlessly(atlas):
    note = FeatureAnnotation(Z0, 5, "bob", label=HOSTILE, tags=("odd one",))
    annotations.save_feature(atlas, note, 0)
    for wanted in ("ALERT", "odd"):
        show("search", by="label", q=wanted)
        assert found() == [(Z0, 5)]
    assert COMPONENTS["found"]["groups"][0]["rows"][0]["label"] == HOSTILE
    show("search", by="label", q="nothing like it")
    assert COMPONENTS["found"]["groups"] == []


def test_features_like_one_and_a_text(atlas):
    show("search", by="like", q=f"{Z0}/3")
    assert (Z0, 3) not in found()
    assert len(found()) > 3
    show("search", by="text", q="a")
    assert len(found()) > 0
    at = show("search", by="like", q="gone/3")
    assert "SAE 'gone' is not in this release" in at.error[0].value.replace("\\", "")


def test_an_unknown_token_is_said(atlas):
    at = show("search", by="at", q="no such token at all")
    assert "No single token" in at.info[0].value
    assert COMPONENTS["found"]["groups"] == []


def test_a_wrong_address_offers_a_new_beginning(atlas):
    at = show("search", range="colour:1..2")
    assert "cannot be read" in at.error[0].value.replace("\\", "")


def test_a_search_is_kept_and_opened_again(atlas):
    at = show("search", family="single_token")
    at.text_input(key="search_name").set_value("  mine & yours ").run()
    at.button(key="search_keep").click().run()
    (kept,) = saved.list_questions(atlas, "search", "ann")
    assert (kept.name, kept.body) == ("mine & yours", "family=single_token")
    at = show("search", by="at", q="x")
    next(b for b in at.button if b.key.startswith("open_search_")).click().run()
    assert {name: list(value) if isinstance(value, list) else [value]
            for name, value in at.query_params.items()} == {"family": ["single_token"]}  # fmt: skip
    at.button(key="drop_search_mine & yours").click().run()
    assert saved.list_questions(atlas, "search", "ann") == []


# ---------------------------------------------------------------- typed texts

ANSWER = {
    "tokens": [0, 1, 2, 1], "texts": ["<bos>", "a", "·b", "a"], "cut": False,
    "active": [[1, 0.5], [3, 2.0]], "pre": [0.0, 0.5, -1.0, 2.0],
    "dfa": [
        {"position": 3, "by_head": [1.5, 0.25, 0.0, 0.0], "bias_term": 0.25, "pre_activation": 2.0,
         "sources": [[0, 1, 1.25], [1, 2, 0.25]], "top_source": 1, "matched_prefix": 0},
        {"position": 1, "by_head": [0.25, 0.0, 0.0, 0.0], "bias_term": 0.25, "pre_activation": 0.5,
         "sources": [[0, 1, 0.25]], "top_source": 1, "matched_prefix": 0},
    ],
}  # fmt: skip


@pytest.fixture
def live(monkeypatch):
    """Live calls that were made; answered from here."""
    made = []

    def ask(settings, call, given):
        made.append((call, given))
        if given["text"] == "fail":
            raise LiveError("the weights of SAE 'x' are not on this machine")
        if call == "features_on_text":
            one = {"feature": 3, "activation": 2.0, "position": 3, "active": [[1, 0.5], [3, 2.0]]}
            other = {"feature": 9, "activation": 1.0, "position": 2, "active": [[2, 1.0]]}
            return {**ANSWER, "saes": {sae["name"]: [one, other] for sae in given["saes"]}}
        return ANSWER

    monkeypatch.setattr("app.live.ask_live", ask)
    monkeypatch.setattr("app.live.prepare", lambda settings, given: made.append(("warm", given)))
    return made


def test_a_typed_text_in_the_feature_view(atlas, live):
    at = show("feature", sae=Z0, feature="3", text="first words")
    data = COMPONENTS["own examples"]
    assert [one["p"] for one in data["examples"]] == [3, 1]
    first = data["examples"][0]
    assert (first["a"], first["miss"], first["dfa"]["src"]) == (2.0, None, [[0, 1, 1.25], [1, 2, 0.25]])
    assert first["dfa"]["sum"] + first["dfa"]["bias"] == first["dfa"]["pre"]
    assert [data["texts"][place] for place in first["t"]] == ANSWER["texts"]
    assert any("It fires on 2 of 3 tokens" in c.value for c in at.caption)
    kinds = [call for call, _ in live]
    assert kinds == ["warm", "feature_on_text"]
    given = live[1][1]
    assert (given["model"]["name"], given["sae"]["name"], given["feature"]) == (MODEL, Z0, 3)


def test_a_text_through_all_layers(atlas, live):
    at = show("try", text="second words")
    groups = COMPONENTS["on text"]["groups"]
    assert [group["title"] for group in groups] == [one["name"] for one in live[0][1]["saes"]]
    assert [row["feature"] for row in groups[0]["rows"]] == [3, 9]
    assert groups[0]["rows"][0]["href"].endswith("text=second+words")
    at.button_group(key="try_token").set_value(2).run()
    assert [row["feature"] for row in COMPONENTS["on text"]["groups"][0]["rows"]] == [9]


def test_what_cannot_be_answered_is_said(atlas, live):
    for view in ("try", "feature"):
        at = show(view, text="fail")
        assert "are not on this machine" in at.error[0].value


def test_nothing_is_asked_before_a_text_is_there(atlas, live):
    show("feature", sae=Z0, feature="3")
    assert live == []


def test_ranges_read_back():
    for text in ("density:..0.01", "n_active:5..", "dfa_local:0.25..0.5", "bias:-1..1"):
        assert write_range(*search_state.read_range(text)) == text


# ---------------------------------------------------------------- guesses about a feature


@pytest.fixture
def plotted(monkeypatch):
    tables = {}
    monkeypatch.setattr("app.charts.draw", lambda data, spec, height, key, alt: tables.update({key: data}))
    return tables


@pytest.mark.parametrize("guess", [{"proxy": "(?s).+?"}, {"proxysql": "true"}])
def test_a_guess_that_always_holds_has_a_precision_of_one(atlas, plotted, guess):
    at = show("feature", sae=Z0, feature="3", **guess)
    assert "100 %" in words(at)
    shares = plotted["kept_spec"]["share"].to_pylist()
    assert len(shares) > 3
    assert set(shares) == {1.0}
    assert "proxy examples" not in COMPONENTS


def test_a_guess_that_never_holds_shows_false_positives(atlas, plotted):
    at = show("feature", sae=Z0, feature="3", proxy="no such text anywhere")
    assert set(plotted["kept_spec"]["share"].to_pylist()) == {0.0}
    assert "0 of " in words(at)
    wrong = COMPONENTS["proxy examples"]["examples"]
    assert len({(one["b"], one["p"]) for one in wrong}) == len(wrong) > 3
    assert [one["a"] for one in wrong] == sorted((one["a"] for one in wrong), reverse=True)


def test_a_guess_that_cannot_be_read_is_said(atlas):
    assert "cannot be read" in show("feature", sae=Z0, feature="3", proxy="(").error[0].value
    assert "colour" in show("feature", sae=Z0, feature="3", proxysql="colour = 1").error[0].value


def test_a_guess_measured_on_whole_blocks(atlas, plotted, monkeypatch):
    calls = []

    def ask(settings, call, given):
        calls.append(call)
        return {"active": [[[2, 1.0], [5, 3.0]] for _ in given["blocks"]]}

    monkeypatch.setattr("app.live.ask_live", ask)
    at = show("feature", sae=Z0, feature="3", proxysql="position IN (5, 6)")
    at.button_group(key="proxy_size").set_value(64).run()
    assert not at.exception
    assert set(calls) == {"feature_on_blocks"}
    said = words(at)
    assert "<b>50 %</b>" in said, "of its firing tokens, and of the tokens on which the guess holds"
    assert "<b>75 %</b>" in said, "of its activation"
    assert {one["p"] for one in COMPONENTS["proxy examples"]["examples"]} == {6}


# ---------------------------------------------------------------- side by side


def test_two_heads_side_by_side(atlas):
    at = show("compare", one="L0H1", other="L0H2")
    assert [group["title"] for group in COMPONENTS["compared"]["groups"]] == ["L0H1", "L0H2"]
    numbers = at.dataframe[0].value
    assert numbers.shape[1] == 4
    assert (numbers["difference"].dropna() != 0).any()
    at.selectbox(key="compare_other").set_value("L1H3").run()
    assert COMPONENTS["compared"]["groups"][1]["title"] == "L1H3"


def test_two_saes_side_by_side(atlas, plotted):
    other = Z0.replace("L00", "L01")
    at = show("compare", sae=Z0, sae2=other)
    assert not at.error
    assert set(plotted["densities"]["sae"].to_pylist()) == {Z0, other}
    assert "variance explained" in list(at.dataframe[0].value.iloc[:, 0])


def test_a_head_that_does_not_exist_is_named(atlas):
    assert "L9H9" in show("compare", one="L9H9").error[0].value


def test_a_release_that_lacks_a_column_is_said_plainly(atlas, monkeypatch):
    import duckdb

    def old(*_):
        raise duckdb.BinderException('Binder Error: column "top_token" not found\nLINE 1: SELECT')

    monkeypatch.setattr("app.views.search.found", old)
    (error,) = show("search").error
    said = error.value.replace("\\", "")
    assert "made by another version" in said
    assert "top_token" in said
    assert "LINE 1" not in said
