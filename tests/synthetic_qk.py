"""Rows of the synthetic release about a head with SAEs on its queries and keys: patterns, scans, curves."""

from typing import Any

import numpy as np

from tests.synthetic_world import MODEL, Encoded, World

Row = dict[str, Any]
VARIANTS = ("original", "rebuilt", "ablated", "only", "scaled", "subtracted")
LENGTH = 12


def pair_tables(world: World, q: Encoded, k: Encoded, seed: int = 0) -> dict[str, list[Row]]:
    """Every table whose rows belong to the pair: two prompts, one target."""
    rng = np.random.default_rng(seed)
    key = {"q_sae": q.name, "k_sae": k.name}
    rows: dict[str, list[Row]] = {"qk_heads": [_head(key, q)], "qk_targets": [_target(key, world, q, k)]}
    rows["qk_curves"] = [
        row for target, variants in ((-1, VARIANTS[:2]), (0, VARIANTS))
        for variant in variants for row in _curve(key | {"target": target, "variant": variant}, rng)
    ]  # fmt: skip
    for prompt in range(2):
        for name, more in _prompt(key | {"prompt": prompt}, world, q, k, prompt).items():
            rows.setdefault(name, []).extend(more)
    return rows


def _head(key: Row, q: Encoded) -> Row:
    return {
        "model": MODEL, "layer": q.layer, "head": q.head, **key, "q_positional": 4, "q_covered": 3,
        "k_positional": 5, "k_covered": 5, "diagonal_share": 0.75, "diagonal_product": 1.5,
        "other_product": -0.25, "n_diagonal": 4, "original_log_prob": -1.5, "original_attention": 0.6,
        "rebuilt_log_prob": -1.75, "rebuilt_attention": 0.5,
    }  # fmt: skip


def _target(key: Row, world: World, q: Encoded, k: Encoded) -> Row:
    feature = int((k.acts[:, 1:] > 0).sum((0, 1)).argmax())
    products = q.W_dec.astype(np.float64) @ k.W_dec[feature].astype(np.float64)
    best = int(products.argmax())
    return {
        **key, "target": 0, "k_feature": feature, "token": int(world.tokens[0, 3]), "share": 0.9,
        "q_feature": best, "product": products[best], "q_token": int(world.tokens[0, 3]), "q_share": 0.8,
        "place": 3, "half": LENGTH // 2,
    }  # fmt: skip


def _curve(key: Row, rng: np.random.Generator) -> list[Row]:
    half = LENGTH // 2
    rows = []
    for position in range(1, LENGTH + 1):
        probability = float(rng.uniform(0.01, 0.99 if position > half + 1 else 0.05))
        attention = float(rng.random()) if position > half + 1 else None
        rows.append(key | {"position": position, "log_prob": float(np.log(probability)),
                           "probability": probability, "attention": attention, "n": 8})  # fmt: skip
    return rows


def _pattern(scores: np.ndarray) -> np.ndarray:
    hidden = np.triu(np.ones_like(scores, bool), 1)
    size = np.exp(np.where(hidden, -np.inf, scores - scores.max(1, keepdims=True)))
    return size / size.sum(1, keepdims=True)


def _prompt(key: Row, world: World, q: Encoded, k: Encoded, block: int) -> dict[str, list[Row]]:
    """The first tokens of a block, with the rebuilt vectors made of features without biases.

    The query is where most features fire, and the head looks at where most key features do.
    """
    fires_at = {s.name: (s.acts[block] > 0).sum(1) for s in (q, k)}
    query = LENGTH // 2 + int(fires_at[q.name][LENGTH // 2 : LENGTH].argmax())
    source = 1 + int(fires_at[k.name][1 : query + 1].argmax())
    at = slice(0, query + 1)
    q_hat, k_hat = (s.acts[block, at].astype(np.float64) @ s.W_dec.astype(np.float64) for s in (q, k))
    scores = q.x[block, at].astype(np.float64) @ k.x[block, at].T
    scores[query, source] = scores[query].max() + 1
    rebuilt, pattern = _pattern(q_hat @ k_hat.T), _pattern(scores)
    a, c = q.acts[block, query].astype(np.float64), k.acts[block, source].astype(np.float64)
    table = (a[:, None] * q.W_dec) @ (c[:, None] * k.W_dec).T
    fires = {"q": np.flatnonzero(a), "k": np.flatnonzero(c)}
    lost = {"q": table.sum(1), "k": table.sum(0)}
    scans = [
        key | {"side": side, "feature": int(f), "activation": (a if side == "q" else c)[f],
               "change": -lost[side][f]}
        for side in "qk" for f in fires[side]
    ]  # fmt: skip
    places = [(int(i), int(j)) for i in fires["q"] for j in fires["k"]]
    places.sort(key=lambda place: (-table[place], place))
    pairs = [
        key | {"rank": rank, "q_feature": i, "k_feature": j, "contribution": table[i, j],
               "product": float(q.W_dec[i].astype(np.float64) @ k.W_dec[j])}
        for rank, (i, j) in enumerate(places[:20])
    ]  # fmt: skip
    decisive = int(fires["k"][lost["k"][fires["k"]].argmax()]) if len(fires["k"]) else None
    variants = ("original", "rebuilt", *(("without", "only") if decisive is not None else ()))
    attention = {"original": pattern[query, source], "rebuilt": rebuilt[query, source]}
    prompt = key | {
        "text": f"prompt {block}", "tokens": world.tokens[block, at].tolist(), "query": query,
        "source": source, "target": int(world.tokens[block, source]), "k_feature": decisive,
        "score_rebuilt": float(table.sum()), "pattern_kl": 0.1, "pattern_top1": 0.9,
        "score_correlation": 0.95, "pattern": pattern.ravel().tolist(), "rebuilt": rebuilt.ravel().tolist(),
    }  # fmt: skip
    outcomes = [
        key | {"variant": v, "log_prob": -1.0 - i, "attention": attention.get(v, 0.25)}
        for i, v in enumerate(variants)
    ]
    return {"qk_prompts": [prompt], "qk_outcomes": outcomes, "qk_scans": scans, "qk_feature_pairs": pairs}
