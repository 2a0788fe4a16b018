"""Every check of ``atlas verify`` holds on a sound release and names the one thing that was broken."""

import re
import shutil

import duckdb
import pytest
from click.testing import CliRunner

from atlas.cli import cli
from atlas.errors import StoreError
from atlas.store import release
from atlas.store.checks import CHECKS
from atlas.store.packing import is_packed
from atlas.store.verify import names, run_check, verify
from atlas.tables import F32, F64, TABLES
from tests.reference import PROCESSINGS
from tests.reference_release import release as reference_release
from tests.synthetic import build_synthetic_release

SIZE = {"seed": 2, "n_layers": 2, "n_heads": 3, "d_sae": 24, "n_blocks": 16, "context": 24}
CONTENT = [f"{name}.content" for name in TABLES]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return build_synthetic_release(tmp_path_factory.mktemp("releases"), **SIZE)


def unpack(connection):
    """Views of packed tables as tables with the same rows, which can be changed."""
    for name in (table.name for table in TABLES.values() if is_packed(table)):
        connection.execute(f"CREATE TABLE changeable AS FROM {name}")
        connection.execute(f"DROP VIEW {name}")
        connection.execute(f"ALTER TABLE changeable RENAME TO {name}")


@pytest.fixture(scope="module")
def writable(sound, tmp_path_factory):
    """A connection to a copy; each test breaks it inside a transaction that is rolled back."""
    path = tmp_path_factory.mktemp("copy") / "copy.duckdb"
    shutil.copy(sound, path)
    connection = duckdb.connect(str(path))
    unpack(connection)
    yield connection
    connection.close()


@pytest.fixture
def copy(sound, tmp_path):
    path = tmp_path / "copy.duckdb"
    shutil.copy(sound, path)
    return path


def first(table, condition="true"):
    """A condition that holds for the first row by key of those that meet ``condition``."""
    key = ", ".join(TABLES[table].key)
    return f"({key}) = (SELECT ({key}) FROM {table} WHERE {condition} ORDER BY {key} LIMIT 1)"


def change(table, what, condition="true"):
    return f"UPDATE {table} SET {what} WHERE {first(table, condition)}"


def drop(table, condition="true"):
    return f"DELETE FROM {table} WHERE {first(table, condition)}"


def generic(name):
    """How to break a check that many tables have, from its name."""
    table, what = name.split(".")
    if what == "numbers":
        column = next(c.name for c in TABLES[table].columns if c.type in (F32, F64))
        return change(table, f"{column} = 'nan'")
    if what == "rank":
        return drop(table, "rank = 0")
    return {
        "feature": change(table, "feature = 9999"),
        "sae": change(table, "sae = 'nobody'"),
        "model": change(table, "model = 'nobody'"),
        "token": change(table, "token = 100000"),
        "head": change(table, "head = 3"),
        "other": change(table, "other = 9999"),
    }.get(what, "")


