"""What the app says of a feature's evidence, against the rows of the release read in another way."""

import duckdb
import pyarrow as pa
import pytest

from app import families, state
from app.components.payload import Texts
from app.feature_charts import more_facts
from app.feature_evidence import READS, distance_rows, share_rows
from app.head_facts import summary_facts
from app.related import partner_data, related_data
from app.views import atlas as atlas_view
from app.views.feature import example_data
from atlas.db import annotations
from atlas.db.notes import FeatureAnnotation
from atlas.errors import StoreError
from atlas.settings import load_settings
from atlas.store import release as releases
from atlas.store.queries import features, heads, overview
from atlas.tables import FAMILY_NAMES, TABLES
from tests.synthetic import build_synthetic_release
from tests.test_app_views import show, words

SIZE = {"n_layers": 2, "n_heads": 4, "d_sae": 32, "n_blocks": 40, "context": 32}
Z0, Z1 = "synthetic/L00.z.topk-32", "synthetic/L01.z.topk-32"
NEAR = (
    "SELECT other_sae, other FROM neighbours WHERE sae = ? AND feature = ? AND direction = ? AND scope = ? \
ORDER BY rank"
)
MISSES = "SELECT sae, feature FROM examples WHERE sae = ? AND example_group = 'negative' ORDER BY ALL LIMIT 1"
EXPANDERS = ("writes", "by head", "related")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    build_synthetic_release(folder / "releases", **SIZE)
    return folder


@pytest.fixture
def settings(home, tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(home))
    monkeypatch.setenv("ATLAS_DATABASE_URL", f"sqlite:///{tmp_path / 'notes.sqlite'}")
    monkeypatch.setenv("ATLAS_ANNOTATOR", "ann")
    return load_settings()


@pytest.fixture
def con(settings):
    with duckdb.connect(str(releases.current(settings.releases).path), read_only=True) as con:
        yield con


@pytest.fixture
def scope(settings):
    release = releases.current(settings.releases)
    with duckdb.connect(str(release.path), read_only=True) as con:
        models, saes = overview.models(con), overview.sae_refs(con)
    return state.Scope(settings, release, models, models[0], saes, None)


def rows_of(con, sql, *values):
    return con.execute(sql, list(values)).fetchall()


def member(con, family):
    """A feature of a family, as SAE and number."""
    return rows_of(
        con, "SELECT sae, feature FROM feature_families WHERE family = ? ORDER BY ALL LIMIT 1", family
    )[0]


def test_families_are_chips_that_tell_their_rule(settings, con):
    sae, number = member(con, "induction")
    said = words(show("feature", sae=sae, feature=str(number)))
    ((rule,),) = rows_of(con, "SELECT rule FROM families WHERE family = 'induction'")
    chip = said.split('class="ha-chips"')[1].split("</div>")[0]
    assert ">induction</span>" in chip
    assert rule.replace(">", "&gt;") in chip
    ((lonely, sae),) = rows_of(
        con, "SELECT feature, sae FROM features WHERE alive AND (sae, feature) NOT IN "
        "(SELECT (sae, feature) FROM feature_families) ORDER BY ALL LIMIT 1"
    )  # fmt: skip
    assert "in no family" in words(show("feature", sae=sae, feature=str(lonely)))


def test_a_release_without_rules_has_no_chips():
    assert families.chips(["dead"], {}) == ""
    assert "in no family" in families.chips([], {"dead": "never"})


def test_expanders_ask_nothing_until_they_are_opened(settings):
    at = show("feature", sae=Z1, feature="3")
    assert not at.dataframe
    for key in EXPANDERS:
        at.session_state[key] = True
    at.run()
    assert not at.exception
    assert at.dataframe[0].value["decoder_share"].sum() == pytest.approx(1, abs=1e-4)
    assert "promotes" in words(at)
    assert "kurtosis" in words(at)


@pytest.mark.parametrize("sae", ["synthetic/L01.H00.q.relu-16", "synthetic/L01.H00.k.relu-16"])
def test_sites_without_a_table_open_with_everything_unfolded(settings, con, sae):
    at = show("feature", sae=sae, feature="0")
    for key in (*EXPANDERS, "centred", "log_scale"):
        at.session_state[key] = True
    at.run()
    assert not at.exception
    assert not at.error


def test_dead_features_have_a_page(settings, con):
    sae, number = member(con, "dead")
    at = show("feature", sae=sae, feature=str(number))
    for key in EXPANDERS:
        at.session_state[key] = True
    at.run()
    assert not at.exception
    assert "Where it reads from" not in words(at)


def test_where_it_reads_from_is_the_row_of_the_table(settings, con):
    sae, number, n, distance = rows_of(
        con, "SELECT sae, feature, n, distance FROM dfa_summary WHERE n > 5 ORDER BY ALL LIMIT 1"
    )[0]
    said = words(show("feature", sae=sae, feature=str(number)))
    assert f"positive DFA over its {n} strongest examples" in said
    assert f"{distance:.3g} tokens back on average" in said


