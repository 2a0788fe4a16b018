"""The main job end to end on the bundled docs-2l: tables, identities, resuming, determinism."""

import json
import os
import shutil
import signal
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from atlas.configs import AnalysisConfig, BuildConfig, SitesConfig
from atlas.db.runs import list_runs
from atlas.errors import Cancelled, ConfigError, ConflictError, StoreError
from atlas.pipeline import attributing
from atlas.pipeline.execute import is_complete, is_current, is_sound, output_of, run_step, waiting_for
from atlas.pipeline.local import run_local
from atlas.pipeline.plan import make_plan
from atlas.settings import load_settings
from atlas.store.atomic import lock
from atlas.store.connection import open_release
from atlas.store.release import current
from atlas.tables import TABLES
from tests.builds import SMALL, SMALL_TOML, Quiet, build, settings_at, table_digests
from tests.servers import wait_until
from tests.test_workers_build import ATLAS, atlas, holding


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("built")
    build(path)
    return path


@pytest.fixture(scope="module")
def con(home):
    with open_release(current(home / "releases", "docs-2l").path) as connection:
        yield connection


def rows(con, sql):
    return con.execute(sql).fetchall()


OF_OTHER_BUILDS = (
    "pruning",
    "sae_stages",
    "qk_partners",
    "qk_products",
    "position_products",
    *(
        f"qk_{name}"
        for name in ("heads", "targets", "curves", "prompts", "outcomes", "scans", "feature_pairs")
    ),
)


def test_every_table_has_rows(con):
    for name in TABLES:
        there = rows(con, f"SELECT count(*) FROM {name}")[0][0] > 0
        assert there == (name not in OF_OTHER_BUILDS), name


def test_toml_is_the_same_build(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL_TOML)
    assert BuildConfig.from_toml(path) == SMALL


def test_dfa_over_heads_plus_bias_is_the_preactivation(con):
    worst = rows(
        con,
        # by_head is stored in 12 bits of its largest value, which may be far above the sum; and what is
        # added up in float32 is only as exact as its largest part.
        "SELECT max(abs(list_sum(by_head) + bias_term - pre_activation)"
        " / greatest(abs(pre_activation), list_max(by_head), -list_min(by_head), 1e-2)),"
        " max(abs(pre_activation - activation)"
        " / greatest(activation, abs(bias_term), list_max(by_head), -list_min(by_head))), count(*)"
        " FROM dfa JOIN examples USING (sae, feature, example_group, rank)",
    )[0]
    assert worst[0] < 12 * 2.0**-12
    assert worst[1] < 5e-6
    assert (
        worst[2]
        == rows(con, "SELECT count(*) FROM examples WHERE example_group <> 'negative'")[0][0]
        == rows(con, "SELECT count(*) FROM dfa")[0][0]
    )


def test_stored_sources_are_the_dense_ones(home, con):
    """The dense head x source matrix, recomputed from the model, sums to by_head and holds the sources."""
    from atlas.analysis.contributions import contributions
    from atlas.configs import ModelConfig
    from atlas.corpus.tokens import TokenStore
    from atlas.lm.hooks import capture
    from atlas.lm.load import load_model
    from atlas.sae.files import load_sae

    settings = settings_at(home)
    plan = make_plan(SMALL, settings)
    model = load_model(ModelConfig("docs-2l"), torch.device("cpu"))
    store = TokenStore(output_of(plan.step("tokens"), settings))
    found = rows(
        con,
        "SELECT sae, feature, block, position, by_head, sources, unit FROM dfa JOIN examples"
        " USING (sae, feature, example_group, rank) ORDER BY hash(feature, block) LIMIT 40",
    )
    for name, feature, block, position, by_head, sources, unit in found:
        index = plan.sae_names.index(name)
        sae = load_sae(output_of(plan.step("train"), settings) / f"{index:05d}")
        layer = sae.info.site.layer
        hooks = [f"blocks.{layer}.attn.hook_{what}" for what in ("pattern", "v")]
        _, raw = capture(model, torch.from_numpy(store.blocks([block])), (), hooks)
        W = sae.W_enc[:, feature].reshape(1, 8, -1)
        dense = contributions(raw[hooks[0]][0], raw[hooks[1]][0], W, torch.tensor([position]))[0].double()
        scale = dense.abs().sum().item()
        assert np.allclose(dense.sum(1).numpy(), by_head, atol=1e-4 * scale)
        assert len(sources) <= 32
        stored = [abs(s["weight"]) * unit for s in sources]
        assert stored == sorted(stored, reverse=True)
        for s in sources:
            assert abs(dense[s["head"], s["source"]].item() - s["weight"] * unit) < 0.51 * unit
        assert len(sources) == 32 or sum(stored) >= 0.95 * scale * (1 - 1e-3)


