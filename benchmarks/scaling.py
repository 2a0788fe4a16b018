"""How much faster is a build on more workers? Here with 1 and 4 workers, on paper with 1 to 64 GPUs.

    python benchmarks/scaling.py measure [--workers 1 2 4] [--model docs-2l]
    python benchmarks/scaling.py simulate [--model gpt2-small] [--gpus 1 2 4 8 16 32 64]
    python benchmarks/scaling.py sizing

`measure` starts a Redis and workers of one thread each, builds the same plan into an empty folder each time,
and prints the seconds from the first step's start to the last one's end, where they went, and how much faster
the same steps would be if every worker had a core of its own ("on paper": the first build's times, handed out
by benchmarks/simulation.py). `simulate` takes the plan of a build with its costs (atlas.pipeline.estimates)
and hands its steps to workers as the queues do. `sizing` prints one line per model of docs/cluster.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from atlas.db.engine import close_engines
from atlas.db.rows import RunRow, StepRow
from atlas.db.runs import list_runs, load_run
from atlas.settings import load_settings
from benchmarks.simulation import GPU_HOUR, GPUS, MODELS, Rates, schedule, sizing, table
from tests.servers import RedisServer, stop

CONFIG = """
[model]
name = "{model}"
[corpus]
blocks = 2048
context = 128
[[sae]]
expansion = 8
k = 16
[train]
tokens = {tokens}
parts = {parts}
[evaluation]
blocks = 16
[analysis]
blocks = 1024
shard_blocks = 64
coactivation_blocks = 256
"""


def _seconds(run: RunRow) -> float:
    times = [(s.started_at, s.finished_at) for s in run.steps if s.started_at and s.finished_at]
    return (max(end for _, end in times) - min(start for start, _ in times)).total_seconds()


def _by_kind(run: RunRow) -> Counter[str]:
    """Seconds that workers spent on each kind of step."""
    found: Counter[str] = Counter()
    for step in run.steps:
        if step.started_at and step.finished_at:
            found[step.kind] += (step.finished_at - step.started_at).total_seconds()
    return found


def _lasting(run: RunRow) -> list[tuple[StepRow, float]]:
    """Each step and how long it took."""
    return [
        (step, (step.finished_at - step.started_at).total_seconds())
        for step in run.steps
        if step.started_at and step.finished_at
    ]


def build(config: str, n_workers: int) -> RunRow:
    """The same plan from nothing, by so many workers; the run as the database has it in the end."""
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer()
        server.start()
        path = Path(folder) / "build.toml"
        path.write_text(config)
        bare = {k: v for k, v in os.environ.items() if not k.startswith("ATLAS_")}
        own = {
            "ATLAS_HOME": folder,
            "ATLAS_BROKER_URL": server.url,
            "ATLAS_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        atlas = [sys.executable, "-m", "atlas"]
        log = (Path(folder) / "workers.log").open("ab")
        workers = [
            subprocess.Popen([*atlas, "worker", "--name", f"w{i}"], env=bare | own, stdout=log, stderr=log)
            for i in range(n_workers)
        ]
        try:
            time.sleep(8)  # all are there before the first step is
            subprocess.run([*atlas, "build", str(path)], env=bare | own, check=True, capture_output=True)
            settings = load_settings(own)
            return load_run(settings, list_runs(settings)[0].id)
        finally:
            for worker in workers:
                stop(worker)
            server.stop()
            close_engines()


def measure(asked: argparse.Namespace) -> None:
    """Build with each number of workers and print a line for each."""
    config = CONFIG.format(model=asked.model, tokens=asked.tokens, parts=asked.parts)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {asked.model}, one thread per worker")
    print("| Workers | Seconds | Faster | On paper | Seconds of work | Where |\n|---|---|---|---|---|---|")
    first, alone = 0.0, []
    for n in asked.workers:
        run = build(config, n)
        seconds, kinds = _seconds(run), _by_kind(run)
        first, alone = first or seconds, alone or _lasting(run)
        paper = schedule(alone, {"any": 1}).makespan / schedule(alone, {"any": n}).makespan
        where = ", ".join(f"{kind} {spent:.0f}" for kind, spent in kinds.most_common(5))
        total = f"{sum(kinds.values()):.0f}"
        print(
            f"| {n} | {seconds:.0f} | {first / seconds:.2f} | {paper:.2f} | {total} | {where} |", flush=True
        )
    print(f"load at the end {os.getloadavg()[0]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = parser.add_subparsers(dest="way", required=True)
    real = ways.add_parser("measure")
    real.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    real.add_argument("--model", default="docs-2l")
    real.add_argument("--tokens", type=int, default=400_000)
    real.add_argument("--parts", type=int, default=2)
    paper = ways.add_parser("simulate")
    paper.add_argument("--model", default="gpt2-small", choices=MODELS)
    paper.add_argument("--gpus", type=int, nargs="*", default=GPUS)
    for way in (paper, ways.add_parser("sizing")):
        way.add_argument("--flops", type=float, default=Rates().gpu, help="FLOP/s of a GPU, as reached")
        way.add_argument("--price", type=float, default=GPU_HOUR, help="money per GPU hour")
    asked = parser.parse_args()
    if asked.way == "measure":
        measure(asked)
    elif asked.way == "simulate":
        print(table(asked.model, asked.gpus, Rates(gpu=asked.flops)))
    else:
        print(sizing(Rates(gpu=asked.flops), asked.price))


if __name__ == "__main__":
    main()
