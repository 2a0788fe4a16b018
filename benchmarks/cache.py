"""What the activation cache saves: harvest and a small sweep, from the stream and from the cache.

    python benchmarks/cache.py [--model docs-12l] [--blocks 520] [--dtype float16] [--sweep 3]

"first run" runs the model and writes; "second run" reads, in a new object that checks every digest again;
"other order" is a seed whose blocks lie scattered over the shards. A sweep trains its members one after
another, as separate runs do; its first member fills the cache. Prints a table with its inputs and the
machine. Activations were just written, so reads come from the memory of the operating system as far as
they fit into it.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from atlas.configs import ModelConfig, SAEConfig, TrainConfig
from atlas.corpus.tokens import TokenStore, TokenStoreMeta
from atlas.lm.load import LanguageModel, load_model
from atlas.lm.runtime import prepare_torch
from atlas.progress import NullProgress
from atlas.sae.cache import CachedHarvest
from atlas.sae.harvest import Harvest, Source, Stream
from atlas.sae.train import Training
from atlas.settings import load_settings
from atlas.sites import Site, expand_sites

CONTEXT, BATCH, CHUNK_BATCHES = 128, 4096, 4


class RandomText(TokenStore):
    """Random tokens in the shape of a token store."""

    def __init__(self, d_vocab: int, blocks: int) -> None:
        self.meta = TokenStoreMeta("random", CONTEXT, blocks, 0, "uint16", 1, 1)
        self._tokens = np.random.default_rng(0).integers(0, d_vocab, (blocks, CONTEXT))


def read_all(source: Source, stream: Stream) -> float:
    """Seconds to read as many whole chunks as the text has."""
    start = time.perf_counter()
    for number in range(chunks(stream)):
        source.chunk(number)
    return time.perf_counter() - start


def chunks(stream: Stream) -> int:
    return max(1, stream.n_train // stream.chunk_blocks)


def harvest_rows(
    model: LanguageModel, stream: Stream, sites: tuple[Site, ...], root: Path
) -> dict[str, float]:
    def cached(seed: int = 0) -> tuple[Source, Stream]:
        return CachedHarvest(model, stream._replace(seed=seed), sites, root, 10**12), stream

    Harvest(model, stream, sites).blocks(np.arange(16))  # warm-up
    seconds = {"stream": read_all(Harvest(model, stream, sites), stream)}
    seconds["cache, first run (writes)"] = read_all(*cached())
    source, _ = cached()
    seconds["cache, second run"] = read_all(source, stream)
    seconds["cache, same run again (checked before)"] = read_all(source, stream)
    seconds["cache, other order"] = read_all(*cached(seed=1))
    return seconds


def sweep_rows(
    model: LanguageModel, stream: Stream, sites: tuple[Site, ...], root: Path, members: list[SAEConfig]
) -> dict[str, float]:
    """Seconds of a sweep whose members are trained one after another."""
    config = TrainConfig(
        tokens=chunks(stream) * stream.chunk_tokens,
        batch=BATCH,
        chunk_batches=CHUNK_BATCHES,
        checkpoint_seconds=1e9,
    )

    def sweep(source: Callable[[], Source]) -> float:
        start = time.perf_counter()
        for sae in members:
            training = Training(model, stream, sites, [sae], config, source())
            training.run(root / "checkpoint", NullProgress())
        return time.perf_counter() - start

    seconds = {"stream": sweep(lambda: Harvest(model, stream, sites))}
    fresh = root / "sweep"
    seconds["cache, filled by its first member"] = sweep(
        lambda: CachedHarvest(model, stream, sites, fresh, 10**12)
    )
    seconds["cache, filled before"] = sweep(lambda: CachedHarvest(model, stream, sites, fresh, 10**12))
    return seconds


def show(title: str, seconds: dict[str, float], tokens: int) -> None:
    print(title)
    for name, t in seconds.items():
        print(f"  {name:42} {t:8.2f} s {tokens / t:12,.0f} tokens/s {seconds['stream'] / t:7.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="docs-12l")
    parser.add_argument("--blocks", type=int, default=520)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--sweep", type=int, default=3, help="members of the sweep; 0 for the harvest alone")
    arguments = parser.parse_args()
    device = prepare_torch(load_settings())
    model = load_model(ModelConfig(arguments.model), device)
    text = RandomText(model.shape.d_vocab, arguments.blocks)
    stream = Stream(text, 0, BATCH * CHUNK_BATCHES, 0, arguments.dtype)
    last = model.shape.n_layers - 1
    cases = {
        "z of all layers": expand_sites(["z"], "all", None, model.shape),
        f"q, k of all heads of layer {last}": expand_sites(["q", "k"], [last], "all", model.shape),
    }
    threads = torch.get_num_threads()
    print(f"machine: {platform.machine()}, {threads} threads, {device}, torch {torch.__version__}")
    print(
        f"model {model.name} {tuple(model.shape)}; {arguments.blocks} blocks of {CONTEXT}, {arguments.dtype}"
    )
    for title, sites in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            tokens = chunks(stream) * stream.chunk_tokens
            show(f"harvest, {title}", harvest_rows(model, stream, sites, root / "harvest"), tokens)
            if arguments.sweep:
                members = [
                    SAEConfig(d_sae=4 * sites[0].d_in(model.shape), k=8 * 2**i, label=str(i))
                    for i in range(arguments.sweep)
                ]
                seconds = sweep_rows(model, stream, sites, root, members)
                shown = f"sweep of {len(members)} TopK SAEs (4 d_in wide) per site, {title}"
                show(shown, seconds, tokens * len(members))


if __name__ == "__main__":
    main()