def test_shares_sum_to_one(con):
    for share in ("decoder_share", "fve", "fve_active", "dfa_share", "logit_share"):
        low, high, n = rows(
            con,
            f"SELECT min(s), max(s), count(s) FROM (SELECT sum({share}::DOUBLE) s FROM head_attribution"
            " GROUP BY sae, feature)",
        )[0]
        assert n > 0
        assert abs(low - 1) < 1e-4
        assert abs(high - 1) < 1e-4


def test_saes_beat_zero_and_mean_ablation(con):
    for sae, clean, spliced, zero, mean in rows(
        con, "SELECT sae, ce_clean, ce_spliced, ce_zero, ce_mean FROM sae_metrics WHERE split = 'eval'"
    ):
        if "topk" in sae:
            assert clean < spliced < min(zero, mean), sae


def test_tables_agree_with_each_other(con):
    for scale in ("linear", "log"):
        assert rows(con, "SELECT sum(n_active) FROM features") == rows(
            con, f"SELECT sum(n) FROM activation_histogram WHERE scale = '{scale}'"
        )
    assert rows(con, "SELECT sum(n_active) FROM features") == rows(con, "SELECT sum(n_active) FROM positions")
    assert rows(con, "SELECT count(*) FROM positions WHERE position = 0") == [(0,)]
    assert rows(
        con,
        "SELECT count(*) FROM features f JOIN examples e USING (sae, feature)"
        " WHERE example_group = 'top' AND rank = 0 AND activation <> max_activation",
    ) == [(0,)]
    blocks = rows(con, "SELECT max(len(tokens)), min(len(tokens)), count(*) FROM docs")
    assert blocks == [(64, 64, 40)]


def test_every_head_has_ten_top_features(con):
    found = rows(
        con,
        "SELECT s.layer, a.head, count(*) FROM (SELECT *, row_number() OVER"
        " (PARTITION BY sae, head ORDER BY decoder_share DESC) r FROM head_attribution) a"
        " JOIN saes s USING (sae) WHERE r <= 10 AND architecture = 'topk' GROUP BY ALL",
    )
    assert len(found) == 16
    assert all(n == 10 for _, _, n in found)


def test_nothing_is_done_twice(home):
    settings = settings_at(home)
    plan = make_plan(SMALL, settings)
    assert waiting_for(plan, settings) == []
    assert run_local(plan, settings, Quiet) is None


def test_a_changed_setting_redoes_only_what_depends_on_it(home):
    settings = settings_at(home)
    changed = replace(SMALL, analysis=replace(SMALL.analysis, seed=1))
    kinds = {step.kind for step in waiting_for(make_plan(changed, settings), settings)}
    assert kinds == {"summarise", "dfa", "attribute", "publish"}


def test_more_text_leaves_finished_shards_as_they_are(home):
    """Ten times the text: its first shards are there, and so is everything that made the SAEs."""
    settings = settings_at(home)
    more = replace(SMALL, analysis=replace(SMALL.analysis, blocks=400))
    waiting = {step.name for step in waiting_for(make_plan(more, settings), settings)}
    shards = {name for name in waiting if name.startswith("shard")}
    assert shards == {f"shard-{n:04d}" for n in range(2, 25)}, "blocks 32 to 39 were the end of the last one"
    texts = {name for name in waiting if name.startswith("tokens")}
    assert texts == {"tokens-0001", "tokens-0002", "tokens-0003"}
    assert not {"tokens", "train", "evaluate", "heads", "effects"} & waiting


