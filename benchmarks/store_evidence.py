"""Rows about what features read and write, from random numbers: for a release as large as GPT-2's."""

import numpy as np
import pyarrow as pa
from store_tables import (
    CONTEXT,
    D_VOCAB,
    GROUPS,
    MODEL,
    N_HEADS,
    N_LAYERS,
    N_TOKENS,
    Columns,
    Sae,
    distinct,
    floats,
    grid,
    kept,
    named,
    ragged,
)

from atlas.analysis.dfa_rows import short
from atlas.tables import DFA_SHARES, FULL_WEIGHT

BINS = ((-1, -1), (0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 127))


def dfa(sae: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    groups = GROUPS[1:]
    f, group, rank = kept(len(ids), groups)
    n = len(f)
    by_head = (rng.standard_normal((n, N_HEADS), np.float32) * 0.1 + floats(rng, (n, N_HEADS)) ** 4).astype(
        np.float32
    )
    bias = (-0.5 * floats(rng, len(ids)))[f]
    lengths = np.where(rng.random(n) < 0.97, 32, rng.integers(4, 32, n))
    row = np.repeat(np.arange(n), lengths)
    place = np.arange(len(row)) - np.repeat(lengths.cumsum() - lengths, lengths)
    size = FULL_WEIGHT / (1 + place) ** (0.4 + 0.6 * floats(rng, n)[row])
    weight = np.where(floats(rng, len(row)) < 0.75, size, -size).astype(np.int16)
    position = rng.integers(1, CONTEXT, n)
    head = (N_HEADS * floats(rng, len(row)) ** 1.5).astype(np.int16)
    source = (floats(rng, len(row)) * (position[row] + 1)).astype(np.int16)
    triples = pa.StructArray.from_arrays(
        [pa.array(head), pa.array(source), pa.array(weight)], ["head", "source", "weight"]
    )
    first = lengths.cumsum() - lengths
    return {
        "feature": ids[f], "example_group": named(tuple(name for name, _ in groups), group), "rank": rank,
        "by_head": ragged(np.full(n, N_HEADS), pa.array(by_head.ravel())), "bias_term": bias,
        "pre_activation": by_head.sum(1) + bias, "top_head": head[first], "top_source": source[first],
        "matched_prefix": np.where(floats(rng, n) < 0.8, 0, rng.geometric(0.5, n)),
        "unit": short(0.02 * floats(rng, n) * sae.peak[ids][f] / FULL_WEIGHT),
        "sources": ragged(lengths, triples),
    }  # fmt: skip


def head_attribution(sae: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    f, head = grid(len(ids), N_HEADS)
    silent = sae.n_active[ids][f] == 0
    share = rng.gamma(0.5, 1.0, (len(ids), N_HEADS)) + 0.05
    noise = {
        name: pa.array(floats(rng, len(f)) - 0.1, mask=silent)
        for name in ("fve_active", "dfa_share", *(f"dfa_{name}" for name in DFA_SHARES), "dfa_distance")
    }
    decoder = (share / share.sum(1, keepdims=True)).ravel().astype(np.float32)
    return {"feature": ids[f], "head": head, "decoder_share": decoder,
            "fve": decoder + 0.05 * rng.standard_normal(len(f), np.float32),
            "logit_share": decoder + 0.1 * rng.standard_normal(len(f), np.float32), **noise}  # fmt: skip


def dfa_summary(_: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    shares = (*DFA_SHARES, "local", "long_range", "distance", "matched", "matched_prefix")
    return {"feature": ids, "n": np.full(len(ids), 20), **{name: floats(rng, len(ids)) for name in shares}}


def dfa_distances(_: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    f, b = grid(len(ids), len(BINS))
    edges = np.array(BINS)
    return {"feature": ids[f], "low": edges[b, 0], "high": edges[b, 1], "share": floats(rng, len(f)),
            "negative": floats(rng, len(f))}  # fmt: skip


def dfa_tokens(_: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    f, rank = grid(len(ids), 10)
    return {"feature": ids[f], "rank": rank, "token": distinct(f, rng.integers(0, D_VOCAB - 10, len(f))),
            "share": floats(rng, len(f)) / (1 + rank), "n": rng.integers(1, 21, len(f))}  # fmt: skip


def logit_effects(_: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    f, sign, rank = grid(len(ids), 2, 20)
    sign = 2 * sign - 1
    value = (sign * (3 - 0.1 * rank + 0.1 * floats(rng, len(f)))).astype(np.float32)
    return {
        "feature": ids[f],
        "sign": sign,
        "rank": rank,
        "token": distinct(f, rng.integers(0, D_VOCAB - 40, len(f))),
        "value": value,
    }


def head_logit_effects(_: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    f, which, sign, rank = grid(len(ids), 2, 2, 5)
    low = rng.integers(0, N_HEADS - 1, len(ids))
    high = low + 1 + rng.integers(0, N_HEADS - 1 - low)
    sign = 2 * sign - 1
    return {"feature": ids[f], "head": np.where(which, high[f], low[f]), "sign": sign, "rank": rank,
            "token": rng.integers(0, D_VOCAB, len(f)), "value": sign * floats(rng, len(f))}  # fmt: skip


def logit_histogram(_: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    bell = np.exp(-(((np.arange(40) - 20) / 6.0) ** 2))
    n = rng.poisson(np.tile(bell / bell.sum() * D_VOCAB, (len(ids), 1)))
    return {"feature": ids, "low": -floats(rng, len(ids)), "high": floats(rng, len(ids)),
            "n": ragged(np.full(len(ids), 40), pa.array(n.ravel()))}  # fmt: skip


def neighbours(sae: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    f, direction, scope, rank = grid(len(ids), 2, 2, 5)
    others = tuple(f"{MODEL}/L{layer:02d}.z.topk-{sae.d_sae}" for layer in range(N_LAYERS))
    return {
        "feature": ids[f], "direction": named(("decoder", "encoder"), direction),
        "scope": named(("across", "within"), scope), "rank": rank,
        "other_sae": named(others, np.where(scope, sae.number, rng.integers(0, N_LAYERS, len(f)))),
        "other": rng.integers(0, sae.d_sae, len(f)), "cosine": floats(rng, len(f)),
    }  # fmt: skip


def coactivation(sae: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    f, rank = grid(len(ids), 10)
    both = rng.poisson(0.2 * sae.n_active[ids][f] / (1 + rank))
    return {"feature": ids[f], "rank": rank, "other": rng.integers(0, sae.d_sae, len(f)), "n_both": both,
            "jaccard": floats(rng, len(f)), "pearson": floats(rng, len(f)),
            "pmi": 5 * floats(rng, len(f)), "n_tokens": np.full(len(f), N_TOKENS)}  # fmt: skip
