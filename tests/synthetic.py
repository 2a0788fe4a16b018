"""A small release with every table, made from random numbers yet true to every definition.

Attention patterns are made first (a previous-token head in layer 0, an induction head in the last layer,
first-token and duplicate-token heads, soft random ones), values follow from the tokens, z = pattern @ v,
and a random encoder with TopK reads it. So shares sum to 1, FVE sums to 1, and DFA sums to the
pre-activation by construction and not by assertion. Only numpy, pyarrow and the store are needed.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from atlas.store.parquet import write_table
from atlas.store.release import publish
from atlas.tables import TABLES
from tests import synthetic_training as training

MODEL = "synthetic"
D_HEAD = 8
K = 4
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
    pattern: np.ndarray | None
    v: np.ndarray | None

    @property
    def d_sae(self) -> int:
        return self.b_enc.shape[0]


def _vocabulary() -> tuple[list[str], list[bytes]]:
    plain = ["\n", "  ", ".", ",", "(", ")", ":", *WORDS, *(f" {w}" for w in WORDS), *HOSTILE]
    seen = {"\n": "⏎", "\t": "→", "\x00": "\\x00"}
    shown = ["<|endoftext|>", *("".join(seen.get(c, "·" if c == " " else c) for c in t) for t in plain)]
    return shown, [b"<|endoftext|>", *(t.encode("utf-8") for t in plain)]


def _tokens(rng: np.random.Generator, n_blocks: int, context: int, d_vocab: int) -> np.ndarray:
    """Blocks that begin with BOS (0) and whose second half repeats stretches of the first."""
    tokens = rng.integers(1, d_vocab, size=(n_blocks, context), dtype=np.int32)
    half = context // 2
    for block in tokens[::2]:
        block[half:] = block[1 : 1 + context - half]
    tokens[:, 0] = 0
    return tokens


def _one_hot(source: np.ndarray, context: int) -> np.ndarray:
    return np.eye(context, dtype=np.float32)[source]


def _earlier(tokens: np.ndarray, shift: int) -> np.ndarray:
    """[block, dst]: the latest source whose token ``shift`` before equals the destination's; 0 if none."""
    found = np.zeros_like(tokens)
    for dst in range(tokens.shape[1]):
        for src in range(1 + shift, dst):
            found[:, dst] = np.where(tokens[:, src - shift] == tokens[:, dst], src, found[:, dst])
    return found