def test_shards_do_not_change_the_tables(home, tmp_path):
    other = replace(SMALL, analysis=AnalysisConfig(40, shard_blocks=7))
    build(tmp_path, other)
    mine, theirs = table_digests(home), table_digests(tmp_path)
    # These hold sums over shards in float64, which may differ in the last bit; everything else is exact.
    summed = ("head_attribution", "dfa_summary", "dfa_distances", "head_summary")
    assert {k: v for k, v in mine.items() if k not in summed} == {
        k: v for k, v in theirs.items() if k not in summed
    }
    assert {k: mine[k][0] for k in summed} == {k: theirs[k][0] for k in summed}


def test_text_beyond_the_trainings_is_analysed(tmp_path):
    """100 blocks of which 80 are the training's; the first 40 give the same activations as alone."""
    more = replace(SMALL, analysis=replace(SMALL.analysis, blocks=100))
    build(tmp_path, more)
    with open_release(current(tmp_path / "releases", "docs-2l").path) as con:
        assert rows(con, "SELECT count(*), max(block) FROM docs") == [(100, 99)]
        assert rows(con, "SELECT DISTINCT n_tokens FROM saes") == [(6300,)]
        assert rows(con, "SELECT count(*) > 0 FROM examples WHERE block >= 80") == [(True,)]
        assert rows(con, "SELECT max(density - n_active / 6300) FROM features")[0][0] == pytest.approx(0)


def test_ctrl_c_is_clean_and_the_same_command_goes_on(home, tmp_path):
    settings = settings_at(tmp_path)
    plan = make_plan(SMALL, settings)

    class Impatient(Quiet):
        def update(self, done, total, message=""):
            if done >= 16 and "variance" in message:
                raise KeyboardInterrupt

    with pytest.raises(Cancelled, match="goes on from here"):
        run_local(plan, settings, Impatient)
    assert not is_current(plan.step("train"), settings)
    (live,) = settings.steps.glob(".scratch-train-*/live.jsonl")
    seen = [json.loads(line) for line in live.read_text().splitlines()]
    assert {row["sae"] for row in seen if row["table"] == "training_log"} == set(plan.sae_names)
    assert [p.name for p in settings.steps.glob(".work-*")] == []
    assert list_runs(settings)[0].status == "cancelled"
    run_local(plan, settings, Quiet)
    assert list_runs(settings)[0].status == "done"
    assert table_digests(tmp_path) == table_digests(home)


def test_tables_of_an_sae_do_not_depend_on_threads_and_parts(home, tmp_path, monkeypatch):
    """Nor on how many features are attributed at once."""
    monkeypatch.setattr(attributing, "FEATURES_AT_ONCE", 5)
    monkeypatch.setattr(attributing, "PER_PART", 12)
    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    shutil.rmtree(copy / "releases")
    for step in [*copy.glob("steps/summarise-*"), *copy.glob("steps/attribute-*")]:
        shutil.rmtree(step)
    settings = load_settings({"ATLAS_HOME": str(copy), "ATLAS_THREADS": "3"})
    before = torch.get_num_threads()
    try:
        run_local(make_plan(SMALL, settings), settings, Quiet)
    finally:
        torch.set_num_threads(before)
    assert table_digests(copy) == table_digests(home)


def test_dfa_without_the_kept_residual_stream_writes_the_same_bytes(home, tmp_path):
    """A build takes what the corpus pass kept, and leaves none of it; made again, DFA asks the model."""
    kept = home / "residuals"
    assert kept.is_dir()
    assert not [path for path in kept.rglob("*") if path.suffix == ".acts"]
    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    settings = load_settings({"ATLAS_HOME": str(copy), "ATLAS_RESIDUAL_GB": "0"})
    plan = make_plan(SMALL, settings)
    for step in plan.of_kind("dfa"):
        output = output_of(step, settings)
        before = (output / "files.json").read_text()
        shutil.rmtree(output)
        run_step(plan, step.name, settings, Quiet())
        assert (output / "files.json").read_text() == before


