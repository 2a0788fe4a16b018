"""All measurements of a model's heads: one pass over text, some over made-up prompts, and ablations.

The text is read once: patterns of all layers for the scores and the matches, z for the means that ablation
needs. Everything else is of bounded size, whatever the length of the text.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.configs import HeadsConfig
from atlas.corpus.tokens import TokenStore, load_tokenizer
from atlas.heads import prefixes, rows
from atlas.heads.ablation import ablate
from atlas.heads.prompts import all_tasks, make_prompts
from atlas.heads.reach import reach_rows, update_reach
from atlas.heads.scores import HeadScores
from atlas.lm.hooks import capture
from atlas.lm.load import LanguageModel
from atlas.lm.repeats import random_repeats
from atlas.lm.runtime import batch_of
from atlas.progress import Progress
from atlas.sites import Site

BATCH_BLOCKS, LENGTH, SEED = 8, 60, 0
Rows = dict[str, list[dict[str, Any]]]


@dataclass
class TextPass:
    """What one pass over the text gives: score sums, matches by threshold, and sums of z."""

    scores: HeadScores
    matches: Int[Tensor, "layer head threshold prefix"]
    z: list[Float[Tensor, "n_heads d_head"]] = field(default_factory=list)
    n_tokens: int = 0

    def means(self) -> list[Float[Tensor, "n_heads d_head"]]:
        """Mean z of every head, by layer, position 0 left out."""
        return [total / max(1, self.n_tokens) for total in self.z]


class _Work:
    """How far the measurement is, in blocks that the model reads."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def ticking(self, message: str, times: int = 1) -> Callable[[int], None]:
        def tick(n: int) -> None:
            self.done = min(self.total, self.done + n * times)
            self.progress.update(self.done, self.total, message)

        return tick