def test_share_rows_leave_out_what_is_not_known():
    summary = dict.fromkeys(READS, 0.25) | {"local": None}
    rows = share_rows(summary).to_pylist()
    assert [row["name"] for row in rows] == [f"{told}  25 %" for key, told in READS.items() if key != "local"]
    assert all(row["share"] == 0.25 and row["meaning"] for row in rows)
    assert share_rows(dict.fromkeys(READS)).num_rows == 0


def test_distances_are_named_by_their_bins_and_negative_ones_point_down():
    bins = pa.table(
        {"low": [-1, 0, 3], "high": [-1, 0, 4], "share": [0.5, 0.2, 0.3], "negative": [0.1, 0, 1]}
    )
    rows, labels = distance_rows(bins)
    assert labels == ["BOS", "0", "3–4"]
    assert [(r["bin"], r["kind"], r["value"]) for r in rows.to_pylist()] == [
        ("BOS", "for", 0.5), ("BOS", "against", -0.1), ("0", "for", 0.2), ("0", "against", 0),
        ("3–4", "for", 0.3), ("3–4", "against", -1),
    ]  # fmt: skip


def test_facts_leave_out_what_a_feature_has_not():
    empty = {column.name: None for column in TABLES["features"].columns}
    assert more_facts(empty, ()) == []
    row = empty | {"loss_effect": 0.5, "n_loss": 1200, "top_token": 1, "top_token_share": 0.25,
                   "top_position": 7, "top_position_share": 0.5, "effective_positions": 3.0,
                   "top_pair_share": 0.125}  # fmt: skip
    assert more_facts(row, ("a", "·b")) == [
        ("loss if ablated", "+0.5 nats, over 1,200 tokens"),
        ("effective positions", "3"),
        ("commonest position", "7, 50 %"),
        ("commonest token", "·b  25 %"),
        ("commonest pair", "12.5 %"),
    ]


def test_related_features_are_neighbours_and_coactive_ones(scope, con, settings):
    sae, number, other = rows_of(con, "SELECT sae, feature, other FROM coactivation WHERE sae = ? "
                                      "ORDER BY feature, rank LIMIT 1", Z1)[0]  # fmt: skip
    annotations.save_feature(settings, FeatureAnnotation(sae, other, "bea", label="hers"), 0)
    ref = features.find_sae(scope.saes, sae)
    groups = {group["title"]: group for group in related_data(scope, ref, number)["groups"]}
    for (direction, near), title in (
        (("decoder", "within"), "Decoder, same SAE"), (("encoder", "within"), "Encoder, same SAE"),
        (("decoder", "across"), "Decoder, other SAEs"), (("encoder", "across"), "Encoder, other SAEs"),
    ):  # fmt: skip
        expected = rows_of(con, NEAR, sae, number, direction, near)
        found = groups[title]["rows"] if expected else []
        assert [(row["sae"] or sae, row["feature"]) for row in found] == expected
    together = groups["Fires together with"]["rows"]
    expected = rows_of(con, "SELECT other, n_both FROM coactivation WHERE sae = ? AND feature = ? "
                            "ORDER BY rank", sae, number)  # fmt: skip
    assert [(row["feature"], row["values"][0]) for row in together] == [(o, f"{n:,}") for o, n in expected]
    assert together[0]["label"] == "hers"
    assert f"feature={other}" in together[0]["href"]
    ((density, token),) = rows_of(
        con, "SELECT density, top_token FROM features WHERE sae = ? AND feature = ?", sae, other
    )
    assert together[0]["density"] == density
    assert together[0]["token"] == Texts(overview.vocabulary(con, "synthetic")).text(token)


def test_partners_are_the_largest_products(scope, con):
    query, key = "synthetic/L01.H00.q.relu-16", "synthetic/L01.H00.k.relu-16"
    data = partner_data(scope, features.find_sae(scope.saes, query), key, 2)
    expected = rows_of(con, "SELECT other FROM qk_partners WHERE sae = ? AND other_sae = ? AND feature = 2 "
                            "ORDER BY product DESC, other", query, key)  # fmt: skip
    assert [(row["feature"],) for row in data["groups"][0]["rows"]] == expected
    assert partner_data(scope, features.find_sae(scope.saes, Z0), key, 2)["groups"] == []


