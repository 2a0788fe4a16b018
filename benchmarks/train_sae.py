"""How fast SAEs train on this machine: tokens/s, operations needed, and the share of what it can do.

    python benchmarks/train_sae.py [--quick] [--only a|b|c|d] [--steps 5] [--threads N]

(a) one z SAE, ReLU and TopK, 192 -> 3072 and 768 -> 24576, on synthetic activations; (b) the z of all 12
layers of docs-12l from one pass over the text against one layer alone; (c) all 288 q and k SAEs of docs-12l
(16 -> 256) in one bank against runs one after another; (d) all architectures at 192 -> 3072. A step is the
whole optimiser step: loss, gradients, Adam, unit rows, counters. No feature is dead, so AuxK adds nothing.
"""

import argparse
import time
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple, cast

import torch
from machine import RandomText, Seconds, ceiling, machine_line, timed

from atlas.configs import ARCHITECTURES, ModelConfig, SAEConfig, TrainConfig
from atlas.corpus.tokens import TokenStore
from atlas.lm.load import LanguageModel, load_model
from atlas.lm.runtime import prepare_torch
from atlas.sae.context import harvested
from atlas.sae.group import Group, Moment
from atlas.sae.harvest import Chunk, Harvest, Source, Stream
from atlas.sae.precision import fast_bfloat16, matmul_dtype
from atlas.sae.train import Training
from atlas.settings import load_settings
from atlas.sites import Site, expand_sites

DENSE_PRODUCTS = {"relu": 5, "jumprelu": 5, "gated": 7}
"""Products of batch x d_in x d_sae in a step: encode, decode, and the gradients of f, W_dec and W_enc; a
gated SAE decodes its gate, too, which gives the gate a second gradient. x needs no gradient."""
NEVER = 10**12


class Options(NamedTuple):
    device: torch.device
    batch: int
    steps: int
    quick: bool
    precision: str


class Needed(NamedTuple):
    """Floating-point operations of one step in its matrix products."""

    needed: float
    as_if_dense: float


def operations(config: SAEConfig, d_in: int, n_members: int, batch: int) -> Needed:
    """Dense architectures: five (gated: seven) dense products. With k: one to encode, and k of d_sae in the
    decoder and in the gradients of the values, of W_dec and of W_enc."""
    d_sae = config.width(d_in)
    dense, sparse = 2.0 * batch * d_in * d_sae, 2.0 * batch * d_in * config.k
    if config.has_k:
        return Needed(n_members * (dense + 4 * sparse), n_members * 5 * dense)
    products = DENSE_PRODUCTS[config.architecture]
    return Needed(n_members * products * dense, n_members * products * dense)


def time_step(config: SAEConfig, d_in: int, n_members: int, options: Options) -> Seconds:
    """One whole step of a bank on synthetic activations: a few random directions per token, and noise."""
    device, generator = options.device, torch.Generator().manual_seed(0)
    sites = [Site("z", layer) for layer in range(n_members)]
    train = TrainConfig(batch=options.batch, log_every=NEVER)
    dtype = matmul_dtype(options.precision, device)
    names = [site.name for site in sites]
    group = Group([config] * n_members, sites, names, d_in, train, device, dtype)
    directions = torch.randn(4 * d_in, d_in, generator=generator)
    active = torch.rand(options.batch, 4 * d_in, generator=generator) < 8 / (4 * d_in)
    rows = active.float() @ directions + 0.1 * torch.randn(options.batch, d_in, generator=generator)
    x = rows.to(device).expand(n_members, -1, -1).contiguous()
    group.start(list(x))
    x.mul_(group.scale[:, None, None])
    numbers = count(1)

    def step() -> None:
        group.step(x, Moment(next(numbers), NEVER, 1e-3, None), None)

    return timed(step, device, options.steps)