@torch.no_grad()
def measure_heads(
    model: LanguageModel, store: TokenStore, blocks: int, config: HeadsConfig, progress: Progress
) -> Rows:
    """Rows of every table about heads alone, from the first ``blocks`` blocks of the text.

    Raises:
        ConfigError: a task's prompt is longer than the model's context, or has nothing to predict.
    """
    shape, bos = model.shape, store.meta.bos
    text = torch.from_numpy(store.blocks(range(min(blocks, len(store)))))
    length = min(LENGTH, (shape.n_ctx - 1) // 2)
    repeats = random_repeats(config.repeats, length, shape.d_vocab, bos=bos, seed=SEED)
    made = prefixes.prefix_sequences(
        config.repeats, min(prefixes.SEQUENCE, shape.n_ctx), shape.d_vocab, bos=bos, seed=SEED
    )
    long = prefixes.long_matches(text, shape.d_vocab, bos=bos, seed=SEED)
    tasks, prompts = _prompts(model, config, bos)
    ablated = text[: config.ablation_blocks]
    n_runs = 2 * shape.n_layers * shape.n_heads
    n_rows = len(ablated) + sum(len(p.texts) for p in prompts)
    fixed = len(text) + len(repeats) + made.tokens[:, :, 0].numel() + 2 * len(long.query)
    work = _Work(fixed + n_rows * n_runs, progress)

    seen = read_text(model, text, work.ticking("attention on text"))
    _read_repeats(model, repeats, length, seen.scores, work.ticking("attention on random repeats"))
    curve = prefixes.prefix_curve(model, made)
    work.ticking("prefixes")(made.tokens[:, :, 0].numel())
    cut = prefixes.corruption(model, long)
    work.ticking("long matches cut")(2 * len(long.query))

    found: Rows = {"head_scores": rows.score_rows(model, seen.scores.finish())}
    found["head_scores"] += rows.score_rows(model, reach_rows(seen.scores))
    weights = rows.weight_rows(model, bos, load_tokenizer(model.files.path))
    found["head_spectra"] = weights["head_spectra"]
    found["head_scores"] += weights["head_scores"]
    found["head_prefixes"] = rows.prefix_rows(model, curve)
    found["head_text_prefixes"] = rows.text_rows(model, seen.matches)
    found["head_corruption"] = rows.corruption_rows(model, cut)
    found["tasks"], found["head_task_effects"] = [], []
    means, layers, per_layer = seen.means(), range(shape.n_layers), 2 * shape.n_heads
    if len(ablated):
        tick = work.ticking("loss without a head", per_layer)
        everything = torch.ones(len(ablated), ablated.shape[1] - 1, dtype=torch.bool)
        effects = ablate(model, ablated, everything, means, layers, tick)
        found["head_scores"] += rows.ablation_rows(model, effects)
    for task, some in zip(tasks, prompts, strict=True):
        tick = work.ticking(f"task {task.name} without a head", per_layer)
        effects = ablate(model, some.tokens, some.counted, means, layers, tick)
        found["tasks"].append(rows.task_row(model, task, some, effects))
        found["head_task_effects"] += rows.task_effect_rows(model, task.name, layers, effects)
    return found


def _prompts(model: LanguageModel, config: HeadsConfig, bos: int) -> tuple[Sequence[Any], list[Any]]:
    """The tasks and their prompts; none where none are asked for, or the tokenizer knows no offsets."""
    tokenizer = load_tokenizer(model.files.path)
    if not config.prompts or not tokenizer.is_fast:
        return (), []
    tasks = all_tasks(config.task)
    n_ctx = model.shape.n_ctx
    return tasks, [make_prompts(task, tokenizer, config.prompts, bos=bos, n_ctx=n_ctx) for task in tasks]


def read_text(
    model: LanguageModel, text: Int[Tensor, "block pos"], tick: Callable[[int], None] = lambda _: None
) -> TextPass:
    """The one pass over the text."""
    shape = model.shape
    width = (shape.n_layers, shape.n_heads, len(prefixes.THRESHOLDS), prefixes.COUNTED + 1)
    scores = HeadScores(shape.n_layers, shape.n_heads)
    z = [torch.zeros(shape.n_heads, shape.d_head, dtype=torch.float64) for _ in range(shape.n_layers)]
    seen = TextPass(scores, torch.zeros(width, dtype=torch.int64), z)
    sites = [Site("z", layer) for layer in range(shape.n_layers)]
    for tokens in torch.split(text, batch_of(BATCH_BLOCKS)):
        batch = tokens.to(model.device)
        matches = prefixes.match_lengths(batch)
        held, patterns = capture(model, batch, sites, _hooks(model))
        for layer, (hook, site) in enumerate(zip(_hooks(model), sites, strict=True)):
            pattern = patterns[hook].float()
            scores.update_text(layer, pattern, batch)
            update_reach(scores, layer, pattern)
            seen.matches[layer] += prefixes.count_matches(pattern, matches)
            late = held[site][:, 1:].reshape(len(tokens), -1, shape.n_heads, shape.d_head)
            seen.z[layer] += late.double().sum((0, 1)).cpu()
        seen.n_tokens += len(tokens) * (tokens.shape[1] - 1)
        tick(len(tokens))
    return seen


def _read_repeats(
    model: LanguageModel,
    repeats: Int[Tensor, "block pos"],
    length: int,
    scores: HeadScores,
    tick: Callable[[int], None],
) -> None:
    for tokens in torch.split(repeats, batch_of(BATCH_BLOCKS)):
        _, patterns = capture(model, tokens.to(model.device), (), _hooks(model))
        for layer, hook in enumerate(_hooks(model)):
            scores.update_repeats(layer, patterns[hook].float(), length)
        tick(len(tokens))


def _hooks(model: LanguageModel) -> list[str]:
    return [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.shape.n_layers)]


@torch.no_grad()
def measure_tasks(
    model: LanguageModel,
    text: Int[Tensor, "block pos"],
    config: HeadsConfig,
    layers: Iterable[int],
    bos: int,
    progress: Progress,
) -> Rows:
    """Rows of ``tasks`` and ``head_task_effects`` alone, of some tasks and layers; the text gives means."""
    chosen, tokenizer = list(layers), load_tokenizer(model.files.path)
    means = read_text(model, text).means()
    found: Rows = {"tasks": [], "head_task_effects": []}
    total = len(config.task) * config.prompts * len(chosen)
    work = _Work(total, progress)
    for task in config.task:
        some = make_prompts(task, tokenizer, config.prompts, bos=bos, n_ctx=model.shape.n_ctx)
        kept = [means[layer] for layer in chosen]
        effects = ablate(model, some.tokens, some.counted, kept, chosen, work.ticking(f"task {task.name}"))
        found["tasks"].append(rows.task_row(model, task, some, effects))
        found["head_task_effects"] += rows.task_effect_rows(model, task.name, chosen, effects)
    return found
