"""A build on paper: the plan that would be made, the cost of each step, and workers that take ready steps.

What is assumed is in :class:`Rates`; everything else comes from the plan and its estimates. A worker takes
the oldest ready step of its queues, as the real ones do, and a step is ready when all it needs is done. A
node has one GPU with one worker for `gpu`, one for `cpu` steps, and there is one for `io` in all.
"""

import heapq
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from atlas.configs import AnalysisConfig, BuildConfig, CorpusConfig, ModelConfig, SAEConfig, TrainConfig
from atlas.db.rows import StepRow
from atlas.pipeline.costs import Cost, total
from atlas.pipeline.estimates import Estimator
from atlas.pipeline.plan import Plan, Step, make_plan
from atlas.settings import load_settings

AnyStep = Step | StepRow
GPUS = [1, 2, 4, 8, 16, 32, 64]
GPU_HOUR = 3.0
TOKENS, ANALYSED = 300_000_000, 10_000_000
"""Tokens of training, and of analysis."""


@dataclass(frozen=True)
class Paper:
    """A model and what is built of it: TopK SAEs on z of all layers."""

    n_layers: int
    n_heads: int
    d_model: int
    d_vocab: int
    expansion: int
    k: int = 32
    context: int = 128

    @property
    def weights(self) -> float:
        """Bytes of the model in float32, with the usual 12 d_model^2 weights per layer."""
        return 4.0 * (12 * self.n_layers * self.d_model**2 + self.d_vocab * self.d_model)


MODELS = {
    "gpt2-small": Paper(12, 12, 768, 50_257, 32),
    "pythia-160m": Paper(12, 12, 768, 50_304, 32),
    "pythia-1.4b": Paper(24, 16, 2_048, 50_304, 16),
    "7b": Paper(32, 32, 4_096, 32_000, 16),
}


@dataclass(frozen=True)
class Rates:
    """What a machine is taken to do."""

    gpu: float = 1e14
    """FLOP/s that steps reach on an H100-class GPU with bfloat16 products: a tenth of its peak."""
    core: float = 6e10
    """FLOP/s that steps reach on one CPU core with two threads, in float32, as measured (docs/build.md)."""
    disk: float = 1e9
    """Bytes per second, written and read again."""
    start: float = 5.0
    """Seconds before a step of a model begins, beside reading the weights: process, torch, tokenizer."""
    summarise: float = 1.3e-3
    """Seconds of a feature's summaries on two cores, as measured (docs/build.md)."""
    attribute: float = 0.6e-3
    publish: float = 0.57e-3
    """Seconds of a feature in the release, by one process."""
    cores: float = 4.0
    """How much faster a node's cpu worker is than two cores."""


@cache
def costs(name: str, parts: int) -> tuple[Plan, dict[str, Cost]]:
    """The plan of a build of a model of which only the sizes are here, and what each step costs.

    The training is dealt out to so many parts.
    """
    paper = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / name
        model.mkdir()
        sizes = {
            "hidden_size": paper.d_model,
            "num_attention_heads": paper.n_heads,
            "num_hidden_layers": paper.n_layers,
            "max_position_embeddings": 2048,
            "vocab_size": paper.d_vocab,
        }
        (model / "config.json").write_text(json.dumps(sizes))
        (model / "pytorch_model.bin").write_bytes(b"not here")
        text = Path(folder) / "text.txt"
        text.write_text("The text is not here either.")
        blocks = ANALYSED // paper.context
        config = BuildConfig(
            model=ModelConfig(str(model)),
            corpus=CorpusConfig(source=str(text), blocks=blocks, context=paper.context),
            sae=(SAEConfig(expansion=paper.expansion, k=paper.k),),
            train=TrainConfig(tokens=TOKENS, parts=parts, precision="bfloat16"),
            analysis=AnalysisConfig(blocks=blocks, shard_blocks=1024),
        )
        settings = load_settings({"ATLAS_HOME": folder})
        plan = make_plan(config, settings)
        estimator = Estimator(plan, settings)
        return plan, {step.name: estimator.cost(step) for step in plan.steps}


def seconds(plan: Plan, step: Step, cost: Cost, rates: Rates) -> float:
    """How long a step takes on one worker of its queue."""
    d_sae = MODELS[plan.files.name].expansion * plan.shape.n_heads * plan.shape.d_head
    writing = (cost.bytes or 0) / rates.disk
    if step.kind in ("summarise", "attribute"):
        return d_sae * getattr(rates, step.kind) / rates.cores + writing
    if step.kind == "publish":
        return d_sae * len(plan.saes) * rates.publish + writing
    if step.queue == "gpu":
        reading = MODELS[plan.files.name].weights / rates.disk
        return rates.start + reading + (cost.flops or 0.0) / rates.gpu + writing
    return (cost.tokens or 0) / 1e6 + writing


