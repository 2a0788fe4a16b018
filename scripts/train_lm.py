"""Train a small GPT-2-shaped language model to study attention heads on, or train one on.

    python scripts/train_lm.py --shape docs-12l --minutes 120 --out docs-12l
    python scripts/train_lm.py --shape docs-2l --start-from docs-2l --text novels.jsonl.xz --out docs-2l-more
    python scripts/train_lm.py --shape docs-12l --start-from docs-12l --card-only --out docs-12l

Text comes from ``atlas.corpus.sources`` (any spec, --text can be repeated); by default the standard library's
documentation and code and the docstrings of the installed packages. One piece of 16,384 characters in 64 is
held out, chosen by its content. Matrices are trained with Muon, everything else with AdamW; the learning rate
warms up over 80 steps, holds, and falls to zero at the end of the planned minutes (or --steps, which makes a
run repeatable bit for bit on one machine). Runs on a GPU if there is one; computes in bfloat16 only where a
probe finds it faster. Ctrl-C saves a checkpoint; --resume goes on from it.

Writes a Hugging Face GPT-2 folder (float16) with its tokenizer, README.md and card.json.
"""

import argparse
import hashlib
import json
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import model_card
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from atlas.corpus.sources import CorpusSource, open_source
from atlas.errors import AtlasError, ConfigError, CorpusError

BOS, D_VOCAB, N_CTX = "<|endoftext|>", 4096, 256
PIECE_CHARS, HELD_OUT_ONE_IN = 16_384, 64
WARM_UP_STEPS = 80
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; an attention-only one has untied embeddings."""

    layers: int
    heads: int
    d_model: int
    attention_only: bool = False


SHAPES = {"docs-12l": Shape(12, 12, 192), "docs-2l": Shape(2, 8, 256, attention_only=True)}


# --------------------------------------------------------------------------- text


def pieces(source: CorpusSource) -> Iterator[str]:
    """Yield a corpus in pieces of at most PIECE_CHARS characters, each from one document."""
    for document in source.documents():
        for start in range(0, len(document.text), PIECE_CHARS):
            yield document.text[start : start + PIECE_CHARS]


def is_held_out(piece: str) -> bool:
    """Return whether a piece is held out: a matter of its content alone, whatever is read beside it."""
    return zlib.crc32(piece.encode()) % HELD_OUT_ONE_IN == 0


def short_name(source: CorpusSource) -> str:
    """Return a corpus's name for people: no folder, no suffix."""
    return Path(source.spec.partition("?")[0].removeprefix("text:")).name.partition(".")[0].replace(":", " ")


def named_sources(texts: Sequence[str]) -> dict[str, CorpusSource]:
    """Return the corpora of ``SPEC`` or ``NAME=SPEC`` arguments by the name the card gives them.

    >>> {name: source.spec for name, source in named_sources(["stdlib", "Pile=hf:a/b?field=x"]).items()}
    {'stdlib': 'stdlib', 'Pile': 'hf:a/b:train?field=x'}
    """
    sources: dict[str, CorpusSource] = {}
    for text in texts:
        name, equals, spec = text.partition("=")
        named = bool(equals) and "?" not in name
        source = open_source(spec if named else text)
        sources[name if named else short_name(source)] = source
    return sources


def train_tokenizer(sources: Sequence[CorpusSource], sample_one_in: int = 4) -> Tokenizer:
    """Train a byte-level BPE on a sample of the training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=D_VOCAB,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (piece for source in sources for piece in pieces(source))
    sample = (
        p
        for p in text
        if not is_held_out(p) and zlib.crc32(p.encode()) // HELD_OUT_ONE_IN % sample_one_in == 0
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def tokenise(source: CorpusSource, tokenizer: Tokenizer, cache: Path) -> tuple[Tensor, Tensor]:
    """Return a corpus's training and held-out tokens (int32), each piece after a BOS; cached by content."""
    key = hashlib.sha256(f"{source.identity()} {tokenizer.to_str()}".encode()).hexdigest()[:16]
    path = cache / f"{short_name(source)}-{key}.npz"
    if not path.exists():
        streams: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for batch in _chunked(pieces(source), 256):
            for piece, encoding in zip(
                batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True
            ):
                streams[is_held_out(piece)].append(np.array([0, *encoding.ids], dtype=np.uint16))
        cache.mkdir(parents=True, exist_ok=True)
        parts = [np.concatenate([np.zeros(0, np.uint16), *stream]) for stream in streams]
        np.savez(path.with_suffix(".part.npz"), train=parts[0], held_out=parts[1])
        path.with_suffix(".part.npz").replace(path)
    with np.load(path) as arrays:
        train, held_out = (torch.from_numpy(arrays[name].astype(np.int32)) for name in ("train", "held_out"))
    return train, held_out


