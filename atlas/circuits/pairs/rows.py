"""What was found about a pair as rows of the declared tables, whose names begin with ``qk_``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from atlas.circuits.pairs.naming import Columns, Follower, Places, places, subdiagonal
from atlas.circuits.pairs.pair import Pair
from atlas.circuits.pairs.prompts import PromptResult
from atlas.circuits.pairs.repeats import Curve, place_of
from atlas.circuits.pairs.scan import Parts, strongest_pairs

Row = dict[str, Any]


def names(pair: Pair) -> Row:
    """The columns by which every table tells pairs apart."""
    return {"q_sae": pair.q.info.name, "k_sae": pair.k.info.name}


def head_row(
    pair: Pair, q: Columns, k: Columns, n_blocks: int, curves: Mapping[tuple[int, str], Curve], half: int
) -> Row:
    """The row of ``qk_heads``: positional features and how they fit, and induction on random repeats."""
    sides: tuple[Places, Places] = places(q, n_blocks), places(k, n_blocks)
    products = (pair.q.decoder_directions @ pair.k.decoder_directions.T).cpu().numpy()
    diagonal = subdiagonal(products, *sides)
    row: Row = {"layer": pair.layer, "head": pair.head, **names(pair)}
    for side, of in zip("qk", sides, strict=True):
        row |= {f"{side}_positional": len(of.positional), f"{side}_covered": of.covered}
    row |= {
        "diagonal_share": diagonal.share, "diagonal_product": diagonal.on,
        "other_product": diagonal.off, "n_diagonal": diagonal.n,
    }  # fmt: skip
    for variant in ("original", "rebuilt"):
        found = curves.get((-1, variant))
        second = slice(half + 2, None)
        row[f"{variant}_log_prob"] = None if found is None else float(found.log_prob[second].mean())
        row[f"{variant}_attention"] = None if found is None else float(found.attention[second].mean())
    return row


def target_rows(pair: Pair, found: Sequence[Follower], q: Columns, half: int) -> list[Row]:
    """The rows of ``qk_targets``: each "I follow X" with the query feature that likes it best."""
    rows = []
    for number, one in enumerate(found):
        products = pair.q.decoder_directions @ pair.k.decoder_directions[one.feature]
        best = int(products.argmax())
        alive = q["n_active"][best] > 0
        rows.append(
            names(pair)
            | {"target": number, "k_feature": one.feature, "token": one.token, "share": one.share}
            | {"q_feature": best, "product": float(products[best])}
            | {"q_token": int(q["top_token"][best]) if alive else None}
            | {"q_share": float(q["top_token_share"][best]) if alive else None}
            | {"place": place_of(half), "half": half}
        )
    return rows


def curve_rows(pair: Pair, curves: Mapping[tuple[int, str], Curve]) -> list[Row]:
    """The rows of ``qk_curves``."""
    return [
        names(pair)
        | {"target": target, "variant": variant, "position": position, "n": curve.n}
        | {
            name: _or_null(getattr(curve, name)[position])
            for name in ("log_prob", "probability", "attention")
        }
        for (target, variant), curve in curves.items()
        for position in range(1, len(curve.log_prob))
    ]


def _or_null(value: torch.Tensor) -> float | None:
    number = float(value)
    return None if np.isnan(number) else number


def prompt_rows(pair: Pair, prompt: int, text: str, found: PromptResult) -> dict[str, list[Row]]:
    """The rows of ``qk_prompts``, ``qk_outcomes``, ``qk_scans`` and ``qk_feature_pairs`` of one prompt."""
    key = names(pair) | {"prompt": prompt}
    scan, metrics = found.scan, found.metrics
    whole = key | {
        "text": text, "tokens": list(found.tokens), "query": found.query, "source": found.source,
        "target": found.target, "k_feature": found.k_feature,
        "score_rebuilt": None if scan is None else scan.score,
        **{name: metrics.get(name) for name in ("pattern_kl", "pattern_top1", "score_correlation")},
        "pattern": found.pattern.flatten().tolist(), "rebuilt": found.rebuilt.flatten().tolist(),
    }  # fmt: skip
    outcomes = [
        key | {"variant": name, "log_prob": one.log_prob, "attention": one.attention}
        for name, one in found.outcomes.items()
    ]
    scans, pairs = [], []
    if scan is not None:
        scans = _scan_rows(key, "q", scan.q, scan.without_q, scan.score)
        scans += _scan_rows(key, "k", scan.k, scan.without_k, scan.score)
        for rank, (i, j) in enumerate(strongest_pairs(scan)):
            features = {"q_feature": int(scan.q.feature[i]), "k_feature": int(scan.k.feature[j])}
            sizes = {"product": float(scan.products[i, j]), "contribution": float(scan.weighted[i, j])}
            pairs.append(key | {"rank": rank, **features, **sizes})
    return {"qk_prompts": [whole], "qk_outcomes": outcomes, "qk_scans": scans, "qk_feature_pairs": pairs}


def _scan_rows(key: Row, side: str, of: Parts, without: torch.Tensor, score: float) -> list[Row]:
    return [
        key | {"side": side, "feature": int(f), "activation": float(a), "change": float(w) - score}
        for f, a, w in zip(of.feature, of.activation, without, strict=True)
    ]
