"""Rows about where features fire, from random numbers: for a release as large as GPT-2's.

Numbers have the spread that a real build has and all the bits of their type, so that they compress as a
build's do: densities are log-normal about 0.1 %, firings of a feature come in bursts, DFA falls off as a
power of the rank, counts are counts. What no query and no compression sees is not modelled: shares of one
feature need not belong to its examples. The same seed gives the same rows.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

N_LAYERS, N_HEADS, D_HEAD, CONTEXT, D_VOCAB, N_BLOCKS = 12, 12, 64, 128, 50_257, 16_384
N_TOKENS = N_BLOCKS * (CONTEXT - 1)
MODEL = "gpt2"
QUANTILES = tuple(f"q{i}" for i in range(10))
GROUPS = (("negative", 5), *((name, 5) for name in QUANTILES), ("random", 5), ("top", 20))
Columns = dict[str, Any]


class Sae(NamedTuple):
    """One whole-layer z SAE: what its tables have in common."""

    number: int
    d_sae: int
    n_active: np.ndarray
    peak: np.ndarray

    @property
    def name(self) -> str:
        return f"{MODEL}/L{self.number:02d}.z.topk-{self.d_sae}"


def make_sae(number: int, d_sae: int) -> Sae:
    rng = np.random.default_rng([number, d_sae])
    density = np.minimum(0.5, 0.001 * np.exp(1.3 * rng.standard_normal(d_sae)))
    n_active = np.where(rng.random(d_sae) < 0.03, 0, rng.poisson(density * N_TOKENS))
    return Sae(number, d_sae, n_active, np.exp(rng.normal(1.0, 0.5, d_sae)).astype(np.float32))


def ragged(lengths: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32()), values)


def named(names: tuple[str, ...], codes: np.ndarray) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), list(names)).cast(pa.string())


def grid(*sizes: int) -> list[np.ndarray]:
    """Indices of a rectangular array in reading order, one flat array per axis."""
    return [axis.ravel() for axis in np.indices(sizes, np.int32)]


def distinct(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whole numbers from 0, raised by as little as makes them different from each other in each row.

    >>> distinct(np.array([0, 0, 0, 1]), np.array([5, 4, 4, 5])).tolist()
    [6, 4, 5, 5]
    """
    key = rows.astype(np.int64) << 32 | values.astype(np.int64)
    order = np.argsort(key, kind="stable")
    place = np.arange(len(key))
    found = np.empty(len(key), np.int64)
    found[order] = (np.maximum.accumulate(key[order] - place) + place) & 0xFFFFFFFF
    return found


def floats(rng: np.random.Generator, n: int | tuple[int, ...]) -> np.ndarray:
    return rng.random(n, np.float32)


