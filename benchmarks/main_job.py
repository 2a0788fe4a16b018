"""Where the main job spends its time: forward pass, SAE training, corpus pass, DFA, on this machine.

    python benchmarks/main_job.py [--model docs-12l] [--expansion 4] [--k 32]

Prints a table with its inputs and the machine. Every row is the best of three runs.
"""

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch

from atlas.analysis.dfa import DFAPass, Kept
from atlas.analysis.shard import ShardPass
from atlas.configs import ModelConfig, SAEConfig
from atlas.lm.hooks import capture, logits_with
from atlas.lm.load import LanguageModel, load_model
from atlas.lm.runtime import prepare_torch
from atlas.progress import NullProgress
from atlas.sae.bank import Bank
from atlas.sae.model import SAE, SAEInfo
from atlas.settings import load_settings
from atlas.sites import Site, expand_sites

CONTEXT, BLOCKS, BATCH = 128, 16, 1024


class RandomText:
    """Random tokens in the shape of a token store."""

    class meta:  # noqa: N801
        context = CONTEXT

    def __init__(self, d_vocab: int) -> None:
        self._tokens = np.random.default_rng(0).integers(0, d_vocab, (BLOCKS, CONTEXT))

    def blocks(self, index: object) -> np.ndarray:
        return self._tokens[np.asarray(index)]


def best(run: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def ceiling() -> float:
    """Measured GFLOP/s of a large float32 matrix product."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / best(lambda: a @ b) / 1e9


def random_saes(model: LanguageModel, sites: tuple[Site, ...], expansion: int, k: int) -> list[SAE]:
    config, out = SAEConfig(expansion=expansion, k=k), []
    for site in sites:
        d_in = site.d_in(model.shape)
        bank = Bank(config, d_in, [site.name], 0, model.device)
        info = SAEInfo(
            site.name,
            model.name,
            "raw",
            site,
            "topk",
            k,
            None,
            0,
            "random",
            CONTEXT,
            0,
            "random",
            "benchmark",
        )
        W_enc, b_enc, W_dec, b_dec = (p[0].detach() for p in bank.parameters().values())
        out.append(SAE(info, W_enc.T.contiguous(), b_enc, W_dec, b_dec))
    return out


def kept_examples(d_sae: int, n: int, rng: np.random.Generator) -> Kept:
    return Kept(rng.integers(0, d_sae, n), rng.integers(0, BLOCKS, n), rng.integers(1, CONTEXT, n))


@torch.no_grad()
def rows(model: LanguageModel, expansion: int, k: int) -> list[tuple[str, float, str]]:
    sites = expand_sites(["z"], "all", None, model.shape)
    text = RandomText(model.shape.d_vocab)
    tokens = torch.from_numpy(text.blocks(range(BLOCKS)))
    saes = random_saes(model, sites, expansion, k)
    names = [site.name for site in sites]
    bank = Bank(SAEConfig(expansion=expansion, k=k), saes[0].d_in, names, 0, model.device)
    activations, _ = capture(model, tokens, sites)
    x = torch.stack([activations[s][:, 1:].reshape(-1, saes[0].d_in)[:BATCH] for s in sites])
    dead = torch.zeros(len(sites), bank.d_sae, dtype=torch.bool)
    rng = np.random.default_rng(0)
    kept = [kept_examples(sae.d_sae, 2000, rng) for sae in saes]

    def train_step() -> None:
        with torch.enable_grad():
            bank.loss(x, dead).total.backward()

    n, seconds = tokens.numel(), {}
    seconds["forward pass, z of all layers kept"] = (best(lambda: capture(model, tokens, sites)), n, "tokens")
    seconds["forward pass with logits"] = (best(lambda: logits_with(model, tokens, {})), n, "tokens")
    seconds[f"loss and gradients of {len(sites)} SAEs"] = (best(train_step), BATCH, "tokens")
    shard = best(lambda: ShardPass(model, saes, text).update(range(BLOCKS)))
    seconds["corpus pass (forward, encode, keep)"] = (shard, n, "tokens")
    dfa = best(lambda: DFAPass(model, saes, kept).run(text, NullProgress()))
    seconds["DFA of kept examples"] = (dfa, 2000 * len(saes), "examples")
    return [(name, t, f"{count / t:,.0f} {unit}/s") for name, (t, count, unit) in seconds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="docs-12l")
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--k", type=int, default=32)
    arguments = parser.parse_args()
    device = prepare_torch(load_settings())
    model = load_model(ModelConfig(arguments.model), device)
    threads = torch.get_num_threads()
    print(f"machine: {platform.machine()}, {threads} threads, {device}, torch {torch.__version__}")
    print(f"float32 matrix product: {ceiling():.0f} GFLOP/s")
    shape = model.shape
    inputs = f"TopK k={arguments.k}, expansion {arguments.expansion}; context {CONTEXT}"
    print(f"model {model.name} {tuple(shape)}; {inputs}")
    for name, seconds, rate in rows(model, arguments.expansion, arguments.k):
        print(f"{name:44} {seconds * 1e3:10.1f} ms {rate:>24}")


if __name__ == "__main__":
    main()