def test_what_the_corpus_pass_kept_is_what_dfa_reads(home, tmp_path, monkeypatch):
    """A shard made again keeps its text, and DFA of it does not run the model; neither waits for the disk."""
    flushed = []
    monkeypatch.setattr("atlas.store.atomic.fsync_path", flushed.append)
    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    settings = settings_at(copy)
    plan = make_plan(SMALL, settings)
    for name in ("shard-0001", "dfa-0001"):
        shutil.rmtree(output_of(plan.step(name), settings))
    run_step(plan, "shard-0001", settings, Quiet())
    assert len(list(settings.residuals.glob("*/*.acts"))) == 1
    monkeypatch.setattr("atlas.analysis.second_look.capture", None)
    run_step(plan, "dfa-0001", settings, Quiet())
    assert [path for path in settings.residuals.iterdir() if path.is_dir()] == []
    assert [path for path in flushed if settings.steps in path.parents] == []


def _start(home, toml, program=ATLAS):
    env = os.environ | {"ATLAS_HOME": str(home), "ATLAS_THREADS": "1"}
    options = {"stderr": subprocess.PIPE, "start_new_session": True}
    return atlas(env, "build", str(toml), program=program, **options)


def _kill_in(kind, at, home, toml):
    """Start a build and kill it at the n-th report of a step of this kind."""
    process = _start(home, toml, holding(kind, at))
    wait_until(f"the build reaches {kind}", (home / f"reached-{kind}").exists, process=process)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_kill_9_in_training_and_in_analysis_changes_nothing(home, tmp_path):
    toml = tmp_path / "small.toml"
    toml.write_text(SMALL_TOML)
    killed = tmp_path / "home"
    steps = killed / "steps"
    _kill_in("train", 3, killed, toml)
    assert list(steps.glob(".scratch-train-*/training.safetensors"))
    assert not list(steps.glob("train-*"))
    _kill_in("summarise", 1, killed, toml)
    assert list(steps.glob("shard-*"))
    assert not (killed / "releases").exists()
    last = _start(killed, toml)
    _, errors = last.communicate()
    assert last.returncode == 0, errors.decode()
    assert table_digests(killed) == table_digests(home)
    assert not list(steps.glob(".work-*"))
    assert not list(steps.glob(".scratch-*"))


def test_a_second_process_is_refused(home, tmp_path):
    settings = settings_at(tmp_path)
    plan = make_plan(SMALL, settings)
    folder = plan.step("tokens").folder
    with lock(settings.steps / f".lock-{folder}"), pytest.raises(ConflictError, match="held"):
        run_step(plan, "tokens", settings, Quiet())


def test_a_damaged_output_is_made_anew(tmp_path, home):
    """A file that was cut or removed is noticed, and only what is needed is done again."""
    shutil.copytree(home, tmp_path / "home")
    settings = settings_at(tmp_path / "home")
    plan = make_plan(SMALL, settings)
    name = plan.of_kind("summarise")[0].name
    (output_of(plan.step(name), settings) / "features.parquet").unlink()
    info = current(settings.releases, "docs-2l")
    info.path.chmod(0o644)
    info.path.write_bytes(info.path.read_bytes()[:1000])
    assert [step.name for step in waiting_for(plan, settings)] == [name, "publish"]
    run_local(plan, settings, Quiet)
    assert waiting_for(plan, settings) == []
    assert table_digests(tmp_path / "home") == table_digests(home)


def test_a_lost_shard_is_redone_alone(tmp_path, home):
    """A shard whose stored activations were altered, and everything that was made from it, gone."""
    shutil.copytree(home, tmp_path / "home")
    settings = settings_at(tmp_path / "home")
    plan = make_plan(SMALL, settings)
    made_from_it = [plan.of_kind(kind) for kind in ("summarise", "dfa", "attribute", "publish")]
    for step in (step for steps in made_from_it for step in steps):
        shutil.rmtree(output_of(step, settings))
    (output_of(plan.step("shard-0001"), settings) / "acts-00001" / "value.npy").unlink()
    waiting = [step.name for step in waiting_for(plan, settings)]
    assert [name for name in waiting if name.startswith(("shard", "train", "effects"))] == ["shard-0001"]
    run_local(plan, settings, Quiet)
    assert table_digests(tmp_path / "home") == table_digests(home)