DFA_SUM = "by_head = list_transform(by_head, lambda x: x + 1)"
BREAK = {
    "features.top_head": change("features", "top_head = -1", "top_head IS NOT NULL"),
    "dfa.top_head": change("dfa", "top_head = 3"),
    "saes.head": change("saes", "layer = 2"),
    "head_scores.head": change("head_scores", "layer = -1"),
    "head_scores.range": change("head_scores", "value = 1.1", "score = 'induction'"),
    "head_scores.eigenvalues": change("head_scores", "score = 'copying', value = -1.1"),
    "head_spectra.values": change("head_spectra", "effective_rank = 0.9"),
    "head_spectra.eigenvalues": change("head_spectra", "eigenvalues_imag = eigenvalues_imag[2:]"),
    "head_prefixes.attention": change("head_prefixes", "attention = -0.1"),
    "head_text_prefixes.n": change("head_text_prefixes", "n = n + 1"),
    "head_corruption.range": change("head_corruption", "n_attended = n + 1"),
    "tasks.heads": drop("head_task_effects"),
    "head_task_effects.task": change("head_task_effects", "ablation = 'half'"),
    "features.top_token": change("features", "top_token = -1", "alive"),
    "features.top_previous_token": change("features", "top_previous_token = -1", "alive"),
    "examples.block": change("examples", "block = 16"),
    "examples.position": change("examples", "position = 0"),
    "docs.tokens": change("docs", "tokens = tokens[:3] || [100000] || tokens[5:]"),
    "vocab.complete": drop("vocab"),
    "features.complete": drop("features"),
    "qk_products.other_sae": change("qk_products", "products = products[2:]"),
    "head_attribution.decoder_share": change("head_attribution", "decoder_share = decoder_share + 0.01"),
    "head_attribution.fve": change("head_attribution", "fve = fve + 0.01", "fve IS NOT NULL"),
    "head_attribution.fve_active": change("head_attribution", "fve_active = NULL", "fve_active IS NOT NULL"),
    "head_attribution.dfa_share": change("head_attribution", "dfa_share = -dfa_share", "dfa_share > 0.1"),
    "head_attribution.logit_share": change("head_attribution", "logit_share = logit_share + 0.01"),
    "head_attribution.heads": drop("head_attribution"),
    "features.density": change("features", "density = density * 1.01", "alive"),
    "token_index.rows": change("token_index", "score = score + 1"),
    "example_places.rows": drop("example_places"),
    "activation_counts.n": change("activation_counts", "n = list_transform(n, lambda x: x + 1)"),
    "activation_counts.bins": change("activation_counts", "n = n || [0]"),
    "position_counts.lists": change(
        "position_counts", "position = list_reverse(position)", "len(position) > 1"
    ),
    "position_counts.n_active": change(
        "position_counts", "n_active = list_transform(n_active, lambda x: x + 1)"
    ),
    "position_counts.n_top": change("position_counts", "n_top = list_transform(n_top, lambda x: x + 1)"),
    "position_counts.sum_activation": change(
        "position_counts", "sum_activation = list_transform(sum_activation, lambda x: x * 2)"
    ),
    "token_stats.precision": change("token_stats", "precision = precision / 2"),
    "token_stats.share": change("token_stats", "precision = 1"),
    "dfa_distances.share": drop("dfa_distances", "share > 0.01"),
    "dfa_summary.distances": change("dfa_summary", "local = 1 - local"),
    "dfa_tokens.share": change("dfa_tokens", "share = share + 1"),
    "dfa_summary.n": change("dfa_summary", "n = n + 1"),
    "logit_histogram.n": change("logit_histogram", "n = n[:39]"),
    "sae_metrics.alive": change("sae_metrics", "alive = alive + 1"),
    "pruning.n_pruned": change("pruning", "n_short_rare = n_short_rare + 1"),
    "training_density.n": drop("training_density"),
    "head_summary.n_top": change("head_summary", "n_top = n_top + 1"),
    "examples.strongest_first": change("examples", "activation = activation / 2", "example_group = 'top'"),
    "token_stats.strongest_first": change("token_stats", "sum_activation = 0"),
    "logit_effects.strongest_first": change("logit_effects", "value = 0"),
    "head_logit_effects.strongest_first": change("head_logit_effects", "value = 0"),
    "neighbours.strongest_first": change("neighbours", "cosine = -1"),
    "coactivation.strongest_first": change("coactivation", "jaccard = 0"),
    "qk_partners.strongest_first": change("qk_partners", "product = -9"),
    "qk_feature_pairs.strongest_first": change("qk_feature_pairs", "contribution = -9"),
    "qk_targets.k_feature": change("qk_targets", "k_feature = 24"),
    "qk_targets.q_feature": change("qk_targets", "q_feature = -1"),
    "qk_prompts.k_feature": change("qk_prompts", "k_feature = 24"),
    "qk_scans.q_feature": change("qk_scans", "feature = 24", "side = 'q'"),
    "qk_scans.k_feature": change("qk_scans", "feature = 24", "side = 'k'"),
    "qk_feature_pairs.q_feature": change("qk_feature_pairs", "q_feature = 24"),
    "qk_feature_pairs.k_feature": change("qk_feature_pairs", "k_feature = 24"),
    "qk_heads.counts": change("qk_heads", "n_diagonal = q_positional + 1"),
    "qk_curves.range": change("qk_curves", "attention = 1.5", "attention IS NOT NULL"),
    "qk_prompts.pattern": change("qk_prompts", "pattern = pattern[:10]"),
    "qk_prompts.places": change("qk_prompts", "source = 0"),
    "qk_outcomes.range": change("qk_outcomes", "log_prob = 0.5"),
    **{f"qk_{name}.saes": change(f"qk_{name}", "k_sae = q_sae")
       for name in ("heads", "targets", "curves", "prompts", "outcomes", "scans", "feature_pairs")},
    "dfa_tokens.strongest_first": change("dfa_tokens", "share = 0"),
    "examples.quantiles": change("examples", "activation = 99", "example_group = 'q3'"),
    "head_attribution.range": change("head_attribution", "dfa_bos = 1.1"),
    "dfa_summary.range": change("dfa_summary", "same_token = -0.1"),
    "features.range": change("features", "top_position_share = 1.5"),
    "features.cosine": change("features", "encoder_decoder_cosine = -1.1"),
    "neighbours.cosine": change("neighbours", "cosine = 1.1"),
    "coactivation.range": change("coactivation", "jaccard = 1.1"),
    "coactivation.pearson": change("coactivation", "pearson = -1.1"),
    "features.alive": change("features", "alive = NOT alive"),
    "features.quantiles": change("features", "quantiles = list_reverse(quantiles)", "n_active > 1"),
    "features.top_pair_share": change("features", "top_token_share = top_pair_share / 2", "alive"),
    "features.top_share": change("features", "top_head = (top_head + 1) % 3", "top_head IS NOT NULL"),
    "features.strongest": change("features", "max_activation = max_activation * 1.5", "alive"),
    "activation_counts.edges": change("activation_counts", "low = high + 1"),
    "examples.fires": change("examples", "near_miss = 1", "example_group = 'top'"),
    "examples.active": change("examples", "active_positions = [position]", "len(active_positions) > 1"),
    "examples.blocks": "UPDATE examples e SET block = (SELECT block FROM examples o WHERE o.sae = e.sae AND "
    "o.feature = e.feature AND o.example_group = 'top' AND o.rank = 0) WHERE "
    + first("examples", "example_group = 'top' AND rank = 1"),
    "logit_histogram.range": change("logit_histogram", "high = high * 1.1"),
    "position_products.centred": change("position_products", "centred = products"),
    "dfa.sum": change("dfa", DFA_SUM),
    "dfa.top": change("dfa", "top_head = NULL", "top_head IS NOT NULL"),
    "dfa.examples": drop("dfa", "example_group = 'q5'"),
    "dfa.activation": change("dfa", "pre_activation = pre_activation * 1.1"),
    "dfa.sources": change("dfa", "sources = list_reverse(sources)", "example_group = 'top'"),
    "dfa.stored": change("dfa", "top_head = (top_head + 1) % 3", "example_group = 'top'"),
    "dfa.left_out": change("dfa", "unit = unit * 2", "example_group = 'top' AND len(sources) < 32"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_each_check_names_what_was_broken(writable, name):
    assert run_check(writable, CHECKS[name]).ok
    statement = BREAK.get(name) or generic(name)
    assert statement, f"no way to break {name} is written down here"
    writable.execute("BEGIN")
    try:
        writable.execute(statement)
        found = run_check(writable, CHECKS[name])
    finally:
        writable.execute("ROLLBACK")
    assert found.offending >= 1
    assert found.looked_at > 0
    assert f"{CHECKS[name].key[0]}=" in found.first
    assert ": found " in found.first


@pytest.mark.parametrize(
    ("name", "statement", "found"),
    [
        ("dfa.examples", drop("examples", "example_group = 'top'"), "no example that fires"),
        ("dfa.examples", change("dfa", "top_source = 30"), "source 30 of position"),
        ("dfa.examples", change("dfa", "matched_prefix = 3, top_source = 0"), "source 0 of position"),
        ("dfa.top", change("dfa", "matched_prefix = 20"), "20"),
        ("dfa.sources", change("dfa", "sources = sources[1:1] || sources", "example_group = 'top'"), ""),
        ("features.top_share", change("features", "top_head = NULL", "top_head IS NOT NULL"), "largest in"),
        ("features.strongest", drop("examples", "example_group = 'top' AND rank = 0"), "first top example 0"),
        ("examples.active", change("examples", "active_values = active_values || [1]"), ""),
        ("examples.active", change("examples", "active_positions = [position]", "near_miss < 9"), ""),
        ("examples.fires", change("examples", "activation = 0", "example_group = 'q9'"), ""),
    ],
)
def test_more_ways_to_break_a_check(writable, name, statement, found):
    writable.execute("BEGIN")
    try:
        (changed,) = writable.execute(statement).fetchone()
        assert changed == 1
        finding = run_check(writable, CHECKS[name])
    finally:
        writable.execute("ROLLBACK")
    assert finding.offending == changed
    assert found in finding.first


def test_every_check_can_be_broken_in_one_way_only_written_down():
    assert set(BREAK) <= set(CHECKS)


@pytest.mark.parametrize("engine", [False, True])
def test_a_sound_release_holds(tmp_path, engine):
    """The engine's SAEs are described but not analysed, which breaks nothing."""
    path = build_synthetic_release(tmp_path, **SIZE | {"seed": 5, "context": 40}, engine=engine)
    found = list(verify(path))
    assert [f.name for f in found] == list(names())
    assert [f for f in found if not f.ok] == []
    looked_at = {f.name: f.looked_at for f in found}
    assert looked_at["features.alive"] == looked_at["features.content"] == 2 * 24 + 2 * 12


def test_a_release_without_analysis_holds(tmp_path):
    info = release.publish(tmp_path, "empty", {}, {"seed": "0"})
    assert [f for f in verify(info.path) if not f.ok] == []


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DELETE FROM position_counts WHERE feature = 3", "rows where the manifest has"),
        ("UPDATE vocab SET text = 'x' WHERE token = 3", "digest [0-9a-f]{12}... where the manifest has"),
        ("INSERT INTO models SELECT * FROM models", "row 1 repeats a key"),
        ("INSERT INTO docs SELECT corpus, block - 99, tokens, source FROM docs LIMIT 1", "is out of order"),
    ],
)
def test_content_is_the_manifests(copy, statement, said):
    table = re.search("position_counts|vocab|models|docs", statement)[0]
    with duckdb.connect(str(copy)) as connection:
        connection.execute(statement)
    found = list(verify(copy, only=CONTENT))
    assert [f.name for f in found if not f.ok] == [f"{table}.content"]
    (broken,) = [f for f in found if not f.ok]
    assert re.search(said, broken.first)


