"""Rows of the synthetic release about one feature alone: firing, tokens, positions, examples, logits."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from tests.synthetic_world import D_HEAD, W_O, W_U, Encoded, World

Row = dict[str, Any]


class Firing(NamedTuple):
    """Where one feature fires (position 0 left out): blocks, positions, values in reading order."""

    block: np.ndarray
    position: np.ndarray
    value: np.ndarray


def firing(sae: Encoded, feature: int) -> Firing:
    acts = sae.acts[:, 1:, feature]
    block, position = np.nonzero(acts > 0)
    return Firing(block, position + 1, acts[block, position])


def strongest(fires: Firing) -> np.ndarray:
    """Indices from strong to weak; ties go to the smaller (block, position)."""
    return np.lexsort((fires.position, fires.block, -fires.value))


def feature_row(
    world: World, sae: Encoded, feature: int, fires: Firing, logits: np.ndarray | None, pruned: int
) -> Row:
    n = len(fires.value)
    enc, dec = sae.W_enc[:, feature], sae.W_dec[feature]
    norms = np.linalg.norm(enc), np.linalg.norm(dec)
    top_head = None
    if sae.site == "z":
        top_head = int(head_shares(world, sae)[feature].argmax())
    return {
        "sae": sae.name, "feature": feature, "n_active": n, "density": n / sae.acts[:, 1:, 0].size,
        "max_activation": fires.value.max() if n else 0.0,
        "mean_activation": fires.value.mean() if n else None,
        "quantiles": np.quantile(fires.value, np.linspace(0, 1, 11)).tolist() if n else None,
        "encoder_norm": norms[0], "decoder_norm": norms[1],
        "encoder_decoder_cosine": float(enc @ dec / (norms[0] * norms[1])), "bias": sae.b_enc[feature],
        "alive": n > 0, "pruned": pruned, "top_head": top_head,
        **_strongest_tokens(world, fires), **_loss(sae, feature, fires), **_moments(logits),
    }  # fmt: skip


def _commonest(values: list) -> tuple[Any, float]:
    """The commonest value (ties: the smaller) and its share."""
    counts = Counter(values)
    best = min(counts, key=lambda value: (-counts[value], value))
    return best, counts[best] / len(values)


def _strongest_tokens(world: World, fires: Firing) -> Row:
    if not len(fires.value):
        return {}
    order = strongest(fires)
    places = fires.position[order[:2000]].tolist()
    position, position_share = _commonest(places)
    few = [(int(fires.block[i]), int(fires.position[i])) for i in order[:200]]
    token, token_share = _commonest([int(world.tokens[b, p]) for b, p in few])
    previous, previous_share = _commonest([int(world.tokens[b, p - 1]) for b, p in few])
    _, pair_share = _commonest([(int(world.tokens[b, p - 1]), int(world.tokens[b, p])) for b, p in few])
    share_squares = sum((n / len(places)) ** 2 for n in Counter(places).values())
    return {
        "top_position": position, "top_position_share": position_share,
        "effective_positions": 1 / share_squares, "top_token": token, "top_token_share": token_share,
        "top_previous_token": previous, "top_previous_share": previous_share, "top_pair_share": pair_share,
    }  # fmt: skip


def _loss(sae: Encoded, feature: int, fires: Firing) -> Row:
    """Minus activation times decoder row times gradient, over the first half of the blocks."""
    sampled = fires.block < len(sae.acts) // 2
    if not sampled.any():
        return {"loss_effect": None, "n_loss": 0}
    gradient = sae.gradient[fires.block[sampled], fires.position[sampled]]
    effect = -fires.value[sampled] * (gradient @ sae.W_dec[feature])
    return {"loss_effect": effect.mean(), "n_loss": int(sampled.sum())}


def _moments(logits: np.ndarray | None) -> Row:
    if logits is None:
        return {}
    std = logits.std()
    standard = (logits - logits.mean()) / std
    return {
        "logit_mean": logits.mean(), "logit_std": std, "logit_skew": (standard**3).mean(),
        "logit_kurtosis": (standard**4).mean(),
    }  # fmt: skip


def histogram_rows(key: Row, fires: Firing) -> list[Row]:
    if not len(fires.value):
        return []
    low, high = fires.value.min(), fires.value.max()
    steps = {"linear": np.linspace(0, high, 51), "log": np.geomspace(low, high, 31)}
    rows = []
    for scale, edges in steps.items():
        edges[-1] = high
        bins = np.searchsorted(edges[:-1], fires.value, "right") - 1
        counts = np.bincount(np.maximum(bins, 0), minlength=len(edges) - 1)
        rows.append({**key, "scale": scale, "low": edges[0], "high": edges[-1], "n": counts.tolist()})
    return rows


def position_rows(key: Row, fires: Firing) -> list[Row]:
    if not len(fires.value):
        return []
    top = np.bincount(fires.position[strongest(fires)[:2000]], minlength=int(fires.position.max()) + 1)
    places = np.unique(fires.position)
    at = [fires.value[fires.position == place] for place in places]
    return [{**key, "position": places.tolist(), "n_top": top[places].tolist(),
             "n_active": [len(values) for values in at],
             "sum_activation": [float(values.sum()) for values in at]}]  # fmt: skip


def token_rows(world: World, key: Row, fires: Firing) -> list[Row]:
    rows = []
    for role, shift in (("at", 0), ("next", 1)):
        counts = np.bincount(world.tokens[:, 1 + shift :].ravel(), minlength=len(world.texts))
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


def _groups(feature: int, fires: Firing) -> dict[str, list[int]]:
    """Indices into the firings of the examples kept, by group, strongest first."""
    order = strongest(fires)
    top: list[int] = []
    for index in order:
        if len(top) < 20 and fires.block[index] not in {fires.block[i] for i in top}:
            top.append(int(index))
    groups = {"top": top}
    n = len(order)
    # A tenth is floor(10 * rank from the bottom / n): sizes differ by one where n is no multiple of 10.
    tenth = [(n - 1 - rank) * 10 // n for rank in range(n)]
    for q in range(10):
        groups[f"q{q}"] = [int(i) for i, t in zip(order, tenth, strict=True) if t == q][:5]
    drawn = np.random.default_rng(feature).permutation(n)[:5]
    groups["random"] = [int(order[rank]) for rank in sorted(drawn)]
    return groups


def _near_misses(sae: Encoded, feature: int) -> list[tuple[int, int, float]]:
    """(block, position, pre-activation) of the 5 largest that do not fire, at most one per block."""
    silent = np.where(sae.acts[:, :, feature] > 0, -np.inf, sae.pre[:, :, feature])
    silent[:, 0] = -np.inf
    best = silent.argmax(1)
    found = [(b, int(p), float(silent[b, p])) for b, p in enumerate(best) if np.isfinite(silent[b, p])]
    return sorted(found, key=lambda miss: (-miss[2], miss[0]))[:5]


def example_rows(sae: Encoded, key: Row, fires: Firing) -> list[Row]:
    kept = [
        (group, rank, int(fires.block[i]), int(fires.position[i]), fires.value[i], None)
        for group, indices in sorted(_groups(key["feature"], fires).items())
        for rank, i in enumerate(indices)
    ]
    misses = _near_misses(sae, key["feature"])
    kept += [
        ("negative", rank, block, position, 0.0, pre) for rank, (block, position, pre) in enumerate(misses)
    ]
    rows = []
    for group, rank, block, position, value, pre in kept:
        inside = fires.block == block
        rows.append({**key, "example_group": group, "rank": rank, "block": block, "position": position,
                     "activation": value, "near_miss": pre,
                     "active_positions": fires.position[inside].tolist(),
                     "active_values": fires.value[inside].tolist()})  # fmt: skip
    return rows


def head_shares(world: World, sae: Encoded) -> np.ndarray:
    """[d_sae, n_heads] decoder shares."""
    norms = np.linalg.norm(sae.W_dec.reshape(sae.d_sae, world.n_heads, D_HEAD), axis=-1)
    return norms / norms.sum(-1, keepdims=True)


def slice_logits(world: World, sae: Encoded) -> np.ndarray:
    """[d_sae, n_heads, d_vocab]: logit effects of each head's slice, centred over the vocabulary."""
    out = W_O(sae.layer, world.n_heads) @ W_U(world.n_heads, len(world.texts))
    slices = sae.W_dec.reshape(sae.d_sae, world.n_heads, D_HEAD)
    effects = np.einsum("fhd,hdv->fhv", slices, out.reshape(world.n_heads, D_HEAD, -1))
    return effects - effects.mean(-1, keepdims=True)


def _extremes(key: Row, logits: np.ndarray, k: int) -> list[Row]:
    rows = []
    for sign in (-1, 1):
        order = np.argsort(-sign * logits, kind="stable")[:k]
        rows += [
            {**key, "sign": sign, "rank": r, "token": int(t), "value": logits[t]} for r, t in enumerate(order)
        ]
    return rows


def logit_tables(key: Row, by_head: np.ndarray, shares: np.ndarray) -> dict[str, list[Row]]:
    """logit_effects, head_logit_effects and logit_histogram of one feature; by_head is [head, d_vocab]."""
    logits = by_head.sum(0)
    two = sorted(np.argsort(-shares, kind="stable")[:2].tolist())
    counts, edges = np.histogram(logits, 40)
    return {
        "logit_effects": _extremes(key, logits, 20),
        "head_logit_effects": [row for h in two for row in _extremes({**key, "head": h}, by_head[h], 5)],
        "logit_histogram": [{**key, "low": edges[0], "high": edges[-1], "n": counts.tolist()}],
    }