def step_row(config: SAEConfig, d_in: int, options: Options, square: float) -> str:
    seconds = time_step(config, d_in, 1, options)
    needed, as_dense = operations(config, d_in, 1, options.batch)
    dtype = matmul_dtype(options.precision, options.device)
    own = ceiling(options.device, (options.batch, d_in, config.width(d_in)), dtype)
    name = f"{config.architecture} {d_in} -> {config.width(d_in)}"
    return (
        f"{name:26}{options.batch / seconds.median:10,.0f}{seconds.median:9.3f}{seconds.best:9.3f}"
        f"{needed / 1e9:9.1f}{as_dense / 1e9:9.1f}{needed / seconds.median / 1e9:9.0f}"
        f"{square / 1e9:9.0f}{own / 1e9:9.0f}"
        f"{needed / seconds.median / square:8.0%}{as_dense / seconds.median / square:9.0%}"
    )


def print_steps(title: str, rows: Sequence[tuple[SAEConfig, int]], options: Options, square: float) -> None:
    print(f"\n{title}; batch {options.batch}, k = {rows[0][0].k}, median of {options.steps} steps")
    print(
        f"{'':26}{'tokens/s':>10}{'s/step':>9}{'best':>9}{'GFLOP':>9}{'as dense':>9}{'GFLOP/s':>9}"
        f"{'ceiling':>9}{'encode':>9}{'reached':>8}{'as dense':>9}"
    )
    for config, d_in in rows:
        print(step_row(config, d_in, options, square), flush=True)


class TimedSource:
    """Chunks of another source, and how long each took."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.seconds: list[float] = []

    def chunk(self, number: int) -> Chunk:
        start = time.perf_counter()
        chunk = self.source.chunk(number)
        self.seconds.append(time.perf_counter() - start)
        return chunk


class Pass(NamedTuple):
    """Training from text: seconds per chunk, of these in the model, and the chunk's tokens."""

    total: float
    harvest: float
    tokens: int

    def line(self, name: str) -> str:
        rate, share = self.tokens / self.total, self.harvest / self.total
        steps = self.total - self.harvest
        return f"{name:40}{rate:12,.0f}{self.total:11.3f}{self.harvest:11.3f}{steps:11.3f}{share:9.0%}"


PASS_HEAD = f"{'':40}{'tokens/s':>12}{'s/chunk':>11}{'forward':>11}{'steps':>11}{'forward':>9}"


def time_pass(model: LanguageModel, sites: Sequence[Site], config: SAEConfig, options: Options) -> Pass:
    """The best of several chunks, harvest and steps; the first chunk is left out."""
    chunk_batches = 1 if options.quick else 4
    repeats = 1 if options.quick else 3
    tokens = options.batch * chunk_batches
    train = TrainConfig(
        tokens=tokens * (repeats + 1),
        batch=options.batch,
        chunk_batches=chunk_batches,
        log_every=NEVER,
        precision=options.precision,
    )
    text = cast(TokenStore, RandomText(model.shape.d_vocab, 256))
    stream = Stream(text, 0, tokens, train.seed)
    source = TimedSource(Harvest(model, stream, harvested(sites, [config])))
    training = Training(model, stream, sites, [config], train, source)
    seconds = timed(training.train_chunk, options.device, repeats).best
    return Pass(seconds, min(source.seconds[1:]), tokens)


def print_layers(model: LanguageModel, options: Options) -> None:
    sites = expand_sites(["z"], "all", None, model.shape)
    config = SAEConfig("topk", expansion=4 if options.quick else 16, k=32)
    width = config.width(sites[0].d_in(model.shape))
    print(f"\n(b) z of {model.name}, topk {sites[0].d_in(model.shape)} -> {width}, from text, best chunk")
    print(PASS_HEAD)
    together = time_pass(model, sites, config, options)
    print(together.line(f"all {len(sites)} layers from one pass"), flush=True)
    alone = time_pass(model, sites[-1:], config, options)
    print(alone.line(f"{sites[-1].name} alone"))
    n = len(sites)
    print(
        f"one pass costs {together.harvest / alone.harvest:.2f} forward passes of one layer's run and is "
        f"{n * alone.total / together.total:.1f}x faster than {n} runs of the last layer"
    )