@dataclass(frozen=True)
class Schedule:
    """When a plan would be done, and what its workers did meanwhile."""

    makespan: float
    busy: Counter[str]
    """Seconds of work by kind of step."""
    path: Counter[str]
    """Seconds by kind of step on the chain of steps that decides the end."""
    gpu_share: float
    """Part of the GPUs' time that was spent on steps."""


def schedule(steps: list[tuple[AnyStep, float]], free: dict[str, int]) -> Schedule:
    """List scheduling: whenever a worker is free it takes the first ready step in the plan's order.

    ``free`` says how many workers each queue has; with ``any``, they serve all queues.
    """
    free, n_gpus = dict(free), free.get("gpu") or sum(free.values())
    lasting = {step.name: spent for step, spent in steps}
    waiting = {step.name: set(step.needs) for step, _ in steps}
    ended: dict[str, float] = {}
    last: dict[str, str | None] = {}
    running: list[tuple[float, int, AnyStep]] = []
    order = {step.name: (number, step) for number, (step, _) in enumerate(steps)}
    freed_by: dict[str, str] = {}
    now = 0.0
    while waiting or running:
        ready = [n for n in sorted(waiting, key=lambda n: order[n][0]) if waiting[n] <= ended.keys()]
        for name in ready:
            step = order[name][1]
            pool = step.queue if step.queue in free else "any"
            if free[pool]:
                free[pool] -= 1
                del waiting[name]
                latest = max(step.needs, key=lambda need: ended[need], default=None)
                held = latest is None or ended[latest] < now
                last[name] = freed_by.get(pool, latest) if held else latest
                heapq.heappush(running, (now + lasting[name], order[name][0], step))
        now, _, step = heapq.heappop(running)
        ended[step.name] = now
        pool = step.queue if step.queue in free else "any"
        free[pool] += 1
        freed_by[pool] = step.name
    busy: Counter[str] = Counter()
    for step, spent in steps:
        busy[step.kind] += spent
    path: Counter[str] = Counter()
    at: str | None = max(ended, key=lambda name: ended[name])
    while at is not None:
        path[order[at][1].kind] += lasting[at]
        at = last[at]
    gpu = sum(spent for step, spent in steps if step.queue == "gpu")
    return Schedule(now, busy, path, gpu / (now * n_gpus))


def simulate(name: str, n_gpus: int, rates: Rates) -> Schedule:
    """A build with its training dealt out to as many parts as there are GPUs, if there are sites enough."""
    plan, cost = costs(name, min(n_gpus, MODELS[name].n_layers))
    steps = [(step, seconds(plan, step, cost[step.name], rates)) for step in plan.steps]
    return schedule(steps, {"gpu": n_gpus, "cpu": n_gpus, "io": 1})


def table(name: str, gpus: list[int], rates: Rates) -> str:
    """A line per number of GPUs."""
    lines = [
        "| GPUs | Hours | Faster | Efficiency | GPUs at work | What decides the end |",
        "|---|---|---|---|---|---|",
    ]
    first = 0.0
    for n in gpus:
        found = simulate(name, n, rates)
        first = first or found.makespan * n
        whole = sum(found.path.values())
        where = ", ".join(f"{kind} {100 * spent / whole:.0f} %" for kind, spent in found.path.most_common(4))
        faster = first / found.makespan
        lines.append(
            f"| {n} | {found.makespan / 3600:.2f} | {faster:.1f} | {100 * faster / n:.0f} % "
            f"| {100 * found.gpu_share:.0f} % | {where} |"
        )
    return "\n".join(lines)


def sizing(rates: Rates, price: float) -> str:
    """A line per model: work, time, disk, memory, money."""
    heads = "Model | Features | FLOPs | of training | Core days | GPU hours | Steps, GB | Release, GB"
    heads += " | Memory, GB | Money"
    lines = [f"| {heads} |", "|---" * 10 + "|"]
    for name, paper in MODELS.items():
        plan, cost = costs(name, 1)
        whole = total(cost.values())
        trained = sum(cost[s.name].flops or 0 for s in plan.of_kind("train"))
        one = simulate(name, 1, rates)
        n_features = paper.n_layers * paper.d_model * paper.expansion
        release = cost["publish"].bytes or 0
        weights = 2 * paper.d_model**2 * paper.expansion * paper.n_layers
        memory = 16 * weights + paper.weights
        flops = whole.flops or 0.0
        hours = one.makespan / 3600
        steps = ((whole.bytes or 0) - release) / 1e9
        lines.append(
            f"| {name} | {n_features:,} | {flops:.1e} | {100 * trained / flops:.0f} % "
            f"| {flops / rates.core / 86_400:,.0f} | {hours:.1f} | {steps:,.0f} "
            f"| {release / 1e9:.1f} | {memory / 1e9:.0f} | {hours * price:,.0f} |"
        )
    return "\n".join(lines)