def _chunked(items: Iterator[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@dataclass
class Texts:
    """The training and held-out streams of each text, and how often each is drawn."""

    train: dict[str, Tensor] = field(default_factory=dict)
    held_out: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor = field(default_factory=lambda: torch.zeros(0))

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random windows that start with BOS, as the model is used later, and their next tokens."""
        streams = list(self.train.values())
        windows = []
        for place in torch.multinomial(self.weights, size, replacement=True, generator=generator).tolist():
            stream = streams[place]
            start = int(torch.randint(0, len(stream) - N_CTX, (), generator=generator))
            windows.append(stream[start : start + N_CTX + 1])
        window = torch.stack(windows).long()
        x = window[:, :-1].clone()
        x[:, 0] = 0
        return x, window[:, 1:]


def read_texts(
    sources: dict[str, CorpusSource], weights: Sequence[float], tokenizer: Tokenizer, cache: Path
) -> Texts:
    """Tokenise every corpus; without weights each is drawn in proportion to its size."""
    texts = Texts()
    for name, source in sources.items():
        train, held_out = tokenise(source, tokenizer, cache)
        print(f"{name}: {len(train):,} tokens to train on, {len(held_out):,} held out", flush=True)
        if len(train) <= N_CTX:
            raise CorpusError(f"corpus '{source.spec}' has {len(train)} tokens; allowed: more than {N_CTX}")
        texts.train[name], texts.held_out[name] = train, held_out
    if weights and len(weights) != len(sources):
        raise ConfigError(
            f"--weights has {len(weights)} numbers; allowed: one for each of {len(sources)} texts"
        )
    texts.weights = torch.tensor([float(w) for w in weights or map(len, texts.train.values())])
    return texts


# --------------------------------------------------------------------------- the model and its optimiser


def build(shape: Shape) -> GPT2LMHeadModel:
    """Return an untrained model."""
    config = GPT2Config(
        vocab_size=D_VOCAB,
        n_positions=N_CTX,
        n_embd=shape.d_model,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=1 if shape.attention_only else None,
        tie_word_embeddings=not shape.attention_only,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config)


def start(shape: Shape, folder: Path | None) -> GPT2LMHeadModel:
    """Return the model to train: new, or the weights of a folder of the same shape."""
    model = build(shape) if folder is None else model_card.load(folder, attention="sdpa")
    c = model.config
    found = Shape(c.n_layer, c.n_head, c.n_embd, c.n_inner == 1)
    if found != shape or (c.vocab_size, c.n_positions) != (D_VOCAB, N_CTX):
        raise ConfigError(f"'{folder}' holds {found}; allowed: {shape}, {D_VOCAB} tokens, context {N_CTX}")
    c.use_cache = False
    if shape.attention_only:
        for block in model.transformer.h:
            for parameter in block.mlp.parameters():
                parameter.requires_grad_(False).zero_()
    return model.train()


class Optimiser:
    """Muon for the matrices inside the blocks, AdamW for embeddings, biases and LayerNorms.

    Muon (Jordan et al. 2024) makes the momentum of a matrix nearly orthogonal by five Newton-Schulz steps.
    It is written out here because torch's computes in bfloat16, which many CPUs only emulate; matrices of one
    shape go through together.
    """

    def __init__(self, model: GPT2LMHeadModel, muon_lr: float, adam_lr: float, weight_decay: float):
        inside = [p for p in model.transformer.h.parameters() if p.ndim == 2 and p.requires_grad]
        taken = {id(p) for p in inside}
        others = [p for p in model.parameters() if id(p) not in taken and p.requires_grad]
        groups = [
            {"params": [p for p in others if p.ndim == 2], "weight_decay": weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.98), fused=True)
        self.muon_lr, self.adam_lr, self.weight_decay = muon_lr, adam_lr, weight_decay
        self.by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in inside:
            self.by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
        self.momenta = [torch.stack([torch.zeros_like(p) for p in group]) for group in self.by_shape.values()]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update every parameter with the learning rates times ``scale`` and drop the gradients."""
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        self.adam.zero_grad()
        for matrices, momentum in zip(self.by_shape.values(), self.momenta, strict=True):
            gradient = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in matrices])
            momentum.lerp_(gradient, 0.05)
            updates = orthogonalise(gradient.lerp(momentum, 0.95))
            # GPT-2's matrices are stored [in, out]: a wide output gets the larger step.
            lr = self.muon_lr * scale
            for parameter, update in zip(matrices, updates, strict=True):
                stretch = max(1.0, parameter.shape[1] / parameter.shape[0]) ** 0.5
                parameter.mul_(1 - lr * self.weight_decay).add_(update, alpha=-lr * stretch)
                parameter.grad = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {"adam": self.adam.state_dict(), "momenta": self.momenta}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's state."""
        self.adam.load_state_dict(state["adam"])
        for mine, saved in zip(self.momenta, state["momenta"], strict=True):
            mine.copy_(saved)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return [n, rows, columns] matrices with the same singular vectors and singular values near 1.

    >>> values = torch.linalg.svdvals(orthogonalise(torch.diag(torch.tensor([5.0, 1.0, 0.2]))[None]))
    >>> bool(((values > 0.6) & (values < 1.3)).all())
    True
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.transpose(1, 2) if tall else x