def print_heads(model: LanguageModel, options: Options) -> None:
    sites = expand_sites(["q", "k"], "all", "all", model.shape)
    config = SAEConfig("topk", expansion=16, k=32 if not options.quick else 8)
    d_in = sites[0].d_in(model.shape)
    width, some = config.width(d_in), [sites[0], sites[len(sites) // 2], sites[-1]]
    print(f"\n(c) q and k of {model.name}, topk {d_in} -> {width}, k = {config.k}, from text, best chunk")
    print(PASS_HEAD)
    bank = time_pass(model, sites, config, options)
    print(bank.line(f"{len(sites)} SAEs in one bank"), flush=True)
    runs = []
    for site in some:
        runs.append(time_pass(model, [site], config, options))
        print(runs[-1].line(f"{site.name} alone"), flush=True)
    n = len(sites)
    total = n * sum(run.total for run in runs) / len(runs)
    steps = n * sum(run.total - run.harvest for run in runs) / len(runs)
    print(
        f"{n} runs one after another, {n} times the mean of these {len(runs)}: {total:.0f} s per chunk; the "
        f"bank is {total / bank.total:.1f}x faster (its steps alone: "
        f"{steps / (bank.total - bank.harvest):.1f}x)"
    )
    one, dtype = operations(config, d_in, n, options.batch), matmul_dtype(options.precision, options.device)
    own = ceiling(options.device, (options.batch, d_in, width), dtype, n=8)
    flops = one.needed * bank.tokens / options.batch / (bank.total - bank.harvest)
    print(
        f"the bank's steps reach {flops / 1e9:.0f} of the {own / 1e9:.0f} GFLOP/s that stacked products "
        f"{options.batch} x {d_in} x {width} reach ({flops / own:.0%})"
    )


def print_ceilings(options: Options) -> float:
    """Ceilings of square products; the one of the precision in use is returned."""
    size = 1024 if options.quick else 2048
    dtypes = [torch.float32, *([torch.bfloat16] if fast_bfloat16(options.device) else [])]
    found = {dtype: ceiling(options.device, (size, size, size), dtype) for dtype in dtypes}
    for dtype, rate in found.items():
        name = str(dtype).removeprefix("torch.")
        print(f"ceiling: {rate / 1e9:.0f} GFLOP/s, {name} product of {size} x {size} (best of 5)")
    print("encode: the same for the encoder's product; reached: of the ceiling; as dense: as if nothing")
    print("were sparse. A busy machine lowers all of these: compare 'best' with 's/step'.")
    return found[matmul_dtype(options.precision, options.device)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller batch and fewer, narrower SAEs")
    parser.add_argument("--only", choices="abcd", default="abcd", help="one part of the table")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in (a) and (d)")
    parser.add_argument("--threads", type=int, help="torch threads; without it torch's own choice")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "auto"), default="float32")
    parser.add_argument("--model", default="docs-12l", help="the model of (b) and (c)")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    device = prepare_torch(load_settings())
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    options = Options(device, 512 if chosen.quick else 4096, chosen.steps, chosen.quick, chosen.precision)
    print(machine_line(device) + f", products in {chosen.precision}")
    square = print_ceilings(options)
    small, large = SAEConfig(expansion=16).width(192), SAEConfig(expansion=32).width(768)
    if "a" in chosen.only:
        shapes = [(192, small)] if chosen.quick else [(192, small), (768, large)]
        rows = [(SAEConfig(a, d_sae=d), d_in) for d_in, d in shapes for a in ("relu", "topk")]
        print_steps("(a) one SAE, synthetic activations", rows, options, square)
    if "b" in chosen.only or "c" in chosen.only:
        model = load_model(ModelConfig(chosen.model), device)
        if "b" in chosen.only:
            print_layers(model, options)
        if "c" in chosen.only:
            print_heads(model, options)
    if "d" in chosen.only:
        rows = [(SAEConfig(a, d_sae=small), 192) for a in ARCHITECTURES]
        print_steps("(d) every architecture", rows, options, square)


if __name__ == "__main__":
    main()
