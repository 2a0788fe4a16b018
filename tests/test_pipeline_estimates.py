"""What a dry run says a build will cost, against what the build then does: FLOPs counted, bytes written."""

import argparse
import inspect
import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from math import prod

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

import atlas.lm.layers
import atlas.lm.runtime
from atlas.analysis.shard import BATCH_BLOCKS
from atlas.cli.build import build
from atlas.configs import (
    AnalysisConfig,
    BuildConfig,
    CorpusConfig,
    EvalConfig,
    FinetuneConfig,
    HeadsConfig,
    ModelConfig,
    PruneConfig,
    QKConfig,
    SAEConfig,
    SitesConfig,
    TrainConfig,
)
from atlas.errors import ConfigError
from atlas.lm.attention import replays
from atlas.lm.files import find_model
from atlas.lm.hooks import capture
from atlas.lm.layers import agrees
from atlas.lm.load import load_model
from atlas.lm.sizes import ModelSizes, read_sizes
from atlas.pipeline.costs import Cost, total
from atlas.pipeline.estimates import estimate, measured_flops_per_second
from atlas.pipeline.execute import output_of, run_step
from atlas.pipeline.plan import make_plan
from atlas.pipeline.steps import STEPS
from atlas.progress import NullProgress
from atlas.store.release import current
from tests.builds import settings_at

FLOPS_WITHIN = {"heads": 2.0, "summarise": 2.0}
"""By kind, the factor either way within which an estimate lies; 1.3 for all others."""
BYTES_WITHIN = {
    "summarise": 4.0,
    "attribute": 4.0,
    "dfa": 4.0,
    "reference": 6.0,
    "publish": 8.0,
    "heads": 6.0,
}
"""The same for bytes; 2 for all others. Tables are compressed, and small ones are mostly their headers."""
NO_PRODUCTS = {"tokens", "imports", "reference", "publish"}


class InThisThread(ThreadPoolExecutor):
    """An executor without threads: FLOPs are counted in the thread that asked."""

    def submit(self, work, *arguments):
        done = Future()
        done.set_result(work(*arguments))
        return done

    def map(self, work, *items):
        return [work(*row) for row in zip(*items, strict=True)]