def test_near_misses_carry_their_pre_activation(scope, con):
    sae, number = rows_of(con, MISSES, Z0)[0]
    ref = features.find_sae(scope.saes, sae)
    row = {"max_activation": 1.0}
    shown = example_data(scope, ref, number, row)["examples"]
    groups = [one["g"] for one in shown]
    assert groups.index("top") < groups.index("random") < groups.index("negative")
    expected = rows_of(con, "SELECT near_miss FROM examples WHERE sae = ? AND feature = ? AND "
                            "example_group = 'negative' ORDER BY rank", sae, number)  # fmt: skip
    misses = [one for one in shown if one["g"] == "negative"]
    assert [one["miss"] for one in misses] == pytest.approx([value for (value,) in expected], rel=1e-3)
    assert all(one["a"] == 0 and one["dfa"] is None for one in misses)
    assert all(one["miss"] is None for one in shown if one["g"] != "negative")


def test_matched_prefixes_repeat_the_text_before_the_source(scope, con):
    sae, number = member(con, "induction")
    shown = example_data(scope, features.find_sae(scope.saes, sae), number, {"max_activation": 1.0})[
        "examples"
    ]
    matched = [one for one in shown if one["dfa"] and one["dfa"]["match"]]
    assert matched
    for one in matched:
        source, n = one["dfa"]["match"]
        assert one["t"][source - n : source] == one["t"][one["p"] - n + 1 : one["p"] + 1]


@pytest.mark.parametrize("family", [None, "previous_token", "induction"])
def test_top_features_of_a_family(con, family):
    members = set(rows_of(con, "SELECT sae, feature FROM feature_families WHERE family = ?", family))
    shares = rows_of(con, "SELECT sae, feature, decoder_share FROM head_attribution JOIN features "
                          "USING (sae, feature) WHERE sae = ? AND head = 1 AND alive", Z1)  # fmt: skip
    kept = [
        (-share, feature) for sae, feature, share in shares if family is None or (sae, feature) in members
    ]
    found = heads.top_features(con, Z1, 1, "decoder_share", 5, family)
    assert [one.feature for one in found] == [feature for _, feature in sorted(kept)[:5]]


def test_an_unknown_family_is_refused(con):
    with pytest.raises(StoreError, match="family 'magic' is not known"):
        heads.top_features(con, Z1, 1, family="magic")


def test_head_view_shows_its_summary_and_a_family_alone(settings, con):
    top = rows_of(con, "SELECT layer, head, n_top, n_induction FROM head_summary "
                       "ORDER BY n_induction DESC, layer, head LIMIT 1")[0]  # fmt: skip
    at = show("head", head=f"L{top[0]}H{top[1]}")
    assert f"{top[2]} of" in words(at)
    assert f"{top[3]} induction" in words(at)
    box = next(one for one in at.selectbox if one.label == "Family")
    assert "dead" not in box.options
    assert "induction" in box.options
    box.select("positional").run()
    assert not at.exception


def test_summary_facts_leave_out_what_a_head_has_not():
    row = {column.name: None for column in TABLES["head_summary"].columns}
    row |= {"n_top": 0, "n_features": 0, "effective_features": 0.0} | {f"n_{f}": 0 for f in FAMILY_NAMES}
    assert summary_facts(row) == [("features led", "0 of 0 that fire"), ("effective features", "0")]


def test_the_grid_can_be_coloured_by_every_column_of_the_summary(scope, con):
    numbers = atlas_view.head_numbers(scope)
    for name in heads.GRID_METRICS:
        expected = {
            (layer, head): value
            for layer, head, value in rows_of(con, f"SELECT layer, head, {name} FROM head_summary")
            if value is not None
        }
        assert dict(numbers[name].values) == expected
        assert name in atlas_view.SHORT
        data = atlas_view.grid_data(scope, {}, numbers, name, "all")
        assert data["scale"]["unit"] == heads.GRID_METRICS[name]
        assert data["cells"][0]["tip"][2][0] == atlas_view.SHORT[name]


def test_an_address_names_the_colour_by_its_column(settings):
    at = show("atlas", colour="n_induction")
    assert at.selectbox(key="colour").value == "n_induction"
    assert not at.exception


def test_features_that_fire_are_those_of_the_table(con):
    expected = tuple(row[0] for row in rows_of(con, "SELECT feature FROM features WHERE sae = ? AND alive "
                                               "ORDER BY feature", Z1))  # fmt: skip
    assert features.firing(con, Z1) == expected != ()


def test_related_features_of_one_judging_blind_have_ones_own_labels(scope, con, settings):
    sae, number, other = rows_of(con, "SELECT sae, feature, other FROM coactivation WHERE sae = ? "
                                      "ORDER BY feature, rank LIMIT 1", Z1)[0]  # fmt: skip
    for who in ("ann", "bea"):
        annotations.save_feature(settings, FeatureAnnotation(sae, other, who, label=f"of {who}"), 0)
    ref = features.find_sae(scope.saes, sae)

    def together(whose):
        groups = related_data(scope, ref, number, whose)["groups"]
        return next(group["rows"] for group in groups if group["title"] == "Fires together with")

    assert together("bea")[0]["label"] == "of bea"
    assert all(row["label"] == "" and row["families"] == [] for row in together("carl"))
