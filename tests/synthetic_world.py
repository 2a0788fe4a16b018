"""The text, the attention and the SAEs of the synthetic release, before any table is made of them."""

from typing import NamedTuple

import numpy as np

MODEL = "synthetic"
D_HEAD = 8
K = 4
POSITION, TOKEN, PAIR = 7, 56, (11, 12)
"""What the first three features of the k SAE are for; TOKEN is ' def', PAIR 'return' and 'self'."""
HOSTILE = [
    "<script>alert(1)</script>", "</style><b>", "&amp;", "a'b\"c", "$x_1$", "**bold**", "\u202eright",
    "\U0001f419", "\t", "\x00", "'; DROP TABLE x; --", "{{0}}", "\ufffd",
]  # fmt: skip
WORDS = """
the of def return self import class if for in not is None True list dict str int value name file path open
read write key error raise try with as lambda yield and or pass while data test index cat dog ran sat on mat
""".split()  # noqa: SIM905


class World(NamedTuple):
    """What every table is computed from."""

    rng: np.random.Generator
    n_layers: int
    n_heads: int
    d_sae: int
    tokens: np.ndarray
    texts: list[str]
    raw: list[bytes]


class Encoded(NamedTuple):
    """One SAE, its reading of the text, and what made it read so. Arrays are [block, position, ...]."""

    name: str
    site: str
    layer: int
    head: int | None
    x: np.ndarray
    W_enc: np.ndarray
    W_dec: np.ndarray
    b_enc: np.ndarray
    pre: np.ndarray
    acts: np.ndarray
    gradient: np.ndarray
    """Of each block's summed loss; random here."""
    pattern: np.ndarray | None
    v: np.ndarray | None

    @property
    def d_sae(self) -> int:
        return self.b_enc.shape[0]


def vocabulary() -> tuple[list[str], list[bytes]]:
    plain = ["\n", "  ", ".", ",", "(", ")", ":", *WORDS, *(f" {w}" for w in WORDS), *HOSTILE]
    seen = {"\n": "⏎", "\t": "→", "\x00": "\\x00"}
    shown = ["<|endoftext|>", *("".join(seen.get(c, "·" if c == " " else c) for c in t) for t in plain)]
    return shown, [b"<|endoftext|>", *(t.encode("utf-8") for t in plain)]


def make_tokens(rng: np.random.Generator, n_blocks: int, context: int, d_vocab: int) -> np.ndarray:
    """Blocks that begin with BOS (0) and whose second half repeats stretches of the first.

    Each holds TOKEN and PAIR somewhere, so that features for them have something to fire on.
    """
    tokens = rng.integers(1, d_vocab, size=(n_blocks, context), dtype=np.int32)
    half = context // 2
    for number, block in enumerate(tokens):
        block[1 + number * 5 % (half - 1)] = TOKEN
        place = 1 + number % (half - 2)
        block[place : place + 2] = PAIR
    for block in tokens[::2]:
        block[half:] = block[1 : 1 + context - half]
    tokens[:, 0] = 0
    return tokens


def _one_hot(source: np.ndarray, context: int) -> np.ndarray:
    return np.eye(context, dtype=np.float32)[source]


def earlier(tokens: np.ndarray, shift: int) -> np.ndarray:
    """[block, dst]: the latest source whose token ``shift`` before equals the destination's; 0 if none."""
    found = np.zeros_like(tokens)
    for dst in range(tokens.shape[1]):
        for src in range(1 + shift, dst):
            found[:, dst] = np.where(tokens[:, src - shift] == tokens[:, dst], src, found[:, dst])
    return found


def patterns(world: World, layer: int) -> np.ndarray:
    """Causal attention of every head, [block, head, dst, src], rows summing to 1."""
    n_blocks, context = world.tokens.shape
    soft = world.rng.gumbel(size=(n_blocks, world.n_heads, context, context)).astype(np.float32)
    soft = np.where(np.tri(context, dtype=bool), soft, -np.inf)
    pattern = np.exp(soft - soft.max(-1, keepdims=True))
    pattern /= pattern.sum(-1, keepdims=True)
    styles: dict[int, np.ndarray] = {}
    if layer == 0:
        previous = np.broadcast_to(np.maximum(np.arange(context) - 1, 0), world.tokens.shape)
        styles = {0: previous, 1 % world.n_heads: earlier(world.tokens, 0)}
    elif layer == world.n_layers - 1:
        styles = {
            1 % world.n_heads: earlier(world.tokens, 1),
            2 % world.n_heads: np.zeros_like(world.tokens),
        }
    for head, source in styles.items():
        pattern[:, head] = 0.8 * _one_hot(source, context) + 0.2 * pattern[:, head]
    return pattern.astype(np.float32)


