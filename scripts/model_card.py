"""Measure a GPT-2 folder and write its model card: ``card.json`` for programs, ``README.md`` for people.

Everything is measured on the weights as they lie in the folder (float16), read as float32: the loss on
held-out text, the loss on random tokens given twice, and scores of every head as ``atlas.heads.scores``
defines them. How the weights were made cannot be measured: that part, ``history``, is kept from run to run.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from atlas.errors import ModelError
from atlas.heads.scores import HeadScores
from atlas.lm.repeats import random_repeats

EVAL_BLOCKS = 64  # at most, of each held-out text
EVAL_BATCH = 8
REPEAT_BLOCKS, REPEAT_LENGTH, REPEAT_SEED = 64, 100, 7
SCORES = ("previous_token", "induction", "duplicate")

Card = dict[str, Any]


def load(folder: Path, attention: str = "eager") -> GPT2LMHeadModel:
    """Return the model of a folder in float32."""
    try:
        config = GPT2Config.from_pretrained(folder)
        config.activation_function = "gelu_pytorch_tanh"  # gelu_new, fused
        return GPT2LMHeadModel.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation=attention, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model folder '{folder}' cannot be read: {str(error).splitlines()[0]}") from error


def blocks(tokens: Tensor, n_ctx: int, bos: int) -> tuple[Tensor, Tensor]:
    """Cut a token stream into inputs that start with BOS and their next tokens, [block, n_ctx] each."""
    n = min(EVAL_BLOCKS, (len(tokens) - 1) // n_ctx)
    inputs = tokens[: n * n_ctx].view(n, n_ctx).long().clone()
    targets = tokens[1 : n * n_ctx + 1].view(n, n_ctx).long()
    inputs[:, 0] = bos
    return inputs, targets


def _batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, EVAL_BATCH) for tensor in tensors), strict=True)


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, tokens: Tensor) -> float:
    """Return the mean loss in nats per token over the first blocks of a held-out stream."""
    inputs, targets = blocks(tokens, model.config.n_positions, model.config.bos_token_id)
    total = 0.0
    for x, y in _batches(inputs, targets):
        logits = model(x.to(model.device)).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), y.to(model.device).flatten(), reduction="sum").item()
    return total / targets.numel()


def repeats(model: GPT2LMHeadModel) -> Tensor:
    """Return the blocks of random tokens, given twice, on which heads are scored."""
    config = model.config
    return random_repeats(
        REPEAT_BLOCKS, REPEAT_LENGTH, config.vocab_size, bos=config.bos_token_id, seed=REPEAT_SEED
    )


@torch.no_grad()
def repeat_losses(model: GPT2LMHeadModel) -> tuple[float, float]:
    """Return the loss on the first and on the second copy of random tokens."""
    losses = []
    for (x,) in _batches(repeats(model).to(model.device)):
        logits = model(x[:, :-1]).logits.float()
        losses.append(
            F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="none").view(len(x), -1)
        )
    loss = torch.cat(losses)
    return loss[:, :REPEAT_LENGTH].mean().item(), loss[:, REPEAT_LENGTH:].mean().item()


@torch.no_grad()
def head_scores(model: GPT2LMHeadModel, tokens: Tensor) -> HeadScores:
    """Return every head's scores on a held-out stream and on random repeats (needs eager attention)."""
    config = model.config
    scores = HeadScores(config.n_layer, config.n_head)
    inputs, _ = blocks(tokens, config.n_positions, config.bos_token_id)
    for (x,) in _batches(inputs):
        for layer, pattern in enumerate(model(x.to(model.device), output_attentions=True).attentions):
            scores.update_text(layer, pattern)
    for (x,) in _batches(repeats(model)):
        for layer, pattern in enumerate(model(x.to(model.device), output_attentions=True).attentions):
            scores.update_repeats(layer, pattern, REPEAT_LENGTH)
    return scores


def strongest(table: Tensor, n: int = 5) -> list[dict[str, float | str]]:
    """Return the n heads with the largest value.

    >>> strongest(torch.tensor([[0.1, 0.2], [0.9, 0.3]]), 1)
    [{'head': 'L1H0', 'value': 0.9}]
    """
    values, places = table.flatten().topk(min(n, table.numel()))
    width = table.shape[1]
    return [
        {"head": f"L{int(place) // width}H{int(place) % width}", "value": round(float(value), 4)}
        for value, place in zip(values, places, strict=True)
    ]


def measure(folder: Path, held_out: Mapping[str, Tensor], device: torch.device) -> Card:
    """Return the measured part of a card; head scores on text are taken on the first held-out stream."""
    model = load(folder).to(device).eval()
    first = next(iter(held_out))
    usable = {name: tokens for name, tokens in held_out.items() if len(tokens) > model.config.n_positions}
    copies = repeat_losses(model)
    tables = {name: head_scores(model, tokens) for name, tokens in usable.items()}
    on_others = {name: strongest(tables[name].table("previous_token")) for name in usable if name != first}
    return {
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "shape": _shape(model),
        "held_out_loss": {name: round(held_out_loss(model, tokens), 4) for name, tokens in usable.items()},
        "random_repeats": {
            "blocks": REPEAT_BLOCKS,
            "length": REPEAT_LENGTH,
            "seed": REPEAT_SEED,
            "loss_first_copy": round(copies[0], 4),
            "loss_second_copy": round(copies[1], 4),
        },
        "head_scores": {name: _score(tables[first], name, first) for name in SCORES},
        "previous_token_on_other_text": on_others,
    }