def test_a_number_may_be_rounded_but_not_wrong(copy):
    """Sums of 32-bit shares are allowed their rounding."""
    for change, holds in (("1 + 1e-6", True), ("1.01", False)):
        with duckdb.connect(str(copy)) as connection:
            connection.execute(f"UPDATE head_attribution SET fve = fve * ({change})")
        (found,) = verify(copy, only=["head_attribution.fve"])
        assert found.ok == holds


def run(*words):
    return CliRunner().invoke(cli, ["verify", *words])


def test_command_says_what_is_broken_and_ends_with_1(copy):
    fine = run(str(copy))
    assert fine.exit_code == 0
    assert f"all {len(names())} checks hold" in fine.stdout
    with duckdb.connect(str(copy)) as connection:
        unpack(connection)
        connection.execute(change("features", "density = 2"))
        connection.execute(change("examples", "block = 99"))
    broken = run(str(copy), "--quick", "--broken")
    assert broken.exit_code == 1
    assert "examples.block  " in broken.stdout
    assert re.search(r"features.density +72 +1  BROKEN: density is n_active over", broken.stdout)
    assert re.search(r"first: sae='synthetic/L00.z.topk-24', feature=\d+: found 2.0", broken.stdout)
    assert ".content" not in broken.stdout
    assert "features.content" in run(str(copy)).stdout
    assert run(str(copy), "--only", "features.alive").stdout.endswith("all 1 checks hold\n")