def bfloat16_is_faster(device: torch.device) -> bool:
    """Return whether a product of two matrices is far quicker than in float32 (most CPUs emulate it)."""
    size = 4096 if device.type == "cuda" else 384

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(size, size, dtype=dtype, device=device)
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            (a @ a).sum().item()
            times.append(time.perf_counter() - begin)
        return min(times)

    return seconds(torch.bfloat16) < 0.7 * seconds(torch.float32)


# --------------------------------------------------------------------------- the run


@dataclass
class Clock:
    """How far a run is: in steps if they were given, else in minutes of training, over all resumptions."""

    minutes: float
    steps: int | None
    step: int = 0
    spent: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Return the seconds trained, earlier sessions included."""
        return self.spent + time.monotonic() - self.since

    def done(self) -> float:
        """Return the finished fraction of the plan."""
        return self.step / self.steps if self.steps else self.seconds() / (60 * self.minutes)

    def scale(self, hold: float) -> float:
        """Return the factor of the learning rate: warm-up, hold, then linearly to zero."""
        fall = 1.0 if self.done() < hold else max(0.0, (1 - self.done()) / (1 - hold))
        return min(1.0, (self.step + 1) / WARM_UP_STEPS) * fall


@dataclass
class Run:
    """A training run: what is trained, with what, how far."""

    model: GPT2LMHeadModel
    optimiser: Optimiser
    texts: Texts
    clock: Clock
    generator: torch.Generator
    device: torch.device
    bfloat16: bool
    options: argparse.Namespace
    stop: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bfloat16 else nullcontext()

    def train_step(self) -> float:
        """Make one step and return its loss."""
        x, y = (t.to(self.device) for t in self.texts.batch(self.options.batch, self.generator))
        with self.autocast():
            logits = self.model(x).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step(self.clock.scale(self.options.hold))
        self.clock.step += 1
        return loss.item()

    def checkpoint(self) -> Path:
        """Return where the checkpoint lies."""
        return self.options.out / "state.pt"

    def save(self) -> None:
        """Write the checkpoint beside its final name, then rename: a kill leaves the old or the new one."""
        state = {
            "model": self.model.state_dict(),
            **self.optimiser.state(),
            "generator": self.generator.get_state(),
            "step": self.clock.step,
            "seconds": self.clock.seconds(),
            "shape": self.options.shape,
        }
        part = self.checkpoint().with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint())

    def load(self) -> None:
        """Go on exactly where the checkpoint was written."""
        if not self.checkpoint().exists():
            raise ConfigError(
                f"--resume: there is no checkpoint '{self.checkpoint()}'; allowed: a run that was stopped"
            )
        state = torch.load(self.checkpoint(), weights_only=True, map_location=self.device)
        if state["shape"] != self.options.shape:
            raise ConfigError(
                f"--resume: the checkpoint is of {state['shape']!r}; allowed: --shape {state['shape']}"
            )
        self.model.load_state_dict(state["model"])
        self.optimiser.load(state)
        self.generator.set_state(state["generator"].cpu())
        self.clock.step, self.clock.spent = state["step"], state["seconds"]

    def report(self) -> str:
        """Return the held-out losses."""
        self.model.eval()
        usable = {name: tokens for name, tokens in self.texts.held_out.items() if len(tokens) > N_CTX}
        losses = [
            f"{name} {model_card.held_out_loss(self.model, tokens):.3f}" for name, tokens in usable.items()
        ]
        self.model.train()
        return "held-out loss: " + ", ".join(losses)


def train(run: Run) -> None:
    """Step until the plan is done or the user stops; keep a checkpoint and tell how far it is."""
    first, begin, loss = run.clock.step, time.monotonic(), 0.0
    spoken = saved = begin
    while run.clock.done() < 1 and not run.stop:
        now_loss = run.train_step()
        loss = now_loss if run.clock.step == first + 1 else 0.98 * loss + 0.02 * now_loss
        now = time.monotonic()
        if now - spoken >= run.options.say_every:
            spoken = now
            rate = (run.clock.step - first) * run.options.batch * N_CTX / (now - begin)
            print(_progress(run, loss, rate), flush=True)
        if now - saved >= run.options.save_every:
            run.save()
            print(run.report(), flush=True)
            saved = time.monotonic()
    run.save()


def _progress(run: Run, loss: float, rate: float) -> str:
    done = run.clock.done()
    left = run.clock.seconds() * (1 - done) / max(done, 1e-6)
    tokens = run.clock.step * run.options.batch * N_CTX
    return (
        f"{done:6.1%}  step {run.clock.step:,}  {tokens / 1e6:.2f} M tokens  loss {loss:.3f}  "
        f"{rate:,.0f} tokens/s  {left / 60:.0f} min left"
    )


# --------------------------------------------------------------------------- what is written


def write_folder(run: Run, tokenizer: Tokenizer) -> None:
    """Write the float16 folder; files appear under their names only when complete."""
    out, start_from = run.options.out, run.options.start_from
    part = out / "part"
    shutil.rmtree(part, ignore_errors=True)
    run.model.config.activation_function = "gelu_new"  # the same function by the name GPT-2 folders use
    run.model.config.use_cache = True
    run.model.half().save_pretrained(part)
    if start_from is None:
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), BOS)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=N_CTX, **special)
        fast.save_pretrained(part)
    else:
        for name in TOKENIZER_FILES:
            shutil.copyfile(start_from / name, part / name)
    for path in part.iterdir():
        path.chmod(0o644)
        path.replace(out / path.name)
    part.rmdir()


def history_entry(run: Run) -> model_card.Card:
    """Return what this run adds to the history of the weights."""
    total = float(run.texts.weights.sum())
    shares = [
        f"{n} {w / total:.0%}" for n, w in zip(run.texts.train, run.texts.weights.tolist(), strict=True)
    ]
    o = run.options
    return {
        "text": ", ".join(shares),
        "tokens": run.clock.step * o.batch * N_CTX,
        "steps": run.clock.step,
        "batch": f"{o.batch} x {N_CTX}",
        "optimiser": f"Muon {o.muon_lr:g} and AdamW {o.adam_lr:g}, weight decay {o.weight_decay:g}, "
        f"hold {o.hold:g} then linearly to 0",
        "precision": "bfloat16" if run.bfloat16 else "float32",
        "minutes": round(run.clock.seconds() / 60),
        "device": run.device.type,
    }


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], epilog="See the head of this file for examples."
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, required=True, help="sizes of the model")
    add("--out", type=Path, required=True, help="folder to write")
    add("--start-from", type=Path, help="folder whose weights and tokenizer to go on from")
    add("--minutes", type=float, default=60.0, help="how long to train; the learning rate falls to 0 by then")
    add("--steps", type=int, help="train this many steps instead")
    add(
        "--text",
        action="append",
        metavar="[NAME=]SPEC",
        help="a corpus, repeatable (default: stdlib and packages)",
    )
    add(
        "--weights",
        type=float,
        nargs="*",
        default=[],
        help="how often each text is drawn (default: by its size)",
    )
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add(
        "--card-only",
        action="store_true",
        help="train nothing: measure --start-from and write its card to --out",
    )
    add("--batch", type=int, default=8, help="blocks per step")
    add("--muon-lr", type=float, default=0.014, help="peak learning rate of the matrices")
    add("--adam-lr", type=float, default=1.4e-3, help="peak learning rate of everything else")
    add("--weight-decay", type=float, default=0.01, help="of matrices and embeddings")
    add("--hold", type=float, default=0.3, help="fraction of the run before the learning rate falls")
    add("--seed", type=int, default=0, help="of new weights and of the order of the text")
    add("--cache", type=Path, default=Path("lm-cache"), help="folder for tokenised text")
    add("--say-every", type=float, default=30.0, help="seconds between lines of progress")
    add("--save-every", type=float, default=300.0, help="seconds between checkpoints")
    o = parser.parse_args(argv)
    if o.batch < 1 or o.minutes <= 0 or (o.steps is not None and o.steps < 1) or not 0 <= o.hold < 1:
        parser.error("allowed: --batch and --steps of at least 1, --minutes above 0, --hold in [0, 1)")
    if o.card_only and o.start_from is None:
        parser.error("--card-only needs --start-from")
    return o


def prepare(o: argparse.Namespace) -> tuple[Texts, Tokenizer]:
    """Read the text with the tokenizer of --start-from, or with one trained on the text."""
    sources = named_sources(o.text or ("stdlib", "packages"))
    kept = (o.start_from or o.out) / "tokenizer.json"
    if o.start_from is None and not kept.exists():
        o.out.mkdir(parents=True, exist_ok=True)
        train_tokenizer(list(sources.values())).save(str(kept))
    if not kept.exists():
        raise ConfigError(f"--start-from: there is no '{kept}'; allowed: a folder with a tokenizer")
    tokenizer = Tokenizer.from_file(str(kept))
    return read_texts(sources, o.weights, tokenizer, o.cache), tokenizer


def train_and_write(o: argparse.Namespace, texts: Texts, tokenizer: Tokenizer, device: torch.device) -> int:
    """Train, write the folder, return the exit code."""
    torch.manual_seed(o.seed)
    model = start(SHAPES[o.shape], o.start_from).to(device)
    optimiser = Optimiser(model, o.muon_lr, o.adam_lr, o.weight_decay)
    generator = torch.Generator().manual_seed(o.seed)
    clock = Clock(o.minutes, o.steps)
    run = Run(model, optimiser, texts, clock, generator, device, bfloat16_is_faster(device), o)
    if o.resume:
        run.load()
    signal.signal(signal.SIGINT, lambda *_: setattr(run, "stop", True))
    clock.since = time.monotonic()
    train(run)
    if run.stop:
        print(f"stopped at step {clock.step:,}; go on with the same command and --resume", file=sys.stderr)
        return 130
    print(run.report(), flush=True)
    history = [*(model_card.read_history(o.start_from) if o.start_from else []), history_entry(run)]
    write_folder(run, tokenizer)
    model_card.write_card(o.out, o.shape, history, model_card.measure(o.out, texts.held_out, device))
    run.checkpoint().unlink()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; an error that the user can act on is one line and exit code 2."""
    o = arguments(argv)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        o.out.mkdir(parents=True, exist_ok=True)
        texts, tokenizer = prepare(o)
        if not o.card_only:
            return train_and_write(o, texts, tokenizer, device)
        measured = model_card.measure(o.start_from, texts.held_out, device)
        model_card.write_card(o.out, o.shape, model_card.read_history(o.start_from), measured)
        print(json.dumps({name: s["strongest"] for name, s in measured["head_scores"].items()}))
    except AtlasError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