def test_an_altered_shard_is_noticed(tmp_path, home):
    """A flipped bit, which no file size shows, is an error that names the file and not a wrong table."""
    shutil.copytree(home, tmp_path / "home")
    settings = settings_at(tmp_path / "home")
    plan = make_plan(SMALL, settings)
    summary = plan.of_kind("summarise")[1]
    shutil.rmtree(output_of(summary, settings))
    path = output_of(plan.step("shard-0001"), settings) / "acts-00001" / "value.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"was changed on the disk \(acts-00001/value.npy\)"):
        run_step(plan, summary.name, settings, Quiet())


def test_an_output_of_the_right_size_is_not_taken_for_sound(tmp_path, home):
    """As a power cut may leave it: before it is shared, its content is looked at."""
    folder = next(home.glob("steps/shard-*"))
    shutil.copytree(folder, tmp_path / folder.name)
    shutil.copytree(folder, tmp_path / "spoiled")
    path = next((tmp_path / "spoiled").glob("acts-00000/token*"))
    path.write_bytes(bytes(path.stat().st_size))
    assert is_complete(tmp_path / "spoiled")
    assert not is_sound(tmp_path / "spoiled")
    assert is_sound(tmp_path / folder.name)


def test_other_sites_build_too(tmp_path):
    """Single-head q and k, and residual sites, give every table that makes sense for them."""
    sites = SitesConfig(("q", "k", "attn_out"), (1,), (0, 3))
    config = replace(SMALL, sites=sites, sae=SMALL.sae[:1], release="others")
    build(tmp_path, config)
    with open_release(current(tmp_path / "releases", "others").path) as con:
        names = [r[0] for r in rows(con, "SELECT sae FROM saes ORDER BY sae")]
        assert names == [
            "docs-2l/L01.H00.k.topk-96",
            "docs-2l/L01.H00.q.topk-96",
            "docs-2l/L01.H03.k.topk-96",
            "docs-2l/L01.H03.q.topk-96",
            "docs-2l/L01.attn_out.topk-96",
        ]
        assert rows(con, "SELECT DISTINCT sae FROM dfa") == [("docs-2l/L01.attn_out.topk-96",)]
        worst = (
            "SELECT max(abs(list_sum(by_head) + bias_term - pre_activation)"
            " / greatest(abs(pre_activation), list_max(by_head), -list_min(by_head), 1e-2)) FROM dfa"
        )
        assert rows(con, worst)[0][0] < 12 * 2.0**-12
        assert rows(con, "SELECT count(DISTINCT sae) FROM logit_effects") == [(1,)]
        pairs = rows(con, "SELECT DISTINCT sae, other_sae FROM qk_partners ORDER BY ALL")
        assert pairs == [(names[i], names[j]) for i, j in ((0, 1), (1, 0), (2, 3), (3, 2))]
        assert rows(con, "SELECT count(DISTINCT sae), count(*) FROM position_products") == [(4, 4 * 96)]
        assert rows(con, "SELECT count(DISTINCT sae), count(*) FROM qk_products") == [(2, 2 * 96)]
        assert rows(con, "SELECT count(*) FROM head_attribution") == [(0,)]
        assert (
            rows(con, "SELECT count(*) FROM sae_metrics WHERE ce_spliced < ce_zero AND split = 'eval'")[0][0]
            >= 4
        )


def test_two_saes_of_one_name_are_refused(tmp_path):
    config = replace(SMALL, sae=(SMALL.sae[0], SMALL.sae[0]))
    with pytest.raises(ConfigError, match="label"):
        make_plan(config, settings_at(tmp_path))