def config_for(folder):
    text = folder / "text.txt"
    text.write_text("\n\n".join(inspect.getsource(module) for module in (argparse, inspect, json)))
    return BuildConfig(
        model=ModelConfig("docs-2l"),
        corpus=CorpusConfig(str(text), blocks=60, context=64),
        sites=SitesConfig(("z",)),
        qk=QKConfig(repeats=4, half=10, targets=1, prompts=()),
        sae=(SAEConfig("topk", d_sae=96, k=8, aux_k=0), SAEConfig("gated", d_sae=64, l1_coefficient=2.0)),
        train=TrainConfig(tokens=4096, batch=256, chunk_batches=4, dead_window=10**6, log_every=4),
        prune=PruneConfig(max_activation=0.0, firing_rate=0.0, tokens=2048),
        finetune=FinetuneConfig(tokens=1024),
        evaluation=EvalConfig(6),
        analysis=AnalysisConfig(24, shard_blocks=16, loss_blocks=16),
        heads=HeadsConfig(ablation_blocks=2, prompts=2, repeats=4),
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Of each step of a small build: its kind, the estimate, FLOPs counted, bytes written."""
    home = tmp_path_factory.mktemp("home")
    settings = settings_at(home)
    plan = make_plan(config_for(home), settings)
    expected = estimate(plan, settings)
    found = {}
    # Tried once per process and shape of a batch, and no part of a step.
    tried = load_model(plan.config.model, torch.device("cpu")), BATCH_BLOCKS, plan.config.corpus.context
    assert replays(*tried)
    assert agrees(*tried)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atlas.lm.layers, "agrees", lambda *_: True)
        patch.setattr(atlas.lm.runtime, "ThreadPoolExecutor", InThisThread)
        for step in plan.steps:
            with FlopCounterMode(display=False) as counter:
                run_step(plan, step.name, settings, NullProgress())
            files = [f for f in output_of(step, settings).rglob("*") if f.is_file()]
            size = sum(f.stat().st_size for f in files)
            if step.kind == "publish":
                size += current(settings.releases, plan.config.release_name).path.stat().st_size
            found[step.name] = (step.kind, expected[step.name], counter.get_total_flops(), size)
    return found


def outside(found, expected, factor):
    return not found / factor <= expected <= found * factor


def test_flops_are_those_that_are_counted(built):
    wrong = {
        name: (cost.flops, flops)
        for name, (kind, cost, flops, _) in built.items()
        if kind not in NO_PRODUCTS and outside(flops, cost.flops, FLOPS_WITHIN.get(kind, 1.3))
    }
    assert wrong == {}
    assert all(cost.flops == flops == 0 for kind, cost, flops, _ in built.values() if kind in NO_PRODUCTS)
    whole = total(cost for _, cost, _, _ in built.values())
    assert not outside(sum(flops for _, _, flops, _ in built.values()), whole.flops, 1.3)


def test_bytes_are_those_that_are_written(built):
    wrong = {
        name: (cost.bytes, size)
        for name, (kind, cost, _, size) in built.items()
        if outside(size, cost.bytes, BYTES_WITHIN.get(kind, 2.0))
    }
    assert wrong == {}


def test_every_kind_of_step_has_an_estimate(built):
    # Imports need a library; pairs need SAEs of q and k (see below).
    assert {kind for kind, *_ in built.values()} == set(STEPS) - {"imports", "pair"}
    assert all(cost.flops is not None for _, cost, _, _ in built.values())


def test_pairs_of_q_and_k_have_an_estimate(tmp_path):
    settings = settings_at(tmp_path)
    sites = SitesConfig(("q", "k"), layers=(0,), heads=(1,))
    plan = make_plan(replace(config_for(tmp_path), sites=sites, sae=(SAEConfig(d_sae=32, k=4),)), settings)
    costs = estimate(plan, settings)
    (pair,) = plan.of_kind("pair")
    assert costs[pair.name].tokens == 4 * 21 * (2 + 6)
    assert all(cost.flops is not None for cost in costs.values())


def test_tokens_are_what_the_config_says(built):
    assert built["tokens"][1].tokens == 60 * 64
    assert built["train"][1].tokens == 4096
    assert built["finetune"][1].tokens == 1024
    assert built["shard-0000"][1].tokens == 16 * 64
    assert built["shard-0001"][1].tokens == 8 * 64


@pytest.mark.parametrize("name", ["docs-2l", "docs-12l"])
def test_a_forward_pass_costs_what_is_counted(name):
    files = find_model(name)
    sizes = read_sizes(files)
    model = load_model(ModelConfig(name), torch.device("cpu"))
    tokens = torch.randint(0, sizes.d_vocab, (2, 32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        capture(model, tokens, (), [f"blocks.{sizes.n_layers - 1}.hook_resid_post"])
    assert sizes.forward(64, 32, logits=False) == pytest.approx(counter.get_total_flops(), rel=0.01)
    layers = (
        {n: p for n, p in model.bridge.named_parameters() if p.ndim == 2} if hasattr(model, "bridge") else {}
    )
    assert not layers or sum(prod(p.shape) for p in layers.values()) >= sizes.per_layer * sizes.n_layers


def test_sizes_of_gpt2_small():
    # 124M parameters: 12 layers of 12 d_model^2 matrices; 2 * (85M + 39M) + attention per token.
    gpt2 = ModelSizes(12 * 768**2, 12, 768, 768, 50257)
    assert gpt2.forward(1, 1024) == 2 * (12 * 12 * 768**2 + 768 * 50257) + 12 * 4 * 1024 * 768


def test_a_model_without_readable_headers_is_taken_as_usual(tmp_path):
    config = {"n_embd": 8, "n_head": 2, "n_layer": 3, "vocab_size": 10, "n_positions": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert read_sizes(find_model(str(tmp_path))).per_layer == 12 * 64


def test_costs_add_up():
    assert total([]) == Cost()
    assert Cost(1, 2.0, 3) + Cost(None, None, None) == Cost(1, 2.0, 3)


def dry_run(path, *options):
    done = CliRunner().invoke(build, [str(path), "--dry-run", *options], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.output


def test_the_dry_run_prints_steps_costs_and_their_sum(tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path / "home"))
    config = config_for(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    text = dry_run(path, "--flops", "1e12")
    assert "to do: 21 of 21 steps" in text
    assert "1 TFLOP/s" in text
    assert not (tmp_path / "home").exists()
    plan = json.loads(dry_run(path, "--json", "--flops", "1e12"))
    to_do = plan["to_do"]
    assert to_do["steps"] == len(plan["steps"]) == 21
    assert to_do["flops"] == sum(step["flops"] for step in plan["steps"])
    assert to_do["seconds"] == pytest.approx(to_do["flops"] / 1e12)
    assert {step["state"] for step in plan["steps"]} == {"to do"}
    settings = settings_at(tmp_path / "home")
    real = make_plan(config, settings)
    run_step(real, "tokens", settings, NullProgress())
    after = json.loads(dry_run(path, "--json"))
    assert [s["step"] for s in after["steps"] if s["state"] == "current"] == ["tokens"]
    assert after["to_do"]["tokens"] == to_do["tokens"] - 60 * 64
    assert after["to_do"]["seconds"] is None


@pytest.mark.parametrize("rate", ["0", "-1", "fast", "inf", "nan"])
def test_a_rate_that_is_none_is_refused(tmp_path, rate):
    with pytest.raises(ConfigError, match="allowed: FLOPs per second such as 2e14, or measured"):
        dry_run(write(tmp_path), "--flops", rate)


def write(folder):
    path = folder / "config.json"
    path.write_text(config_for(folder).to_json())
    return path


def test_a_measured_rate_is_one_that_a_machine_can_have(tmp_path):
    assert 1e8 < measured_flops_per_second(settings_at(tmp_path), seconds=0.05) < 1e17


def test_more_text_costs_more_and_a_wider_sae_too(tmp_path):
    settings, base = settings_at(tmp_path), config_for(tmp_path)

    def whole(config):
        return total(estimate(make_plan(config, settings), settings).values())

    first = whole(base)
    more = whole(replace(base, analysis=replace(base.analysis, blocks=48)))
    wide = whole(replace(base, sae=(replace(base.sae[0], d_sae=192), base.sae[1])))
    for other in (more, wide):
        assert other.flops > first.flops
        assert other.bytes > first.bytes


def test_planning_needs_no_torch(tmp_path):
    import subprocess

    code = (
        "import sys, json\nfrom click.testing import CliRunner\nfrom atlas.cli.build import build\n"
        f"CliRunner().invoke(build, [{str(write(tmp_path))!r}, '--dry-run'], catch_exceptions=False)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