def test_command_finds_releases_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path))
    build_synthetic_release(tmp_path / "releases", "small", **SIZE)
    for words in ([], ["small"], ["small@1"]):
        assert "small-v0001" in run(*words, "--only", "saes.content").stdout
    with pytest.raises(StoreError, match="there is no release 'other'"):
        CliRunner().invoke(cli, ["verify", "other"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (
            "ALTER TABLE docs DROP COLUMN source",
            "table 'docs' has the columns corpus, .*of this version: corpus,",
        ),
        ("DELETE FROM manifest WHERE table_name = 'dfa'", "the release has no table 'dfa'; it is of another"),
    ],
)
def test_another_version_or_a_damaged_file_is_refused(copy, statement, said):
    with duckdb.connect(str(copy)) as connection:
        connection.execute(statement)
    with pytest.raises(StoreError, match=said):
        list(verify(copy))
    copy.write_bytes(copy.read_bytes()[:5000])
    with pytest.raises(StoreError, match="cannot open release"):
        list(verify(copy))


def test_an_unknown_check_names_those_that_exist(sound):
    with pytest.raises(StoreError, match=r"check 'nope' is not known; allowed: models.content, "):
        list(verify(sound, only=["nope"]))


@pytest.mark.parametrize("processing", PROCESSINGS)
def test_what_a_build_makes_of_a_small_model_holds(processing):
    """Every kind of site and architecture, from the pipeline itself."""
    built = reference_release(processing)
    path = release.current(built.settings.releases).path
    assert [f for f in verify(path) if not f.ok] == []