def _patterns(world: World, layer: int) -> np.ndarray:
    """Causal attention of every head, [block, head, dst, src], rows summing to 1."""
    n_blocks, context = world.tokens.shape
    soft = world.rng.gumbel(size=(n_blocks, world.n_heads, context, context)).astype(np.float32)
    soft = np.where(np.tri(context, dtype=bool), soft, -np.inf)
    pattern = np.exp(soft - soft.max(-1, keepdims=True))
    pattern /= pattern.sum(-1, keepdims=True)
    styles: dict[int, np.ndarray] = {}
    if layer == 0:
        previous = np.broadcast_to(np.maximum(np.arange(context) - 1, 0), world.tokens.shape)
        styles = {0: previous, 1 % world.n_heads: _earlier(world.tokens, 0)}
    elif layer == world.n_layers - 1:
        styles = {
            1 % world.n_heads: _earlier(world.tokens, 1),
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


def _encode_z(world: World, layer: int, pattern: np.ndarray) -> Encoded:
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
    return Encoded(name, "z", layer, None, x, W_enc, W_dec, b_enc, pre, _topk(pre, K), pattern, v)


def _encode_q(world: World) -> Encoded:
    rng, F, layer = world.rng, max(8, world.d_sae // 2), world.n_layers - 1
    embedding = rng.normal(size=(len(world.texts), D_HEAD)).astype(np.float32)
    x = embedding[world.tokens] + 0.3 * rng.normal(size=(*world.tokens.shape, D_HEAD)).astype(np.float32)
    W_dec = _unit(rng.normal(size=(F, D_HEAD))).astype(np.float32)
    b_enc = np.full(F, -1.5, np.float32)
    pre = x @ W_dec.T + b_enc
    name = f"{MODEL}/L{layer:02d}.H00.q.relu-{F}"
    return Encoded(name, "q", layer, 0, x, W_dec.T, W_dec, b_enc, pre, np.maximum(pre, 0), None, None)


def _model_rows(world: World) -> list[dict]:
    return [{
        "model": MODEL, "processing": "raw", "n_layers": world.n_layers, "n_heads": world.n_heads,
        "d_model": world.n_heads * D_HEAD, "d_head": D_HEAD, "d_vocab": len(world.texts),
        "n_ctx": world.tokens.shape[1], "source": "bundled", "digest": hashlib.sha256(b"").hexdigest(),
    }]  # fmt: skip


def _sae_row(world: World, sae: Encoded) -> dict:
    topk = sae.site == "z"
    return {
        "sae": sae.name, "model": MODEL, "site": sae.site, "layer": sae.layer, "head": sae.head,
        "d_in": sae.x.shape[-1], "d_sae": sae.d_sae, "architecture": "topk" if topk else "relu",
        "k": K if topk else None, "l1_coefficient": None if topk else 0.01,
        "normalize_activations": "none", "processing": "raw",
        "settings": json.dumps({"k": K} if topk else {"l1_coefficient": 0.01}),
        "include_bos": False, "tokens_trained": 100_000, "corpus": "synthetic",
        "n_tokens": world.tokens[:, 1:].size, "seed": 0, "origin": "trained",
        "digest": hashlib.sha256(sae.W_enc.tobytes()).hexdigest(), "code_version": "0.1.0",
    }  # fmt: skip


def _pruned(sae: Encoded) -> np.ndarray:
    """Why each feature was pruned; the SAEs of z were, the others were not."""
    fires = (sae.acts[:, 1:] > 0).any((0, 1))
    return training.pruned_bits(sae.d_sae, fires) if sae.site == "z" else np.zeros(sae.d_sae, int)


def _metric_row(world: World, sae: Encoded, split: str) -> dict:
    start = 1 if split == "eval" else 0
    x = sae.x[:, start:].reshape(-1, sae.x.shape[-1]).astype(np.float64)
    acts = sae.acts[:, start:].reshape(-1, sae.d_sae).astype(np.float64)
    W_dec = sae.W_dec.astype(np.float64)
    decoded = acts @ W_dec - (acts @ W_dec).mean(0)  # with the best scale and offset, as if trained
    x_hat = x.mean(0) + decoded * ((x - x.mean(0)) * decoded).sum() / (decoded**2).sum()
    error = ((x - x_hat) ** 2).sum()
    explained = 1 - error / ((x - x.mean(0)) ** 2).sum()
    norm, norm_hat = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    alive = int((acts > 0).any(0).sum())
    clean, zero, mean = 3.0, 3.6 + 0.01 * sae.layer, 3.5 + 0.01 * sae.layer
    spliced = clean + 0.3 * (1 - min(1.0, max(0.0, explained)))
    return {
        "sae": sae.name, "split": split, "l0": (acts > 0).sum(1).mean(), "mse": error / x.size,
        "variance_explained": explained,
        "cosine": ((x * x_hat).sum(1) / np.maximum(norm * norm_hat, 1e-9)).mean(),
        "l2_ratio": (norm_hat / norm).mean(), "ce_clean": clean, "ce_spliced": spliced, "ce_zero": zero,
        "ce_mean": mean, "ce_recovered": (zero - spliced) / (zero - clean),
        "ce_recovered_mean": (mean - spliced) / (mean - clean), "kl": 0.8 * (spliced - clean),
        "alive": alive, "dead": sae.d_sae - alive, "n_tokens": len(x),
    }  # fmt: skip


class Firing(NamedTuple):
    """Where one feature fires (position 0 left out): blocks, positions, values in reading order."""

    block: np.ndarray
    position: np.ndarray
    value: np.ndarray


def _firing(sae: Encoded, feature: int) -> Firing:
    acts = sae.acts[:, 1:, feature]
    block, position = np.nonzero(acts > 0)
    return Firing(block, position + 1, acts[block, position])


def _logits(world: World, sae: Encoded) -> np.ndarray:
    """[d_sae, d_vocab]: a fixed random unembedding, centred over the vocabulary."""
    rng = np.random.default_rng(1000 + sae.layer)
    logits = sae.W_dec @ rng.normal(size=(sae.W_dec.shape[1], len(world.texts)))
    return (logits - logits.mean(-1, keepdims=True)).astype(np.float32)


def _shares(world: World, sae: Encoded) -> np.ndarray:
    norms = np.linalg.norm(sae.W_dec.reshape(sae.d_sae, world.n_heads, D_HEAD), axis=-1)
    return norms / norms.sum(-1, keepdims=True)


def _parts(world: World, sae: Encoded, feature: int) -> np.ndarray:
    """[block, position, head]: each head's part of x . W_enc[:, feature]."""
    x = sae.x.reshape(*world.tokens.shape, world.n_heads, D_HEAD)
    return np.einsum("bphd,hd->bph", x, sae.W_enc[:, feature].reshape(world.n_heads, D_HEAD))


def _feature_row(
    sae: Encoded, feature: int, fires: Firing, logits: np.ndarray, top_head: int | None, pruned: int
) -> dict:
    n = len(fires.value)
    enc, dec = sae.W_enc[:, feature], sae.W_dec[feature]
    norms = np.linalg.norm(enc), np.linalg.norm(dec)
    std = logits.std()
    return {
        "sae": sae.name, "feature": feature, "n_active": n, "density": n / sae.acts[:, 1:, 0].size,
        "max_activation": fires.value.max() if n else 0.0,
        "mean_activation": fires.value.mean() if n else None,
        "quantiles": np.quantile(fires.value, np.linspace(0, 1, 11)).tolist() if n else None,
        "encoder_norm": norms[0], "decoder_norm": norms[1],
        "encoder_decoder_cosine": float(enc @ dec / (norms[0] * norms[1])), "bias": sae.b_enc[feature],
        "alive": n > 0, "pruned": pruned, "top_head": top_head, "logit_mean": logits.mean(), "logit_std": std,
        "logit_skew": ((logits / std) ** 3).mean(), "logit_kurtosis": ((logits / std) ** 4).mean(),
    }  # fmt: skip


def _histogram_rows(key: dict, fires: Firing) -> list[dict]:
    if not len(fires.value):
        return []
    counts, edges = np.histogram(fires.value, bins=50, range=(0, fires.value.max()))
    return [{**key, "bin": b, "low": edges[b], "high": edges[b + 1], "n": int(counts[b])} for b in range(50)]


def _position_rows(key: dict, fires: Firing) -> list[dict]:
    strongest = np.argsort(-fires.value, kind="stable")[:2000]
    top = np.bincount(fires.position[strongest], minlength=1)
    rows = []
    for position in np.unique(fires.position):
        here = fires.position == position
        n_top = int(top[position]) if position < len(top) else 0
        rows.append({**key, "position": int(position), "n_top": n_top, "n_active": int(here.sum()),
                     "sum_activation": fires.value[here].sum()})  # fmt: skip
    return rows


def _token_rows(world: World, key: dict, fires: Firing) -> list[dict]:
    counts = np.bincount(world.tokens[:, 1:].ravel(), minlength=len(world.texts))
    rows = []
    for role, shift in (("at", 0), ("next", 1)):
        inside = fires.position + shift < world.tokens.shape[1]
        value = fires.value[inside]
        token = world.tokens[fires.block[inside], fires.position[inside] + shift]
        total = np.bincount(token, weights=value, minlength=len(counts))
        order = [int(t) for t in np.argsort(-total, kind="stable")[:50] if total[t] > 0]
        for rank, t in enumerate(order):
            here = value[token == t]
            rows.append({**key, "role": role, "rank": rank, "token": t, "n_active": len(here),
                         "sum_activation": here.sum(), "max_activation": here.max(),
                         "precision": len(here) / len(value), "recall": len(here) / counts[t]})  # fmt: skip
    return rows


def _groups(fires: Firing) -> dict[str, list[int]]:
    """Indices into the firings of the examples kept, by group, strongest first."""
    order = np.lexsort((fires.position, fires.block, -fires.value))
    top: list[int] = []
    for index in order:
        if len(top) < 20 and fires.block[index] not in {fires.block[i] for i in top}:
            top.append(int(index))
    groups = {"top": top}
    for q, tenth in enumerate(np.array_split(order[::-1], 10)):
        groups[f"q{q}"] = [int(i) for i in tenth[::-1][:5]]
    return groups


def _example_rows(sae: Encoded, key: dict, fires: Firing) -> list[dict]:
    rows = []
    for group, indices in sorted(_groups(fires).items()):
        for rank, index in enumerate(indices):
            inside = fires.block == fires.block[index]
            rows.append({**key, "example_group": group, "rank": rank, "block": int(fires.block[index]),
                         "position": int(fires.position[index]), "activation": fires.value[index],
                         "active_positions": fires.position[inside].tolist(),
                         "active_values": fires.value[inside].tolist()})  # fmt: skip
    return rows


def _sources(table: np.ndarray) -> list[dict]:
    """The largest entries of [head, source] by magnitude, to 95 % of the absolute sum or 32."""
    flat = np.abs(table).ravel()
    order = np.argsort(-flat, kind="stable")
    enough = int(np.searchsorted(np.cumsum(flat[order]), 0.95 * flat.sum())) + 1
    pairs = [divmod(int(i), table.shape[1]) for i in order[: min(enough, 32)]]
    return [{"head": h, "source": s, "contribution": float(table[h, s])} for h, s in pairs]


def _dfa_rows(world: World, sae: Encoded, examples: list[dict]) -> list[dict]:
    rows = []
    for example in examples:
        block, position, feature = example["block"], example["position"], example["feature"]
        enc = sae.W_enc[:, feature].reshape(world.n_heads, D_HEAD)
        values = np.einsum("shd,hd->hs", sae.v[block], enc)
        table = (sae.pattern[block, :, position] * values)[:, : position + 1]
        rows.append({"sae": sae.name, "feature": feature, "example_group": example["example_group"],
                     "rank": example["rank"], "by_head": table.sum(-1).tolist(),
                     "bias_term": sae.b_enc[feature], "pre_activation": sae.pre[block, position, feature],
                     "sources": _sources(table)})  # fmt: skip
    return rows


def _attribution_rows(
    world: World, sae: Encoded, key: dict, share: np.ndarray, dfa: list[dict]
) -> list[dict]:
    parts = _parts(world, sae, key["feature"])[:, 1:].reshape(-1, world.n_heads).astype(np.float64)
    total = parts.sum(-1)
    fve = ((parts - parts.mean(0)) * (total - total.mean())[:, None]).mean(0) / total.var()
    top = [np.array(row["by_head"]) for row in dfa if row["example_group"] == "top"]
    dfa_share = np.mean([t / t.sum() for t in top], axis=0) if top else None
    return [
        {**key, "head": h, "decoder_share": share[h], "fve": fve[h],
         "dfa_share": None if dfa_share is None else dfa_share[h]}
        for h in range(world.n_heads)
    ]  # fmt: skip


def _logit_rows(key: dict, logits: np.ndarray) -> list[dict]:
    rows = []
    for sign in (-1, 1):
        order = np.argsort(-sign * logits, kind="stable")[:20]
        rows += [
            {**key, "sign": sign, "rank": r, "token": int(t), "value": logits[t]} for r, t in enumerate(order)
        ]
    return rows


def _score_rows(world: World, layer: int, pattern: np.ndarray) -> list[dict]:
    context = world.tokens.shape[1]
    dst = np.arange(1, context)
    blocks = np.arange(len(world.tokens))[:, None]
    source = {
        "previous_token": np.broadcast_to(dst - 1, (len(blocks), context - 1)),
        "first_token": np.zeros((len(blocks), context - 1), int),
        "duplicate_token": _earlier(world.tokens, 0)[:, 1:],
        "induction": _earlier(world.tokens, 1)[:, 1:],
    }
    rows = []
    for head in range(world.n_heads):
        for score, src in sorted(source.items()):
            valid = np.ones(src.shape, bool) if score in ("previous_token", "first_token") else src > 0
            value = pattern[:, head][blocks, dst[None], src][valid]
            rows.append({"model": MODEL, "layer": layer, "head": head, "score": score,
                         "value": value.mean() if len(value) else 0.0, "n": len(value),
                         "how": f"text, {len(blocks)} blocks"})  # fmt: skip
    return rows


def _feature_tables(world: World, sae: Encoded, rows: dict[str, list[dict]]) -> None:
    logits = _logits(world, sae)
    shares = _shares(world, sae) if sae.site == "z" else None
    pruned = _pruned(sae).tolist()
    for feature in range(sae.d_sae):
        key = {"sae": sae.name, "feature": feature}
        fires = _firing(sae, feature)
        top_head = None if shares is None else int(shares[feature].argmax())
        rows["features"].append(_feature_row(sae, feature, fires, logits[feature], top_head, pruned[feature]))
        rows["activation_histogram"] += _histogram_rows(key, fires)
        rows["positions"] += _position_rows(key, fires)
        rows["token_stats"] += _token_rows(world, key, fires)
        examples = _example_rows(sae, key, fires)
        rows["examples"] += examples
        rows["logit_effects"] += _logit_rows(key, logits[feature])
        if shares is not None:
            dfa = _dfa_rows(world, sae, examples)
            rows["dfa"] += dfa
            rows["head_attribution"] += _attribution_rows(world, sae, key, shares[feature], dfa)


def synthetic_rows(
    seed: int, n_layers: int, n_heads: int, d_sae: int, n_blocks: int, context: int, engine: bool = False
) -> dict:
    """Rows of every table of TABLES, as dicts; examples before they are sorted by key."""
    rng = np.random.default_rng(seed)
    texts, raw = _vocabulary()
    world = World(rng, n_layers, n_heads, d_sae, _tokens(rng, n_blocks, context, len(texts)), texts, raw)
    rows: dict[str, list[dict]] = {name: [] for name in TABLES}
    rows["models"] = _model_rows(world)
    rows["vocab"] = [
        {"model": MODEL, "token": i, "text": t, "bytes": b}
        for i, (t, b) in enumerate(zip(texts, raw, strict=True))
    ]
    rows["docs"] = [
        {"corpus": "synthetic", "block": i, "tokens": block.tolist(), "source": f"document-{i // 4}.py"}
        for i, block in enumerate(world.tokens)
    ]
    for layer in range(n_layers):
        pattern = _patterns(world, layer)
        rows["head_scores"] += _score_rows(world, layer, pattern)
        saes = [_encode_z(world, layer, pattern), *([_encode_q(world)] if layer == n_layers - 1 else [])]
        for sae in saes:
            rows["saes"].append(_sae_row(world, sae))
            metrics = [_metric_row(world, sae, split) for split in ("eval", "eval_with_bos")]
            rows["sae_metrics"] += metrics
            _add(rows, training.training_tables(sae.name, sae.d_sae))
            if sae.site == "z":
                rows["sae_stages"] += [row for last in metrics for row in training.stage_rows(last)]
                rows["pruning"].append(training.pruning_row(sae.name, _pruned(sae), world.tokens[:, 1:].size))
            _feature_tables(world, sae, rows)
    if engine:
        d_model = n_heads * D_HEAD
        _add(rows, training.engine_tables(n_layers, d_model, D_HEAD, world.tokens[:, 1:].size))
    return rows


def _add(rows: dict[str, list[dict]], more: dict[str, list[dict]]) -> None:
    for table, some in more.items():
        rows[table] += some


def to_arrow(name: str, rows: list[dict]) -> pa.Table:
    """The rows as an Arrow table, sorted by the declared key."""
    data = pa.Table.from_pylist(rows, schema=TABLES[name].schema)
    return data.sort_by([(column, "ascending") for column in TABLES[name].key])


def build_synthetic_release(
    releases_dir: Path,
    name: str = "synthetic",
    seed: int = 0,
    n_layers: int = 2,
    n_heads: int = 4,
    d_sae: int = 64,
    n_blocks: int = 40,
    context: int = 32,
    engine: bool = False,
) -> Path:
    """Publish a synthetic release and return the path of its DuckDB file.

    ``engine`` adds SAEs of other sites and a sweep, with their quality and training but without features.
    """
    rows = synthetic_rows(seed, n_layers, n_heads, d_sae, n_blocks, context, engine)
    config = {"seed": seed, "n_layers": n_layers, "n_heads": n_heads, "d_sae": d_sae}
    with tempfile.TemporaryDirectory() as folder:
        parts = {}
        for table in TABLES:
            parts[table] = [Path(folder) / f"{table}.parquet"]
            write_table(parts[table][0], table, to_arrow(table, rows[table]))
        provenance = {
            "config": json.dumps(config),
            "code_version": "0.1.0",
            "model": MODEL,
            "seed": str(seed),
        }
        return publish(Path(releases_dir), name, parts, provenance).path
