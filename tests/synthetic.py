"""A small release with every table, made from random numbers yet true to every definition.

Attention patterns are made first (a previous-token head in layer 0, an induction head in the last layer,
first-token and duplicate-token heads, soft random ones), values follow from the tokens, z = pattern @ v,
and a random encoder with TopK reads it. So shares sum to 1, FVE sums to 1, and DFA sums to the
pre-activation by construction and not by assertion. Only numpy, pyarrow and the store are needed.
"""

import atexit
import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from atlas.store.parquet import write_table
from atlas.store.release import current, publish
from atlas.tables import TABLES
from tests import synthetic_dfa as dfa
from tests import synthetic_heads as heads
from tests import synthetic_pairs as pairs
from tests import synthetic_qk as queries_keys
from tests import synthetic_tables as tables
from tests import synthetic_training as training
from tests import synthetic_world as worlds
from tests.synthetic_world import D_HEAD, HOSTILE, MODEL, Encoded, K, World

__all__ = ["HOSTILE", "MODEL", "build_synthetic_release", "synthetic_rows", "to_arrow"]

DERIVED = {"head_summary", "token_index", "example_places"}
"""Tables that the build of a release computes from the others."""


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


def _score_rows(world: World, layer: int, pattern: np.ndarray) -> list[dict]:
    context = world.tokens.shape[1]
    dst = np.arange(1, context)
    blocks = np.arange(len(world.tokens))[:, None]
    source = {
        "previous_token": np.broadcast_to(dst - 1, (len(blocks), context - 1)),
        "first_token": np.zeros((len(blocks), context - 1), int),
        "duplicate": worlds.earlier(world.tokens, 0)[:, 1:],
        "induction": worlds.earlier(world.tokens, 1)[:, 1:],
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
    z = sae.site == "z"
    logits = tables.slice_logits(world, sae) if z else None
    shares = tables.head_shares(world, sae) if z else None
    pruned = _pruned(sae).tolist()
    for feature in range(sae.d_sae):
        key = {"sae": sae.name, "feature": feature}
        fires = tables.firing(sae, feature)
        own = None if logits is None else logits[feature].sum(0)
        rows["features"].append(tables.feature_row(world, sae, feature, fires, own, pruned[feature]))
        rows["activation_counts"] += tables.histogram_rows(key, fires)
        rows["position_counts"] += tables.position_rows(key, fires)
        rows["token_stats"] += tables.token_rows(world, key, fires)
        examples = tables.example_rows(sae, key, fires)
        rows["examples"] += examples
        if logits is not None and shares is not None:
            _add(rows, tables.logit_tables(key, logits[feature], shares[feature]))
            _add(rows, _dfa_tables(world, sae, key, fires, examples, shares[feature], logits[feature]))


def _dfa_tables(
    world: World, sae: Encoded, key: dict, fires: tables.Firing, examples: list[dict], shares: np.ndarray,
    logits: np.ndarray,
) -> dict[str, list[dict]]:  # fmt: skip
    firing = [e for e in examples if e["example_group"] != "negative"]
    dense = [dfa.dense(world, sae, example) for example in firing]
    made = [dfa.dfa_row(world, sae, example, table) for example, table in zip(firing, dense, strict=True)]
    found = list(zip(firing, made, dense, strict=True))
    top = [one for one in found if one[0]["example_group"] == "top"]
    return {
        "dfa": made,
        "head_attribution": dfa.attribution_rows(world, sae, key, shares, logits, fires, top),
        **dfa.summary_tables(world, key, top),
    }


def _reference_rows(world: World) -> dict[str, list[dict]]:
    vocab = enumerate(zip(world.texts, world.raw, strict=True))
    return {
        "models": _model_rows(world),
        "vocab": [{"model": MODEL, "token": i, "text": t, "bytes": b} for i, (t, b) in vocab],
        "docs": [
            {"corpus": "synthetic", "block": i, "tokens": block.tolist(), "source": f"document-{i // 4}.py"}
            for i, block in enumerate(world.tokens)
        ],
    }


def synthetic_rows(
    seed: int, n_layers: int, n_heads: int, d_sae: int, n_blocks: int, context: int, engine: bool = False
) -> dict:
    """Rows of every table of TABLES but the derived, as dicts; examples before they are sorted by key."""
    rng = np.random.default_rng(seed)
    texts, raw = worlds.vocabulary()
    tokens = worlds.make_tokens(rng, n_blocks, context, len(texts))
    world = World(rng, n_layers, n_heads, d_sae, tokens, texts, raw)
    rows: dict[str, list[dict]] = {name: [] for name in TABLES if name not in DERIVED}
    _add(rows, _reference_rows(world))
    saes: list[Encoded] = []
    for layer in range(n_layers):
        pattern = worlds.patterns(world, layer)
        rows["head_scores"] += _score_rows(world, layer, pattern)
        saes.append(worlds.encode_z(world, layer, pattern))
    _add(rows, heads.head_rows(MODEL, n_layers, n_heads, D_HEAD, seed))
    q, k = (worlds.encode_head(world, kind) for kind in ("q", "k"))
    _add(rows, pairs.head_pair_tables(world, q, k))
    _add(rows, queries_keys.pair_tables(world, q, k))
    for sae in [*saes, q, k]:
        rows["saes"].append(_sae_row(world, sae))
        metrics = [_metric_row(world, sae, split) for split in ("eval", "eval_with_bos")]
        rows["sae_metrics"] += metrics
        _add(rows, training.training_tables(sae.name, sae.d_sae))
        if sae.site == "z":
            rows["sae_stages"] += [row for last in metrics for row in training.stage_rows(last)]
            rows["pruning"].append(training.pruning_row(sae.name, _pruned(sae), world.tokens[:, 1:].size))
        _feature_tables(world, sae, rows)
        rows["neighbours"] += pairs.neighbour_rows(world, sae, saes)
        rows["coactivation"] += pairs.coactivation_rows(sae)
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
    The one of the usual size, which many tests read, is made once for a process and then copied.
    """
    size = (seed, n_layers, n_heads, d_sae, n_blocks, context, engine)
    folder = Path(releases_dir)
    if (name, *size) == USUAL and not (folder / name).exists():
        made = _usual()
        shutil.copytree(made / name, folder / name, copy_function=shutil.copy, symlinks=True)
        return current(folder, name).path
    return _publish(folder, name, *size)


USUAL = ("synthetic", 0, 2, 4, 64, 40, 32, False)


@functools.cache
def _usual() -> Path:
    folder = tempfile.mkdtemp(prefix="synthetic-release-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _publish(Path(folder), *USUAL)
    return Path(folder)


def _publish(
    releases_dir: Path, name: str, seed: int, n_layers: int, n_heads: int, d_sae: int, n_blocks: int,
    context: int, engine: bool,
) -> Path:  # fmt: skip
    rows = synthetic_rows(seed, n_layers, n_heads, d_sae, n_blocks, context, engine)
    config = {"seed": seed, "n_layers": n_layers, "n_heads": n_heads, "d_sae": d_sae}
    with tempfile.TemporaryDirectory() as folder:
        parts = {}
        for table in rows:
            parts[table] = [Path(folder) / f"{table}.parquet"]
            write_table(parts[table][0], table, to_arrow(table, rows[table]))
        provenance = {
            "config": json.dumps(config),
            "code_version": "0.1.0",
            "model": MODEL,
            "seed": str(seed),
        }
        return publish(releases_dir, name, parts, provenance).path
