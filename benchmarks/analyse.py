"""How long does the analysis take, and how much memory? Against the bare forward pass plus encoding.

    python benchmarks/analyse.py [--blocks 2048] [--width 3072] [--layers all] [--home FOLDER]

Runs the real steps of a build over SAEs on z (made from samples of the activations, TopK 32), each once, and
prints seconds and peak memory by kind of step. "Bare" is what no analysis can do without: the model run to
its last z and every SAE's pre-activations and TopK, over the same blocks, with nothing kept.
"""

import argparse
import resource
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from atlas.configs import AnalysisConfig, BuildConfig, CorpusConfig, EvalConfig, ModelConfig
from atlas.corpus.tokens import TokenStore
from atlas.lm.hooks import capture
from atlas.lm.load import LanguageModel, load_model
from atlas.lm.runtime import prepare_torch
from atlas.pipeline.execute import output_of, run_step
from atlas.pipeline.plan import Plan, make_plan
from atlas.progress import NullProgress
from atlas.sae.files import save_sae
from atlas.sae.library import folder_of, note_digest
from atlas.sae.model import SAE, SAEInfo
from atlas.settings import Settings, load_settings
from atlas.sites import Site
from benchmarks.machine import machine_line

CONTEXT, K, BARE_BLOCKS, BATCH = 128, 32, 128, 16
ANALYSIS = ("shard", "effects", "summarise", "dfa", "attribute")


def from_samples(model: LanguageModel, site: Site, width: int, x: torch.Tensor) -> SAE:
    """A TopK SAE whose directions are centred activations, so that its features fire as trained ones do."""
    centre = x.mean(0)
    generator = torch.Generator().manual_seed(site.layer)
    rows = (x - centre)[torch.randint(len(x), (width,), generator=generator)]
    rows = torch.nn.functional.normalize(rows + 0.3 * rows.std() * torch.randn(rows.shape, generator=generator))
    info = SAEInfo(
        f"{model.name}/{site.name}.topk-{width}", model.name, "raw", site, "topk", K, None, 0, "samples",
        CONTEXT, 0, "samples", "benchmark",
    )  # fmt: skip
    return SAE(info, rows.T.contiguous(), torch.zeros(width), rows, centre)


def fill_library(settings: Settings, model: LanguageModel, store: TokenStore, sites: list[Site], width: int) -> None:
    tokens = torch.from_numpy(store.blocks(range(64)))
    activations, _ = capture(model, tokens, sites)
    for site in sites:
        x = activations[site][:, 1:].reshape(-1, site.d_in(model.shape))
        sae = from_samples(model, site, width, x)
        folder = folder_of(settings.home, sae.info.name)
        if not folder.exists():
            save_sae(sae, folder)
            note_digest(folder, "samples")


@torch.no_grad()
def bare(model: LanguageModel, saes: list[SAE], store: TokenStore, blocks: int) -> tuple[float, float]:
    """Seconds of the forward pass and of encoding over ``blocks`` blocks, from a part of them."""
    measured = min(blocks, BARE_BLOCKS)
    sites, spent = [sae.info.site for sae in saes], [0.0, 0.0]
    for start in range(-BATCH, measured, BATCH):
        tokens = torch.from_numpy(store.blocks(range(max(start, 0), max(start, 0) + BATCH)))
        begun = time.perf_counter()
        activations, _ = capture(model, tokens, sites)
        between = time.perf_counter()
        for sae in saes:
            sae.active(activations[sae.info.site][:, 1:].reshape(-1, sae.d_in))
        if start >= 0:  # the first batch warms up
            spent[0] += between - begun
            spent[1] += time.perf_counter() - between
    return spent[0] * blocks / measured, spent[1] * blocks / measured


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_all(plan: Plan, settings: Settings) -> tuple[dict[str, float], dict[str, float]]:
    seconds, peak = defaultdict(float), {}
    for step in plan.steps:
        begun = time.perf_counter()
        run_step(plan, step.name, settings, NullProgress())
        seconds[step.kind] += time.perf_counter() - begun
        peak[step.kind] = peak_mb()
    return dict(seconds), peak


def disk_kb(plan: Plan, settings: Settings, kind: str) -> float:
    folders = [output_of(step, settings) for step in plan.of_kind(kind)]
    return sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file()) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="docs-12l")
    parser.add_argument("--blocks", type=int, default=2048)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--layers", default="all", help="all, or numbers separated by commas")
    parser.add_argument("--home", type=Path, help="keep what is made in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report(arguments, load_settings({"ATLAS_HOME": str(arguments.home or temporary)}))


def report(arguments: argparse.Namespace, settings: Settings) -> None:
    device = prepare_torch(settings)
    model = load_model(ModelConfig(arguments.model), device)
    n_layers = model.shape.n_layers
    layers = range(n_layers) if arguments.layers == "all" else map(int, arguments.layers.split(","))
    sites = [Site("z", layer) for layer in layers]
    config = BuildConfig(
        model=ModelConfig(arguments.model),
        corpus=CorpusConfig("stdlib", blocks=arguments.blocks, context=CONTEXT),
        sae=(),
        imports=("*",),
        evaluation=EvalConfig(blocks=16),
        analysis=AnalysisConfig(blocks=arguments.blocks),
    )
    text = make_plan(BuildConfig(model=config.model, corpus=config.corpus, evaluation=config.evaluation), settings)
    run_step(text, "tokens", settings, NullProgress())
    store = TokenStore(output_of(text.step("tokens"), settings))
    fill_library(settings, model, store, sites, arguments.width)
    plan = make_plan(config, settings)
    seconds, peak = run_all(plan, settings)
    from atlas.sae.files import load_sae

    saes = [load_sae(folder_of(settings.home, name)).to(device) for name in plan.sae_names]
    forward, encode = bare(model, saes, store, len(store))
    n_features = sum(sae.d_sae for sae in saes)
    print(machine_line(device))
    print(f"{model.name}, {len(saes)} z SAEs of width {arguments.width} (TopK {K}), {len(store)} blocks of {CONTEXT}")
    print(f"{'step':24}{'seconds':>10}{'peak MB':>10}")
    for kind, spent in seconds.items():
        print(f"{kind:24}{spent:10.1f}{peak[kind]:10.0f}")
    total = sum(seconds.get(kind, 0.0) for kind in ANALYSIS)
    print(f"{'bare forward':24}{forward:10.1f}")
    print(f"{'bare encode':24}{encode:10.1f}")
    print(f"analysis {total:.1f} s = {total / (forward + encode):.2f} x bare; {1e3 * total / n_features:.2f} ms per feature")
    shards = disk_kb(plan, settings, "shard") / 1024
    print(f"shards {shards:.0f} MB on disk")
    release = output_of(plan.steps[-1], settings)
    print(f"with the release: {total + seconds['publish']:.1f} s; {release.name}")


if __name__ == "__main__":
    main()
