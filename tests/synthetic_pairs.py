"""Rows of the synthetic release about pairs: neighbours, co-activation, q with k, features with positions."""

from typing import Any

import numpy as np

from tests.synthetic_world import W_O, Encoded, World, position_keys

Row = dict[str, Any]
Directions = list[tuple[str, np.ndarray]]


def neighbour_rows(world: World, sae: Encoded, saes: list[Encoded]) -> list[Row]:
    """The five nearest directions of each feature; across layers, z decoders meet in the residual stream."""
    rows = []
    own = {"decoder": sae.W_dec, "encoder": sae.W_enc.T}
    for feature in range(sae.d_sae):
        key = {"sae": sae.name, "feature": feature}
        for direction, vectors in own.items():
            others = [(sae.name, vectors)]
            rows += _nearest({**key, "direction": direction, "scope": "within"}, vectors[feature], others)
        if sae.site == "z":
            others = [(s.name, _written(world, s)) for s in saes if s.site == "z" and s is not sae]
            mine = _written(world, sae)[feature]
            rows += _nearest({**key, "direction": "decoder", "scope": "across"}, mine, others)
    return rows


def _written(world: World, sae: Encoded) -> np.ndarray:
    return sae.W_dec @ W_O(sae.layer, world.n_heads)


def _nearest(key: Row, vector: np.ndarray, others: Directions) -> list[Row]:
    found = [
        (-float(vector @ row / (np.linalg.norm(vector) * np.linalg.norm(row))), name, number)
        for name, rows in others
        for number, row in enumerate(rows)
        if (name, number) != (key["sae"], key["feature"])
    ]
    return [
        {**key, "rank": rank, "other_sae": name, "other": number, "cosine": min(1.0, -negative)}
        for rank, (negative, name, number) in enumerate(sorted(found)[:5])
    ]


def coactivation_rows(sae: Encoded) -> list[Row]:
    """Features that fire together at least twice, over the first three quarters of the blocks.

    By Jaccard; ties go to the more joint firings, then to the lower index.
    """
    acts = sae.acts[: len(sae.acts) * 3 // 4, 1:].reshape(-1, sae.d_sae).astype(np.float64)
    n = len(acts)
    fires = acts > 0
    both, counts = fires.T.astype(int) @ fires.astype(int), fires.sum(0)
    rows = []
    for feature in range(sae.d_sae):
        found = []
        for other in np.flatnonzero(both[feature] >= 2):
            if other != feature:
                n_both = int(both[feature, other])
                either = counts[feature] + counts[other] - n_both
                found.append((-n_both / either, -n_both, int(other)))
        for rank, (negative, _, other) in enumerate(sorted(found)[:10]):
            n_both = int(both[feature, other])
            rows.append({
                "sae": sae.name, "feature": feature, "rank": rank, "other": other, "n_both": n_both,
                "jaccard": -negative, "pearson": np.corrcoef(acts[:, feature], acts[:, other])[0, 1],
                "pmi": np.log(n_both * n / (counts[feature] * counts[other])), "n_tokens": n,
            })  # fmt: skip
    return rows


def head_pair_tables(world: World, q: Encoded, k: Encoded) -> dict[str, list[Row]]:
    """qk_partners, qk_products and position_products of the q and the k SAE of one head."""
    products = q.W_dec.astype(np.float64) @ k.W_dec.astype(np.float64).T
    partners, positions = [], []
    for one, other, table in ((q, k, products), (k, q, products.T)):
        keys = position_keys(world.n_heads, world.tokens.shape[1], one.site)
        for feature, row in enumerate(table):
            names = {"sae": one.name, "feature": feature}
            order = np.argsort(-row, kind="stable")[:10]
            partners += [
                {**names, "other_sae": other.name, "rank": rank, "other": int(i), "product": row[i]}
                for rank, i in enumerate(order)
            ]
            with_positions = keys @ one.W_dec[feature]
            centred = with_positions - with_positions.mean()
            positions.append({**names, "products": with_positions.tolist(), "centred": centred.tolist()})
    return {
        "qk_partners": partners,
        "qk_products": [
            {"sae": q.name, "other_sae": k.name, "feature": feature, "products": row.tolist()}
            for feature, row in enumerate(products)
        ],
        "position_products": positions,
    }
