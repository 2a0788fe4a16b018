"""How long does everything take that is tried with a head's SAEs on q and k? For all heads of a model.

    python -m benchmarks.pairs [--model docs-12l] [--width 256] [--repeats 16] [--targets 2]

Runs the experiments of one pair (random tokens twice, every variant; two prompts) in the first, a middle and
the last layer, with SAEs of random directions (TopK 8), and multiplies the mean by the number of heads.
Seconds by the clock and of all processors.
"""

import argparse
import time
from dataclasses import replace

import torch

from atlas.circuits.pairs.pair import make_pair
from atlas.circuits.pairs.prompts import look
from atlas.circuits.pairs.repeats import Repeats, Target
from atlas.configs import ModelConfig, QKConfig
from atlas.corpus.tokens import load_tokenizer
from atlas.lm.load import LanguageModel, load_model
from atlas.lm.runtime import prepare_torch
from atlas.progress import NullProgress
from atlas.sae.model import SAE, SAEInfo
from atlas.settings import load_settings
from atlas.sites import Site
from benchmarks.machine import machine_line

K = 8


def random_sae(model: LanguageModel, site: Site, width: int) -> SAE:
    rows = torch.nn.functional.normalize(
        torch.randn(width, model.shape.d_head, generator=torch.Generator().manual_seed(0))
    )
    info = SAEInfo(
        f"{model.name}/{site.name}.topk-{width}", model.name, "raw", site, "topk", K, None, 0, "random",
        128, 0, "random", "benchmark",
    )  # fmt: skip
    zeros = torch.zeros(width), torch.zeros(model.shape.d_head)
    return SAE(info, rows.T.contiguous(), zeros[0], rows, zeros[1])


def one_pair(model: LanguageModel, layer: int, width: int, config: QKConfig) -> None:
    pair = make_pair(*(random_sae(model, Site(side, layer, 0), width) for side in ("q", "k")))
    tokenizer = load_tokenizer(model.files.path)
    bos = int(tokenizer.bos_token_id or 0)
    work = Repeats(model, pair, bos=bos, n=config.repeats, half=config.half, seed=config.seed)
    targets = [Target(number, 100 + number) for number in range(config.targets)]
    work.curves(targets, config.scale, NullProgress())
    for text in config.prompts:
        look(model, pair, [bos, *tokenizer(text, add_special_tokens=False)["input_ids"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="docs-12l")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=QKConfig().repeats)
    parser.add_argument("--targets", type=int, default=QKConfig().targets)
    arguments = parser.parse_args()
    device = prepare_torch(load_settings())
    model = load_model(ModelConfig(arguments.model), device)
    config = replace(QKConfig(), repeats=arguments.repeats, targets=arguments.targets)
    n_layers, n_heads = model.shape.n_layers, model.shape.n_heads
    print(machine_line(device))
    print(f"{model.name}, SAEs of width {arguments.width} (TopK {K}), {config.repeats} blocks of repeats, "
          f"{config.targets} targets, {len(config.prompts)} prompts")  # fmt: skip
    print(f"{'layer':>6}{'seconds':>10}{'of processors':>15}")
    one_pair(model, n_layers - 1, arguments.width, replace(config, repeats=1, targets=1))  # warms up
    clocks, processors = [], []
    for layer in (0, n_layers // 2, n_layers - 1):
        clock, processor = time.perf_counter(), time.process_time()
        one_pair(model, layer, arguments.width, config)
        clocks.append(time.perf_counter() - clock)
        processors.append(time.process_time() - processor)
        print(f"{layer:6}{clocks[-1]:10.2f}{processors[-1]:15.2f}")
    n = n_layers * n_heads
    all_heads = [n * sum(times) / len(times) / 60 for times in (clocks, processors)]
    print(f"all {n} heads: {all_heads[0]:.1f} minutes, {all_heads[1]:.1f} of processors")


if __name__ == "__main__":
    main()