def _shape(model: GPT2LMHeadModel) -> Card:
    config = model.config
    attention_only = config.n_inner == 1
    return {
        "n_layers": config.n_layer,
        "n_heads": config.n_head,
        "d_model": config.n_embd,
        "d_head": config.n_embd // config.n_head,
        "d_vocab": config.vocab_size,
        "n_ctx": config.n_positions,
        "d_mlp": 0 if attention_only else config.n_inner or 4 * config.n_embd,
        "tied_embeddings": bool(config.tie_word_embeddings),
        "parameters": sum(
            p.numel() for name, p in model.named_parameters() if not (attention_only and ".mlp." in name)
        ),
    }


def _score(scores: HeadScores, name: str, text: str) -> Card:
    table = scores.table(name)
    how = f"held-out text of {text}" if name == "previous_token" else "random repeats"
    return {
        "how": how,
        "n": int(scores.counts[name][0]),
        "strongest": strongest(table),
        "values": [[round(value, 4) for value in row] for row in table.tolist()],
    }


# --------------------------------------------------------------------------- files


def read_history(folder: Path) -> list[Card]:
    """Return how the weights of a folder were made, as far as its card tells."""
    path = folder / "card.json"
    return json.loads(path.read_text())["history"] if path.exists() else []


def write_card(folder: Path, name: str, history: list[Card], measured: Card) -> None:
    """Write ``card.json`` and ``README.md`` into the model's folder."""
    totals = {key: sum(int(run.get(key, 0)) for run in history) for key in ("tokens", "steps")}
    card = {"name": name, "licence": "MIT", **totals, "history": history, **measured}
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf8")
    (folder / "README.md").write_text(render(card), encoding="utf8")


def render(card: Card) -> str:
    """Return the card as Markdown."""
    tables = [_table(card, score) for score in SCORES]
    return "\n\n".join([_about(card), _made(card), _losses(card), *tables]) + "\n"


def _about(card: Card) -> str:
    shape = card["shape"]
    mlp = (
        f"MLP {shape['d_mlp']}"
        if shape["d_mlp"]
        else "attention only (stored with an MLP of width 1, all zero)"
    )
    return f"""# {card["name"]}

A small language model to study attention heads on: GPT-2 architecture, {shape["n_layers"]} layers x
{shape["n_heads"]} heads = {shape["n_layers"] * shape["n_heads"]} heads, d_model {shape["d_model"]}, d_head \
{shape["d_head"]}, {mlp}, context {shape["n_ctx"]},
{"tied" if shape["tied_embeddings"] else "untied"} embeddings, {shape["parameters"] / 1e6:.2f} M parameters, \
stored in float16. Its own byte-level BPE of {shape["d_vocab"]:,} tokens;
token 0, `<|endoftext|>`, is BOS and stands between documents. It knows Python documentation, Python code and
some English. It is no assistant and knows no facts; use it for interpretability alone.

Measured on the float16 weights in this folder, read as float32 (`model.safetensors` has SHA-256
`{card["weights_sha256"]}`). `card.json` holds the same numbers.
A text is held out by the CRC-32 of its pieces (one in 64)."""


def _made(card: Card) -> str:
    lines = [
        "## How it was made",
        f"{card['tokens'] / 1e6:.1f} M tokens in {card['steps']:,} steps. "
        "Each run goes on from the one before.",
    ]
    for number, run in enumerate(card["history"], 1):
        facts = "; ".join(f"{key.replace('_', ' ')}: {_shown(value)}" for key, value in run.items())
        lines.append(f"{number}. {facts}")
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:])


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _losses(card: Card) -> str:
    rows = "\n".join(f"| {name} | {loss:.3f} |" for name, loss in card["held_out_loss"].items())
    random = card["random_repeats"]
    return f"""## Loss

| Held-out text | nats per token |
|---|---|
{rows}

{random["length"]} random tokens twice ({random["blocks"]} blocks): {random["loss_first_copy"]:.2f} nats per \
token on the first copy,
{random["loss_second_copy"]:.2f} on the second."""


def _table(card: Card, score: str) -> str:
    entry = card["head_scores"][score]
    best = ", ".join(f"{head['head']} {head['value']:.3f}" for head in entry["strongest"])
    head = "| layer | " + " | ".join(f"H{i}" for i in range(len(entry["values"][0]))) + " |"
    rule = "|---" * (len(entry["values"][0]) + 1) + "|"
    rows = [
        f"| {i} | " + " | ".join(_cell(value) for value in row) + " |"
        for i, row in enumerate(entry["values"])
    ]
    title = f"## {score.replace('_', '-').capitalize()} score of every head"
    lines = [title, f"On {entry['how']}, {entry['n']:,} destinations. Strongest: {best}."]
    if score == "previous_token":
        lines += [_elsewhere(card)] if card["previous_token_on_other_text"] else []
    return "\n\n".join(lines) + "\n\n" + "\n".join([head, rule, *rows])


def _elsewhere(card: Card) -> str:
    rows = [
        f"| {name} | " + ", ".join(f"{head['head']} {head['value']:.3f}" for head in heads) + " |"
        for name, heads in card["previous_token_on_other_text"].items()
    ]
    return "\n".join(["| Other held-out text | Strongest |", "|---|---|", *rows])


def _cell(value: float) -> str:
    shown = f"{value:.3f}".removeprefix("0")
    return f"**{shown}**" if value > 0.3 else shown