def _topk(pre: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros_like(pre)
    index = np.argsort(-pre, axis=-1, kind="stable")[..., :k]
    np.put_along_axis(kept, index, np.maximum(np.take_along_axis(pre, index, -1), 0), -1)
    return kept


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def encode_z(world: World, layer: int, pattern: np.ndarray) -> Encoded:
    rng, H, F = world.rng, world.n_heads, world.d_sae
    embedding = rng.normal(size=(len(world.texts), H, D_HEAD)).astype(np.float32)
    v = embedding[world.tokens] + 0.3 * rng.normal(size=(*world.tokens.shape, H, D_HEAD)).astype(np.float32)
    z = np.einsum("bhqs,bshd->bqhd", pattern, v)
    x = z.reshape(*world.tokens.shape, H * D_HEAD)
    lean = rng.dirichlet(np.full(H, 0.4), size=F).astype(np.float32) + 0.02
    W_dec = _unit((rng.normal(size=(F, H, D_HEAD)) * lean[..., None]).reshape(F, -1)).astype(np.float32)
    W_enc = (W_dec + 0.05 * rng.normal(size=W_dec.shape)).T.astype(np.float32)
    b_enc = rng.normal(scale=0.1, size=F).astype(np.float32)
    b_enc[-max(1, F // 32) :] = -100.0  # a few features that never fire
    pre = x @ W_enc + b_enc
    name = f"{MODEL}/L{layer:02d}.z.topk-{F}"
    gradient = _gradient(x, layer)
    return Encoded(name, "z", layer, None, x, W_enc, W_dec, b_enc, pre, _topk(pre, K), gradient, pattern, v)


def encode_head(world: World, kind: str) -> Encoded:
    """A ReLU SAE on q or k of the last layer's head 0."""
    # k draws from a generator of its own, so that it changes nothing else.
    rng = world.rng if kind == "q" else np.random.default_rng(77)
    F, layer = max(8, world.d_sae // 2), world.n_layers - 1
    embedding = rng.normal(size=(len(world.texts), D_HEAD)).astype(np.float32)
    x = embedding[world.tokens] + 0.3 * rng.normal(size=(*world.tokens.shape, D_HEAD)).astype(np.float32)
    W_dec = _unit(rng.normal(size=(F, D_HEAD))).astype(np.float32)
    b_enc = np.full(F, -1.5, np.float32)
    if kind == "k":
        W_dec[:3], b_enc[:3] = np.eye(3, D_HEAD), -5
        x[..., :3] += 8 * _planted(world.tokens)
    pre = x @ W_dec.T + b_enc
    name = f"{MODEL}/L{layer:02d}.H00.{kind}.relu-{F}"
    gradient = _gradient(x, layer)
    return Encoded(
        name, kind, layer, 0, x, W_dec.T, W_dec, b_enc, pre, np.maximum(pre, 0), gradient, None, None
    )


def _planted(tokens: np.ndarray) -> np.ndarray:
    """[block, position, 3]: is it POSITION, is it TOKEN, does PAIR end there."""
    found = np.zeros((*tokens.shape, 3), np.float32)
    found[:, POSITION : POSITION + 1, 0] = 1
    found[..., 1] = tokens == TOKEN
    found[:, 1:, 2] = (tokens[:, :-1] == PAIR[0]) & (tokens[:, 1:] == PAIR[1])
    return found


def _gradient(x: np.ndarray, layer: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(500 + layer).normal(size=x.shape)


def W_O(layer: int, n_heads: int) -> np.ndarray:
    """[n_heads * d_head, d_model]: a fixed random matrix for each layer."""
    return np.random.default_rng(1000 + layer).normal(size=(n_heads * D_HEAD, n_heads * D_HEAD))


def W_U(n_heads: int, d_vocab: int) -> np.ndarray:
    """[d_model, d_vocab]: a fixed random unembedding."""
    return np.random.default_rng(999).normal(size=(n_heads * D_HEAD, d_vocab)) / n_heads


def position_keys(n_heads: int, context: int, kind: str) -> np.ndarray:
    """[context, d_head]: W_pos W_Q or W_pos W_K of the head that has q and k SAEs."""
    d_model = n_heads * D_HEAD
    W_pos = np.random.default_rng(998).normal(size=(context, d_model)) + 0.5
    return W_pos @ np.random.default_rng(997 if kind == "q" else 996).normal(size=(d_model, D_HEAD))