def features(sae: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    n, n_active, fires = len(ids), sae.n_active[ids], sae.n_active[ids] > 0
    peak = np.where(fires, sae.peak[ids], 0).astype(np.float32)
    some = {name: pa.array(floats(rng, n), mask=~fires) for name in (
        "mean_activation", "top_position_share", "effective_positions", "top_token_share",
        "top_previous_share", "top_pair_share",
    )}  # fmt: skip
    whole = ("encoder_norm", "decoder_norm", "encoder_decoder_cosine", "bias", "logit_mean", "logit_std",
             "logit_skew", "logit_kurtosis")  # fmt: skip
    quantiles = np.sort(floats(rng, (n, 11)), 1) * peak[:, None]
    return {
        "feature": ids, "n_active": n_active, "density": n_active / N_TOKENS, "max_activation": peak,
        "quantiles": ragged(np.full(n, 11), pa.array(quantiles.ravel())), "alive": fires,
        "pruned": np.zeros(n), "top_head": rng.integers(0, N_HEADS, n),
        "top_position": rng.integers(1, CONTEXT, n), "top_token": rng.integers(0, D_VOCAB, n),
        "top_previous_token": rng.integers(0, D_VOCAB, n),
        "loss_effect": pa.array(floats(rng, n) - 0.5, mask=~fires), "n_loss": np.minimum(n_active, 500),
        **some, **{name: floats(rng, n) for name in whole},
    }  # fmt: skip


def activation_counts(sae: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    f, b = grid(len(ids), 80)
    linear = b < 50
    i = np.where(linear, b, b - 50)
    falling = np.where(linear, np.exp(-i / 8) / 8, np.exp(-(((i - 18) / 7) ** 2)) / 12)
    n = rng.poisson(sae.n_active[ids][f] * falling)
    scale, peak = np.tile([0, 1], len(ids)), np.repeat(sae.peak[ids], 2)
    return {"feature": np.repeat(ids, 2), "scale": named(("linear", "log"), scale),
            "low": np.where(scale == 0, 0, peak * 1e-3).astype(np.float32), "high": peak.astype(np.float32),
            "n": ragged(np.tile([50, 30], len(ids)), pa.array(n.astype(np.int32)))}  # fmt: skip


def position_counts(sae: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    """Nearly every position of nearly every feature: most fire thousands of times."""
    profile = np.exp(0.3 * rng.standard_normal((len(ids), CONTEXT - 1)))
    local = rng.random(len(ids)) < 0.05
    profile[local] = np.exp(2.0 * rng.standard_normal((int(local.sum()), CONTEXT - 1)))
    profile /= profile.sum(1, keepdims=True)
    counts = rng.poisson(profile * sae.n_active[ids][:, None])
    f, p = np.nonzero(counts)
    n, lengths = counts[f, p], np.count_nonzero(counts, axis=1)
    top = np.minimum(1, 2000 / np.maximum(sae.n_active[ids], 1))[f]
    total = n * sae.peak[ids][f] * (0.2 + 0.1 * floats(rng, len(n)))
    columns = {"position": (p + 1).astype(np.int16), "n_top": rng.binomial(n, top).astype(np.int32),
               "n_active": n.astype(np.int32), "sum_activation": total.astype(np.float32)}  # fmt: skip
    lists = {name: ragged(lengths[lengths > 0], pa.array(values)) for name, values in columns.items()}
    return {"feature": ids[lengths > 0], **lists}


def token_stats(sae: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    f, role, rank = grid(len(ids), 2, 50)
    kept = rank < sae.n_active[ids][f]
    f, role, rank = f[kept], role[kept], rank[kept]
    n_all = sae.n_active[ids][f]
    n = 1 + rng.poisson(0.15 * n_all / (1 + rank))
    largest = sae.peak[ids][f] * (0.3 + 0.7 * floats(rng, len(n)))
    occurring = n + rng.poisson(200 / (0.02 + floats(rng, len(n))))
    return {
        "feature": ids[f], "role": named(("at", "next"), role), "rank": rank,
        "token": distinct(2 * f + role, (D_VOCAB - 50) * floats(rng, len(n)) ** 2), "n_active": n,
        "sum_activation": (n * largest * (0.3 + 0.2 * floats(rng, len(n)))).astype(np.float32),
        "max_activation": largest, "precision": np.minimum(1, n / n_all).astype(np.float32),
        "recall": (n / occurring).astype(np.float32),
    }  # fmt: skip


def kept(n: int, groups: tuple[tuple[str, int], ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Feature, group and rank of every example of n features, in the order of the key."""
    sizes = [size for _, size in groups]
    group = np.tile(np.repeat(np.arange(len(groups)), sizes), n)
    rank = np.tile(np.concatenate([np.arange(size) for size in sizes]), n)
    return np.repeat(np.arange(n), sum(sizes)), group, rank


def examples(sae: Sae, ids: np.ndarray, rng: np.random.Generator) -> Columns:
    f, group, rank = kept(len(ids), GROUPS)
    n, miss = len(f), group == 0
    bursts = 5 * CONTEXT * sae.n_active[ids] / N_TOKENS
    others = np.minimum(rng.poisson(rng.gamma(0.7, bursts[f] / 0.7)), CONTEXT - 2)
    fires = np.where(miss, others, others + 1)
    row = np.repeat(np.arange(n), fires)
    place = np.sort(row * CONTEXT + rng.integers(1, CONTEXT, len(row))) - row * CONTEXT
    values = sae.peak[ids][f[row]] * floats(rng, len(row))
    activation = sae.peak[ids][f] * np.where(miss, 0, floats(rng, n))
    return {
        "feature": ids[f], "example_group": named(tuple(name for name, _ in GROUPS), group), "rank": rank,
        "block": distinct(len(GROUPS) * f + group, rng.integers(0, N_BLOCKS - 50, n)),
        "position": rng.integers(1, CONTEXT, n),
        "activation": activation.astype(np.float32), "near_miss": pa.array(floats(rng, n), mask=~miss),
        "active_positions": ragged(fires, pa.array(place.astype(np.int16))),
        "active_values": ragged(fires, pa.array(values.astype(np.float32))),
    }  # fmt: skip
