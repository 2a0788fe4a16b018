"""How long circuit experiments take: a splice, a trace, a block of a scan, one feature of the IOI suite.

    python benchmarks/circuits.py [--gpt2-size] [--d-sae 768] [--prompts 100] [--repeats 3]

SAEs are random (TopK, k = 24) on z and resid_pre of every layer: what they cost does not depend on what they
learned. ``--gpt2-size`` takes a random model of GPT-2 small's shape (whose own weights are not shipped) and
d_sae 24,576. On a CPU these are processor seconds. The time of the suite is put together from its parts:
two layers with 400 features each.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from machine import machine_line, timed

from atlas.circuits.ioi_features import ablation_effect, at_s2, path_effect
from atlas.circuits.ioi_prompts import draw_prompts, tokenised, words_of
from atlas.circuits.ioi_runs import Runs
from atlas.circuits.nodes import Bounds
from atlas.circuits.scan import PathScan, Scanned
from atlas.circuits.splice import run_spliced
from atlas.circuits.trace import Tracer
from atlas.configs import ModelConfig
from atlas.lm.files import find_model
from atlas.lm.hooks import logits_with
from atlas.lm.load import LanguageModel, load_model
from atlas.lm.runtime import prepare_torch
from atlas.sae.model import SAE, SAEInfo
from atlas.settings import load_settings
from atlas.sites import Site

K = 24


def gpt2_sized(folder: Path) -> Path:
    """A random model of GPT-2 small's shape, with the bundled tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    for file in find_model("docs-12l").path.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def random_sae(model: LanguageModel, site: Site, d_sae: int) -> SAE:
    g, d_in = torch.Generator().manual_seed(site.layer), site.d_in(model.shape)
    info = SAEInfo(
        f"random/{site.name}", model.name, model.processing, site, "topk", K, None, 0, "none", 128, 0, "", ""
    )
    shapes = ((d_in, d_sae), (d_sae,), (d_sae, d_in), (d_in,))
    tensors = [torch.randn(shape, generator=g).to(model.device) / d_in**0.5 for shape in shapes]
    return SAE(info, *tensors)


def rows(model: LanguageModel, d_sae: int, prompts: int, repeats: int) -> dict[str, float]:
    layers = range(model.shape.n_layers)
    z = [random_sae(model, Site("z", n), d_sae) for n in layers]
    tracer = Tracer(model, [*z, *(random_sae(model, Site("resid_pre", n), d_sae) for n in layers)])
    runs = Runs(model, tokenised(model, draw_prompts(words_of(model.files.path), prompts)))
    tokens, half = runs.batch.tokens, model.shape.n_layers // 2
    block = torch.randint(1, 4000, (128,), generator=torch.Generator().manual_seed(0))
    seen = at_s2(runs, z[half])
    feature, head = int(seen.acts.sum(0).argmax()), (half + 2, 0)
    where = tracer.strongest(block[:20], z[half].info.name, 1)[0]

    def seconds(work):
        if model.device.type != "cpu":
            return timed(work, model.device, repeats).median
        work()
        start = time.process_time()  # other work on the machine does not count
        for _ in range(repeats):
            work()
        return (time.process_time() - start) / repeats

    return {
        "the model on the prompts": seconds(lambda: logits_with(model, tokens, {})),
        "the same through all z SAEs, with error terms": seconds(lambda: run_spliced(model, tokens, z)),
        "a trace of 40 nodes, 20 tokens": seconds(
            lambda: tracer.trace(block[:20], z[half].info.name, where[0], where[1], Bounds(4, 3, 40))
        ),
        "a block of 128 tokens in a scan": seconds(lambda: PathScan(tracer, Scanned()).block(block, 0)),
        "one feature set to zero at S2": seconds(lambda: ablation_effect(runs, seen, feature)),
        "one feature patched into a head's values": seconds(lambda: path_effect(runs, seen, feature, [head])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpt2-size", action="store_true")
    parser.add_argument("--d-sae", type=int)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    device = prepare_torch(load_settings())
    with tempfile.TemporaryDirectory() as folder:
        name = str(gpt2_sized(Path(folder) / "gpt2-size")) if asked.gpt2_size else "docs-12l"
        model = load_model(ModelConfig(name, "raw"), device)
        d_sae = asked.d_sae or (24_576 if asked.gpt2_size else 768)
        with torch.no_grad():
            found = rows(model, d_sae, asked.prompts, asked.repeats)
    kind = "processor seconds" if device.type == "cpu" else "seconds"
    print(f"{kind}, {model.name}, {asked.prompts} prompts, d_sae {d_sae:,}, {machine_line(device)}")
    for what, seconds in found.items():
        print(f"  {what:<50} {seconds:9.3f} s")
    ablated, patched = list(found.values())[-2:]
    print(f"  {'the IOI suite, 2 layers x 400 features':<50} {800 * (ablated + patched) / 60:9.1f} min")


if __name__ == "__main__":
    main()
