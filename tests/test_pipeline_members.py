"""Parts, imports, pruning and finetuning as steps of a build on docs-2l."""

import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.configs import FinetuneConfig, PruneConfig, SAEConfig, SitesConfig
from atlas.errors import Cancelled, ConfigError, SAEError
from atlas.pipeline.execute import output_of, run_step, waiting_for
from atlas.pipeline.local import run_local
from atlas.pipeline.members import by_width, deal
from atlas.pipeline.plan import make_plan
from atlas.sae.files import load_sae, save_sae
from atlas.sae.library import folder_of
from atlas.sites import ModelShape, Site, expand_sites
from atlas.store.connection import open_release
from atlas.store.release import current
from tests.builds import REFINED, SMALL, Quiet, build, settings_at, table_digests
from tests.tiny import random_sae

NAME = "docs-2l/L01.z.mine"


def kinds_of(config, home):
    return {step.kind for step in waiting_for(make_plan(config, settings_at(home)), settings_at(home))}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with the build in two parts, pruned and finetuned."""
    path = tmp_path_factory.mktemp("refined")
    build(path, REFINED)
    return path


@pytest.fixture(scope="module")
def con(home):
    with open_release(current(home / "releases", "docs-2l").path) as connection:
        yield connection


def rows(con, sql):
    return con.execute(sql).fetchall()


# ---------------------------------------------------------------- parts


@given(
    st.lists(st.sampled_from(["z", "q", "k", "v", "attn_out"]), min_size=1, max_size=5, unique=True),
    st.integers(1, 4),
    st.sampled_from([None, "all"]),
    st.integers(1, 40),
)
@settings(max_examples=80, deadline=None)
def test_every_site_is_dealt_out_once(kinds, n_layers, heads, parts):
    shape = ModelShape(n_layers, 3, 12, 4, 10, 16)
    sites = expand_sites(kinds, "all", heads, shape)
    dealt = deal(sites, shape, parts)
    assert sorted(site for part in dealt for site in part) == sorted(sites)
    assert len(dealt) == min(parts, len(sites))
    assert all(dealt)
    groups = by_width(sites, shape)
    for part in dealt:
        assert [site for site in sites if site in part] == list(part)
        if parts >= len(groups):
            assert len(by_width(part, shape)) == 1
            (group,) = (g for g in groups if part[0] in g)
            start = group.index(part[0])
            assert group[start : start + len(part)] == list(part)


def test_the_order_of_saes_does_not_depend_on_parts(tmp_path):
    sites = SitesConfig(("z", "q", "attn_out"), "all", None)
    config = replace(SMALL, sites=sites, sae=(SAEConfig(k=4), SAEConfig("relu")))
    plans = [
        make_plan(replace(config, train=replace(SMALL.train, parts=p)), settings_at(tmp_path))
        for p in (1, 2, 5, 1000)
    ]
    assert len({plan.sae_names for plan in plans}) == 1
    assert [len(plan.of_kind("train")) for plan in plans] == [1, 2, 5, 20]
    assert [step.name for step in plans[1].of_kind("train")] == ["train-000", "train-001"]
    assert plans[0].step("train").kind == "train"
    for plan in plans:
        places = [plan.place(i, "trained") for i in range(len(plan.saes))]
        assert len(set(places)) == len(places)
        for sae in plan.saes:
            assert sae.site in plan.parts[plan.step(sae.step).item]


def trained(plan, home):
    """The SAEs as they were trained, by name."""
    places = [plan.place(i, "trained") for i in range(len(plan.saes))]
    folders = [output_of(plan.step(step), settings_at(home)) / folder for step, folder in places]
    found = [load_sae(folder) for folder in folders]
    assert tuple(sae.info.name for sae in found) == plan.sae_names
    return found


def test_parts_that_split_a_bank_change_no_sae(home, tmp_path):
    shutil.copytree(home / "steps", tmp_path / "steps")
    plan = make_plan(SMALL, settings_at(tmp_path))
    run_step(plan, "train", settings_at(tmp_path), Quiet())
    two = make_plan(REFINED, settings_at(home))
    for one, other in zip(trained(plan, tmp_path), trained(two, home), strict=True):
        assert one.info == other.info
        for name, tensor in one.tensors().items():
            assert torch.equal(tensor, other.tensors()[name]), (one.info.name, name)


def test_parts_that_split_no_bank_change_nothing(home, tmp_path):
    """attn_out and q have their own widths, so that two parts hold whole banks: every digest is the same."""
    shutil.copytree(home / "steps", tmp_path / "steps")
    sites = SitesConfig(("q", "attn_out"), (0, 1), (1, 5))
    config = replace(SMALL, sites=sites, train=replace(SMALL.train, tokens=2048))
    digests = []
    for parts in (1, 2):
        plan = make_plan(replace(config, train=replace(config.train, parts=parts)), settings_at(tmp_path))
        for step in plan.of_kind("train"):
            run_step(plan, step.name, settings_at(tmp_path), Quiet())
        assert len(plan.of_kind("train")) == parts
        digests.append({sae.info.name: sae.digest() for sae in trained(plan, tmp_path)})
    assert digests[0] == digests[1]
    assert len(digests[0]) == 12


# ---------------------------------------------------------------- pruning and finetuning


def test_pruned_features_are_counted_marked_and_silent(con):
    assert rows(con, "SELECT count(*) FROM pruning") == [(4,)]
    assert rows(con, "SELECT count(*) FROM pruning WHERE n_pruned > 0 AND n_pruned < n_features")[0][0] >= 2
    assert rows(
        con,
        "SELECT sae, n_weak, n_short, n_rare, n_pruned FROM pruning ORDER BY sae",
    ) == rows(
        con,
        "SELECT sae, count(*) FILTER (pruned & 1 > 0), count(*) FILTER (pruned & 2 > 0),"
        " count(*) FILTER (pruned & 4 > 0), count(*) FILTER (pruned > 0)"
        " FROM features GROUP BY sae ORDER BY sae",
    )
    assert rows(con, "SELECT sum(n_active), bool_or(alive) FROM features WHERE pruned > 0") == [(0, False)]
    assert rows(con, "SELECT count(*) FROM features WHERE pruned = 0 AND n_active > 0")[0][0] > 0


def test_the_last_stage_is_what_every_table_is_about(con):
    assert rows(con, "SELECT count(*), count(DISTINCT (sae, stage)) FROM sae_stages") == [(24, 12)]
    assert rows(
        con,
        "SELECT count(*) FROM sae_metrics m JOIN sae_stages s USING (sae, split, l0, mse, ce_spliced, kl)"
        " WHERE stage = 'finetuned'",
    ) == [(8,)]
    pairs = (
        "SELECT {} FROM sae_stages a JOIN sae_stages b USING (sae, split)"
        " WHERE a.stage = '{}' AND b.stage = '{}' AND split = 'eval'"
    )
    same = "a.l0 = b.l0 AND a.alive = b.alive, b.mse < a.mse, b.l2_ratio > a.l2_ratio"
    for frozen, better, less_suppressed in rows(con, pairs.format(same, "pruned", "finetuned")):
        assert frozen
        assert better
        assert less_suppressed
    assert all(b <= a for a, b in rows(con, pairs.format("a.alive, b.alive", "trained", "pruned")))
    assert all(
        '"prune"' in text and '"finetune"' in text for (text,) in rows(con, "SELECT settings FROM saes")
    )


def test_what_depends_on_what(home):
    """A change of one stage redoes it and what follows, and nothing before."""
    after = {"evaluate", "effects", "shard", "summarise", "dfa", "attribute", "reference", "publish"}
    tuned = replace(REFINED, finetune=FinetuneConfig(tokens=1024))
    assert kinds_of(tuned, home) == {"finetune", *after}
    limits = replace(REFINED, prune=PruneConfig(tokens=999))
    assert kinds_of(limits, home) == {"prune", "finetune", *after}
    train = replace(REFINED.train, activation_dtype="bfloat16")
    assert "train" in kinds_of(replace(REFINED, train=train), home)


def test_the_cache_changes_no_digest(home):
    train = replace(REFINED.train, cache=True, cache_gb=1.5, checkpoint_seconds=7.0)
    cached = make_plan(replace(REFINED, train=train), settings_at(home))
    assert cached.steps == make_plan(REFINED, settings_at(home)).steps


def test_a_build_from_the_cache_is_the_same_build(home, tmp_path):
    machine = settings_at(tmp_path)
    tokens = make_plan(REFINED, machine).step("tokens").folder
    shutil.copytree(home / "steps" / tokens, machine.steps / tokens)
    build(tmp_path, replace(REFINED, train=replace(REFINED.train, cache=True, cache_gb=1.0)))
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) > 10**5
    assert table_digests(tmp_path) == table_digests(home)


def test_stopped_while_finetuning_and_resumed_is_never_stopped(home, tmp_path):
    machine = settings_at(tmp_path)
    shutil.copytree(home / "steps", machine.steps)
    plan = make_plan(REFINED, machine)
    for kind in ("finetune", "publish"):
        shutil.rmtree(output_of(plan.of_kind(kind)[0], machine))

    class Impatient(Quiet):
        def update(self, done, total, message=""):
            if "squared error" in message and done > 4:
                raise KeyboardInterrupt

    shutil.rmtree(output_of(plan.step("evaluate"), machine))
    with pytest.raises(Cancelled):
        run_local(plan, machine, Impatient)
    assert list(machine.steps.glob(".scratch-finetune-*/finetuning.safetensors"))
    run_local(plan, machine, Quiet)
    assert not list(machine.steps.glob(".scratch-*"))
    assert table_digests(tmp_path) == table_digests(home)


# ---------------------------------------------------------------- imports


def put(home, name=NAME, d_in=256, **info):
    sae = random_sae("L01.z", d_in=d_in, d_sae=40, seed=6)
    known = {"name": name, "model": "docs-2l", "settings": '{"source": "made"}'} | info
    save_sae(replace(sae, info=replace(sae.info, **known)), folder_of(home, name))
    return sae


def importing(*names, **changes):
    return replace(SMALL, imports=names or (NAME,), release="imported", **changes)


def test_a_build_of_imports_alone(home, tmp_path):
    shutil.copytree(home / "steps", tmp_path / "steps")
    sae = put(tmp_path)
    plan = build(tmp_path, importing(sae=(), prune=PruneConfig(tokens=500, firing_rate=1e-2)))
    assert not plan.of_kind("train")
    with open_release(current(tmp_path / "releases", "imported").path) as con:
        assert rows(con, "SELECT sae, d_sae FROM saes") == [(NAME, 40)]
        assert rows(con, "SELECT count(*) FROM features") == [(40,)]
        assert rows(con, "SELECT count(*) FROM training_log") == [(0,)]
        assert {s for (s,) in rows(con, "SELECT DISTINCT stage FROM sae_stages")} == {"trained", "pruned"}
    step, folder = plan.place(0, "trained")
    assert load_sae(output_of(plan.step(step), settings_at(tmp_path)) / folder).digest() == sae.digest()
    shutil.rmtree(folder_of(tmp_path, NAME))
    put(tmp_path, settings="{}")
    assert "imports" in kinds_of(importing(sae=()), tmp_path)


def test_imports_come_after_what_is_trained(tmp_path):
    for name in ("docs-2l/b", "docs-2l/a"):
        put(tmp_path, name)
    plan = make_plan(importing("docs-2l/b", "docs-2l/*"), settings_at(tmp_path))
    assert plan.sae_names[-2:] == ("docs-2l/b", "docs-2l/a")
    assert [plan.place(i) for i in (4, 5)] == [("imports", "00000"), ("imports", "00001")]
    assert {"train", "imports"} < set(plan.step("evaluate").needs)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"processing": "folded"}, 'processing = "folded" under \\[model\\]'),
        ({"model": "gpt2"}, "reads 'gpt2'; this build's model is 'docs-2l'"),
        ({"d_in": 12}, "d_in 12; L01.z of docs-2l is 256 wide"),
        ({"site": Site("z", 7)}, "L07.z, which docs-2l does not have"),
        ({"site": Site("z", 1, 9)}, "L01.H09.z, which docs-2l does not have"),
    ],
)
def test_an_import_that_does_not_belong_here_is_refused(tmp_path, wrong, said):
    put(tmp_path, **wrong)
    with pytest.raises(SAEError, match=said):
        make_plan(importing(), settings_at(tmp_path))


def test_missing_and_doubled_imports_are_refused(tmp_path):
    with pytest.raises(SAEError, match=r"docs-2l/L01\.z\.mine"):
        make_plan(importing(), settings_at(tmp_path))
    put(tmp_path, "docs-2l/L01.z.topk-96")
    with pytest.raises(ConfigError, match="two SAEs would be called 'docs-2l/L01"):
        make_plan(importing("docs-2l/L01.z.topk-96"), settings_at(tmp_path))


def test_an_import_that_changes_under_the_build_is_refused(tmp_path):
    put(tmp_path)
    machine = settings_at(tmp_path)
    plan = make_plan(importing(sae=()), machine)
    other = random_sae("L01.z", d_in=256, d_sae=40, seed=7)
    save_sae(other.with_tensors({"b_dec": torch.ones(256)}), folder_of(tmp_path, NAME))
    with pytest.raises(SAEError, match="changed during the build"):
        run_step(plan, "imports", machine, Quiet())
    assert not list(machine.steps.glob("imports-*"))
