"""How long does the analysis take, and how much memory? Against the bare forward pass plus encoding.

    python benchmarks/analyse.py [--blocks 2048] [--width 3072] [--layers all] [--home FOLDER]

Runs the real steps of a build over SAEs on z (made from samples of the activations, TopK 32), each once,
and prints seconds by the clock and of the processors, and peak memory, by kind of step. "Bare" is what
anybody would run who wants feature activations and no analysis: transformer_lens up to the last z, and every
SAE's encoder in plain torch (addmm, topk, relu, scatter), over the same blocks, with nothing kept. It does
not move when Head Atlas's own encoding gets faster. Two more figures do: with its selection of the k largest
in place of torch.topk and no dense activations ("own top-k"), and as the corpus pass encodes, which on some
processors does not compute all pre-activations ("screened"). All are measured over some blocks at a time,
before the steps and after every second one, so that a machine whose speed drifts slows all alike; the sums
are scaled to all blocks. Processor seconds are all threads' together, and what to compare on a machine that
does other things as well.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from atlas.configs import AnalysisConfig, BuildConfig, CorpusConfig, EvalConfig, ModelConfig
from atlas.corpus.tokens import TokenStore
from atlas.lm.hooks import capture
from atlas.lm.load import LanguageModel, load_model
from atlas.lm.runtime import lanes, prepare_torch
from atlas.pipeline.execute import output_of, run_step
from atlas.pipeline.plan import Plan, make_plan
from atlas.progress import NullProgress
from atlas.sae.files import load_sae, save_sae
from atlas.sae.library import folder_of, note_digest
from atlas.sae.model import SAE, Active, SAEInfo
from atlas.sae.screen import Firing
from atlas.settings import Settings, load_settings
from atlas.sites import Site
from atlas.store.release import current
from benchmarks.machine import machine_line

CONTEXT, K, BARE_BATCHES, BATCH = 128, 32, 3, 16
ANALYSIS = ("shard", "effects", "summarise", "dfa", "attribute")


def from_samples(model: LanguageModel, site: Site, width: int, x: torch.Tensor) -> SAE:
    """A TopK SAE whose directions are centred activations, so that its features fire as trained ones do."""
    centre = x.mean(0)
    generator = torch.Generator().manual_seed(site.layer)
    rows = (x - centre)[torch.randint(len(x), (width,), generator=generator)]
    rows = torch.nn.functional.normalize(
        rows + 0.3 * rows.std() * torch.randn(rows.shape, generator=generator)
    )
    info = SAEInfo(
        f"{model.name}/{site.name}.topk-{width}", model.name, "raw", site, "topk", K, None, 0, "samples",
        CONTEXT, 0, "samples", "benchmark",
    )  # fmt: skip
    return SAE(info, rows.T.contiguous(), torch.zeros(width), rows, centre)


def fill_library(
    settings: Settings, model: LanguageModel, store: TokenStore, sites: list[Site], width: int
) -> None:
    tokens = torch.from_numpy(store.blocks(range(64)))
    activations, _ = capture(model, tokens, sites)
    for site in sites:
        x = activations[site][:, 1:].reshape(-1, site.d_in(model.shape))
        sae = from_samples(model, site, width, x)
        folder = folder_of(settings.home, sae.info.name)
        if not folder.exists():
            save_sae(sae, folder)
            note_digest(folder, "samples")


class Spent(NamedTuple):
    """Seconds by the clock, and of all processors together."""

    clock: float
    processors: float

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.clock + other.clock, self.processors + other.processors)

    def times(self, factor: float) -> "Spent":
        return Spent(self.clock * factor, self.processors * factor)


NOTHING = Spent(0.0, 0.0)


class Stopwatch:
    """Time since it was made."""

    def __init__(self) -> None:
        self.begun = time.perf_counter(), time.process_time()

    def read(self) -> Spent:
        return Spent(time.perf_counter() - self.begun[0], time.process_time() - self.begun[1])


def plain_encode(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """Dense feature_acts of a TopK SAE as a few lines of torch give them."""
    pre = torch.addmm(sae.bias_term, x, sae.encoder_directions)
    values, index = torch.topk(pre, K, sorted=False)
    return torch.zeros_like(pre).scatter_(1, index, values.relu())


def screened_encode(sae: SAE, x: torch.Tensor) -> Active:
    """What fires, as the corpus pass finds it."""
    firing = screen_of(sae)
    seen = None if firing is None else firing.screen.look(x)
    return sae.active(x) if firing is None or seen is None else firing.of(seen)


@cache
def screen_of(sae: SAE) -> Firing | None:
    return Firing(sae) if Firing.suits(sae) else None


ENCODERS: dict[str, Callable[[SAE, torch.Tensor], object]] = {
    "encode": plain_encode,
    "own top-k": SAE.active,
    "screened": screened_encode,
}


class Bare:
    """Time of the forward pass and of encoding, measured a few batches at a time."""

    def __init__(self, model: LanguageModel, saes: list[SAE], store: TokenStore) -> None:
        self.model, self.saes, self.store = model, saes, store
        self.spent = dict.fromkeys(("forward", *ENCODERS), NOTHING)
        self.blocks = 0

    @torch.no_grad()
    def measure(self) -> None:
        """Run the next few batches; one more before them warms up."""
        sites = [sae.info.site for sae in self.saes]
        for n in range(1 + BARE_BATCHES):
            first = self.blocks % (len(self.store) - BATCH + 1)
            tokens = torch.from_numpy(self.store.blocks(range(first, first + BATCH)))
            watch = Stopwatch()
            activations, _ = capture(self.model, tokens, sites)
            found = {"forward": watch.read()}
            flat = [activations[site][:, 1:].flatten(0, 1) for site in sites]
            for name, encode in ENCODERS.items():
                watch = Stopwatch()
                with lanes() if name == "screened" else nullcontext() as pool:
                    side_by_side = map if pool is None else pool.map
                    for _ in side_by_side(encode, self.saes, flat):
                        pass
                found[name] = watch.read()
            if n:
                self.spent = {name: spent + found[name] for name, spent in self.spent.items()}
                self.blocks += BATCH

    def over(self, blocks: int) -> dict[str, Spent]:
        """Forward pass and encoding, plain and our own, of so many blocks."""
        return {name: spent.times(blocks / self.blocks) for name, spent in self.spent.items()}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_all(plan: Plan, settings: Settings, bare: Bare) -> tuple[dict[str, Spent], dict[str, float]]:
    spent: dict[str, Spent] = {}
    peak = {}
    for number, step in enumerate(plan.steps):
        if number % 2 == 0:
            bare.measure()
        watch = Stopwatch()
        run_step(plan, step.name, settings, NullProgress())
        spent[step.kind] = spent.get(step.kind, NOTHING) + watch.read()
        peak[step.kind] = peak_mb()
    bare.measure()
    return spent, peak


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
    text = make_plan(
        BuildConfig(model=config.model, corpus=config.corpus, evaluation=config.evaluation), settings
    )
    run_step(text, "tokens", settings, NullProgress())
    store = TokenStore(output_of(text.step("tokens"), settings))
    fill_library(settings, model, store, sites, arguments.width)
    plan = make_plan(config, settings)
    saes = [load_sae(folder_of(settings.home, name)).to(device) for name in plan.sae_names]
    bare = Bare(model, saes, store)
    spent, peak = run_all(plan, settings, bare)
    alone = bare.over(len(store))
    n_features = sum(sae.d_sae for sae in saes)
    print(machine_line(device))
    saes_line = f"{len(saes)} z SAEs of width {arguments.width} (TopK {K})"
    print(f"{model.name}, {saes_line}, {len(store)} blocks of {CONTEXT}")
    print(f"{'step':24}{'seconds':>10}{'of processors':>15}{'peak MB':>10}")
    for kind, (clock, processors) in spent.items():
        print(f"{kind:24}{clock:10.1f}{processors:15.1f}{peak[kind]:10.0f}")
    total = sum((spent.get(kind, NOTHING) for kind in ANALYSIS), NOTHING)
    for name, found in (
        *((f"bare {name}", found) for name, found in alone.items()),
        ("analysis", total), ("analysis and release", total + spent["publish"]),
    ):  # fmt: skip
        print(f"{name:24}{found.clock:10.1f}{found.processors:15.1f}")
    for name in ENCODERS:
        whole = alone["forward"] + alone[name]
        for what, found in (("analysis", total), ("analysis and release", total + spent["publish"])):
            by_clock, by_work = found.clock / whole.clock, found.processors / whole.processors
            print(f"{what} / bare forward + {name}: {by_clock:.2f} by the clock, {by_work:.2f} of processors")
    print(f"per feature: {1e3 * total.clock / n_features:.2f} ms; with the release "
          f"{1e3 * (total + spent['publish']).clock / n_features:.2f} ms")  # fmt: skip
    kb = current(settings.releases).path.stat().st_size / 1024 / n_features
    print(f"shards {disk_kb(plan, settings, 'shard') / 1024:.0f} MB; release {kb:.1f} KB per feature")


if __name__ == "__main__":
    main()
