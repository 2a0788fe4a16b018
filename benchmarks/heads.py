"""How long it takes to measure every head of a model, part by part, and what that makes for GPT-2 small.

    python benchmarks/heads.py [--model docs-12l] [--gpt2]

Each part is run on a sample and scaled to what a build asks for by default ([evaluation] and [heads]): scores
and matches on 64 blocks of text, random repeats, prefix curves, cut matches, weights, ablation of every head
on 8 blocks, and two tasks of 12 prompts. ``--gpt2`` takes a model of GPT-2 small's sizes with random weights,
so that nothing is fetched: how long a pass takes does not depend on what the weights hold. On a CPU these are
seconds of processor time over all threads, since others may share the machine; on a GPU wall-clock seconds.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from machine import machine_line

from atlas.configs import EvalConfig, HeadsConfig, ModelConfig
from atlas.corpus.tokens import bos_id, load_tokenizer
from atlas.heads import prefixes, rows
from atlas.heads.ablation import ablate
from atlas.heads.measure import LENGTH, read_text
from atlas.heads.prompts import all_tasks, make_prompts
from atlas.lm.files import find_model
from atlas.lm.load import LanguageModel, load_model
from atlas.lm.repeats import random_repeats
from atlas.lm.runtime import prepare_torch
from atlas.settings import load_settings

CONTEXT = 128


def seconds(work: Callable[[], object], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def random_gpt2(folder: Path) -> Path:
    """GPT-2 small's sizes, random weights, the bundled tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    for path in find_model("docs-12l").path.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def parts(model: LanguageModel, sample: int) -> Iterable[tuple[str, str, float]]:
    """Name, size and seconds of each part as a build has it."""
    shape, heads, device = model.shape, HeadsConfig(), model.device
    tokenizer = load_tokenizer(model.files.path)
    bos = bos_id(tokenizer) or 0
    random = torch.Generator().manual_seed(0)
    text = torch.randint(shape.d_vocab, (sample, CONTEXT), generator=random)
    text[:, 0], text[:, 60:70] = bos, text[:, 20:30]
    blocks = EvalConfig().blocks
    read_text(model, text[:1])
    took = seconds(lambda: read_text(model, text), device)
    yield "scores and matches on text", f"{blocks} blocks", took * blocks / sample
    repeats = random_repeats(sample, LENGTH, shape.d_vocab, bos=bos, seed=0)
    took = seconds(lambda: read_text(model, repeats), device)
    yield "random repeats", f"{heads.repeats} blocks", took * heads.repeats / sample
    made = prefixes.prefix_sequences(sample, prefixes.SEQUENCE, shape.d_vocab, bos=bos, seed=0)
    took = seconds(lambda: prefixes.prefix_curve(model, made), device)
    yield "prefix curves", f"{heads.repeats} x {prefixes.LONGEST}", took * heads.repeats / sample
    found = prefixes.long_matches(text, shape.d_vocab, bos=bos, seed=0)
    took = seconds(lambda: prefixes.corruption(model, found), device)
    yield "long matches, cut", f"{blocks} pairs", took * blocks / len(found.query)
    yield (
        "weights",
        f"{shape.n_layers * shape.n_heads} heads",
        seconds(lambda: rows.weight_rows(model, bos, tokenizer), device),
    )
    yield from ablations(model, text[:1], heads)


def ablations(
    model: LanguageModel, block: torch.Tensor, heads: HeadsConfig
) -> Iterable[tuple[str, str, float]]:
    """Ablation of a first, a middle and a last layer, scaled to all: cost falls linearly by layer."""
    shape, tokenizer = model.shape, load_tokenizer(model.files.path)
    layers = sorted({0, shape.n_layers // 2, shape.n_layers - 1})
    means = [torch.zeros(shape.n_heads, shape.d_head, device=model.device) for _ in layers]
    scale = shape.n_layers / len(layers)
    everything = torch.ones(len(block), CONTEXT - 1, dtype=torch.bool)
    took = seconds(lambda: ablate(model, block, everything, means, layers), model.device)
    runs = 2 * shape.n_layers * shape.n_heads
    n = heads.ablation_blocks
    yield "loss without each head", f"{n} blocks x {runs}", took * scale * n
    for task in all_tasks(()):
        some = make_prompts(task, tokenizer, 2, bos=0, n_ctx=shape.n_ctx)
        took = seconds(
            lambda some=some: ablate(model, some.tokens, some.counted, means, layers), model.device
        )
        yield f"task {task.name}", f"{heads.prompts} prompts x {runs}", took * scale * heads.prompts / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="docs-12l")
    parser.add_argument("--gpt2", action="store_true", help="a random model of GPT-2 small's sizes instead")
    parser.add_argument("--sample", type=int, default=4, help="blocks, sequences of each part's sample")
    args = parser.parse_args()
    device = prepare_torch(load_settings())
    with tempfile.TemporaryDirectory() as folder:
        name = str(random_gpt2(Path(folder) / "gpt2-random")) if args.gpt2 else args.model
        model = load_model(ModelConfig(name), device)
        print(f"{model.name}: {model.shape.n_layers} x {model.shape.n_heads} heads, {machine_line(device)}\n")
        print("| part | size | seconds |\n|---|---|---:|")
        total = 0.0
        for part, size, took in parts(model, args.sample):
            total += took
            print(f"| {part} | {size} | {took:.1f} |", flush=True)
        print(f"| all | | {total:.0f} |")


if __name__ == "__main__":
    main()
