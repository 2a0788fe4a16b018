"""All rows of a release as large as that of GPT-2's twelve attention SAEs, written as a build leaves them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import store_evidence as evidence
import store_tables as tables
from store_tables import Columns, Sae

from atlas.pipeline.inputs import write_columns, write_rows
from atlas.store.parquet import write_table
from atlas.tables import TABLES

AT_ONCE = 2048
"""Features whose rows are held at once."""
N_LOGGED, N_HISTOGRAMS, N_WATCHED = 2000, 100, 32

Rows = Callable[[Sae, np.ndarray, np.random.Generator], Columns]
ALL: dict[str, Rows] = {
    "features": tables.features,
    "head_attribution": evidence.head_attribution,
    "logit_effects": evidence.logit_effects,
    "head_logit_effects": evidence.head_logit_effects,
    "logit_histogram": evidence.logit_histogram,
    "neighbours": evidence.neighbours,
}
"""Tables that have rows of every feature."""
FIRING: dict[str, Rows] = {
    "activation_counts": tables.activation_counts,
    "position_counts": tables.position_counts,
    "token_stats": tables.token_stats,
    "examples": tables.examples,
    "dfa": evidence.dfa,
    "dfa_summary": evidence.dfa_summary,
    "dfa_distances": evidence.dfa_distances,
    "dfa_tokens": evidence.dfa_tokens,
    "coactivation": evidence.coactivation,
}
"""Tables that have rows of the features that fire."""


def batches(sae: Sae, name: str) -> Iterator[pa.Table]:
    """The rows of one table of one SAE, in the order of its key, some features at a time."""
    ids = np.arange(sae.d_sae) if name in ALL else np.flatnonzero(sae.n_active)
    make, declared = (ALL | FIRING)[name], TABLES[name]
    for start in range(0, len(ids), AT_ONCE):
        rng = np.random.default_rng([sae.number, list(TABLES).index(name), start])
        columns = make(sae, ids[start : start + AT_ONCE], rng)
        columns["sae"] = pa.repeat(pa.scalar(sae.name), len(columns["feature"]))
        arrays = {c.name: pa.array(columns[c.name]).cast(c.type, safe=False) for c in declared.columns}
        yield pa.table(arrays, schema=declared.schema)


def write_sae(folder: Path, sae: Sae) -> None:
    """Every table of one SAE as the pipeline leaves it: one Parquet file each."""
    for name in ALL | FIRING:
        write_table(folder / f"{name}.parquet", name, batches(sae, name))


def write_reference(folder: Path, saes: list[Sae]) -> None:
    """The tables that are not about features: model, vocabulary, text, SAEs, training."""
    rng = np.random.default_rng(0)
    shape = {"n_layers": tables.N_LAYERS, "n_heads": tables.N_HEADS, "d_model": 768, "d_head": tables.D_HEAD,
             "d_vocab": tables.D_VOCAB, "n_ctx": 1024}  # fmt: skip
    model = {"model": tables.MODEL, "processing": "folded", "source": "hub", "digest": "0" * 64, **shape}
    write_rows(folder, "models", [model])
    texts = ["".join(chr(97 + c) for c in rng.integers(0, 26, n)) for n in rng.integers(1, 9, tables.D_VOCAB)]
    vocab = {"model": tables.MODEL, "token": np.arange(tables.D_VOCAB), "text": texts}
    write_columns(folder, "vocab", vocab | {"bytes": [text.encode() for text in texts]})
    tokens = (tables.D_VOCAB * rng.random(tables.N_BLOCKS * tables.CONTEXT) ** 3).astype(np.int32)
    blocks = tables.ragged(np.full(tables.N_BLOCKS, tables.CONTEXT), pa.array(tokens))
    sources = [f"document {block // 3}" for block in range(tables.N_BLOCKS)]
    docs = {"corpus": "random", "block": np.arange(tables.N_BLOCKS), "tokens": blocks, "source": sources}
    write_columns(folder, "docs", docs)
    write_rows(folder, "saes", [_sae_row(sae) for sae in saes])
    write_rows(
        folder,
        "sae_metrics",
        [_metric_row(sae, split) for sae in saes for split in ("eval", "eval_with_bos")],
    )
    names = ("previous_token", "first_token", "duplicate_token", "induction", "local", "entropy")
    layer, head, score = tables.grid(tables.N_LAYERS, tables.N_HEADS, len(names))
    scores = {"model": tables.MODEL, "layer": layer, "head": head, "score": tables.named(names, score)}
    write_columns(folder, "head_scores", scores | {"value": rng.random(len(layer)), "n": 1000, "how": "text"})
    for sae in saes:
        _write_training(folder / sae.name.replace("/", "-"), sae.name, rng)


def _sae_row(sae: Sae) -> dict[str, object]:
    return {
        "sae": sae.name, "model": tables.MODEL, "site": "z", "layer": sae.number, "d_in": 768,
        "d_sae": sae.d_sae, "architecture": "topk", "k": 32, "normalize_activations": "none",
        "processing": "folded", "include_bos": False, "tokens_trained": 10**9, "corpus": "random",
        "n_tokens": tables.N_TOKENS, "seed": 0, "origin": "trained", "settings": "{}", "digest": "0" * 64,
        "code_version": "benchmark",
    }  # fmt: skip


def _metric_row(sae: Sae, split: str) -> dict[str, object]:
    names = ("l0", "mse", "variance_explained", "cosine", "l2_ratio", "ce_clean", "ce_spliced", "ce_zero",
             "ce_mean", "ce_recovered", "ce_recovered_mean", "kl")  # fmt: skip
    alive = int((sae.n_active > 0).sum())
    counts = {"alive": alive, "dead": sae.d_sae - alive, "n_tokens": tables.N_TOKENS}
    return {"sae": sae.name, "split": split, **dict.fromkeys(names, 0.5), **counts}


def _write_training(folder: Path, name: str, rng: np.random.Generator) -> None:
    step = np.arange(N_LOGGED)
    measures = ("loss", "mse_loss", "sparsity_loss", "aux_loss", "objective_loss", "l0", "variance_explained",
                "dead_fraction", "lr", "tokens_per_second")  # fmt: skip
    log = {"sae": name, "step": 100 * step, "tokens": 409_600 * step}
    write_columns(folder, "training_log", log | {measure: rng.random(N_LOGGED) for measure in measures})
    when, bin_ = tables.grid(N_HISTOGRAMS, 29)
    low = pa.array(-7 + 0.25 * (bin_ - 1), mask=bin_ == 0)
    counts = {"low": low, "bin": bin_ - 1, "n": rng.integers(0, 1000, len(when))}
    write_columns(folder, "training_density", {"sae": name, "step": 2000 * when, **counts})
    when, feature = tables.grid(N_LOGGED, N_WATCHED)
    watched = {"feature": feature, "max_activation": tables.floats(rng, len(when))}
    write_columns(folder, "training_watched", {"sae": name, "step": 100 * when, **watched})
