"""Direct feature attribution of the synthetic release, one example at a time, and its summaries."""

from typing import Any

import numpy as np

from atlas.tables import FULL_WEIGHT
from tests.synthetic_tables import Firing
from tests.synthetic_world import D_HEAD, Encoded, World

Row = dict[str, Any]
KINDS = ("bos", "current", "previous", "same_token", "after_match")
BINS = (
    (-1, -1),
    (0, 0),
    (1, 1),
    (2, 2),
    (3, 4),
    (5, 8),
    (9, 16),
    (17, 32),
    (33, 64),
    (65, 128),
    (129, 32767),
)


def dense(world: World, sae: Encoded, example: Row) -> np.ndarray:
    """[head, source] contributions to the example's pre-activation."""
    block, position = example["block"], example["position"]
    enc = sae.W_enc[:, example["feature"]].reshape(world.n_heads, D_HEAD).astype(np.float64)
    values = np.einsum("shd,hd->hs", sae.v[block].astype(np.float64), enc)
    return (sae.pattern[block, :, position].astype(np.float64) * values)[:, : position + 1]


def kinds(tokens: np.ndarray, position: int, source: int) -> set[str]:
    """Which of KINDS a source is."""
    if source == 0:
        return {"bos"}
    found = set()
    if source == position:
        return {"current"}
    if source == position - 1:
        found.add("previous")
    if tokens[source] == tokens[position]:
        found.add("same_token")
    if source >= 2 and tokens[source - 1] == tokens[position]:
        found.add("after_match")
    return found


def matched_prefix(tokens: np.ndarray, position: int, source: int) -> int:
    """How many tokens before the source repeat those up to the position; BOS is no part of a match."""
    if source in (0, position):
        return 0
    n = 0
    while source - 1 - n >= 1 and tokens[source - 1 - n] == tokens[position - n]:
        n += 1
    return n


def _stored(table: np.ndarray) -> tuple[np.float32, list[Row]]:
    """The largest entries of [head, source] by magnitude, to 95 % of the absolute sum or 32."""
    flat = np.abs(table).ravel()
    unit = np.float32(flat.max() / FULL_WEIGHT)
    order = np.argsort(-flat, kind="stable")
    enough = int(np.searchsorted(np.cumsum(flat[order]), 0.95 * flat.sum())) + 1
    pairs = [divmod(int(i), table.shape[1]) for i in order[: min(enough, 32)] if flat[i] > 0]
    return unit, [{"head": h, "source": s, "weight": round(float(table[h, s] / unit))} for h, s in pairs]


def dfa_row(world: World, sae: Encoded, example: Row, table: np.ndarray) -> Row:
    block, position, feature = example["block"], example["position"], example["feature"]
    unit, sources = _stored(table)
    head, source = divmod(int(table.argmax()), table.shape[1])
    positive = table.max() > 0
    tokens = world.tokens[block]
    return {
        "sae": sae.name, "feature": feature, "example_group": example["example_group"],
        "rank": example["rank"], "by_head": table.sum(-1).tolist(), "bias_term": sae.b_enc[feature],
        "pre_activation": sae.pre[block, position, feature], "top_head": head if positive else None,
        "top_source": source if positive else None,
        "matched_prefix": matched_prefix(tokens, position, source) if positive else 0,
        "unit": unit, "sources": sources,
    }  # fmt: skip


class Positive:
    """Sums of the positive and negative DFA of one feature's top examples, by where the source lies."""

    def __init__(self, n_heads: int) -> None:
        self.n = 0
        self.total = np.zeros(n_heads)
        self.kind = {name: np.zeros(n_heads) for name in KINDS}
        self.local = self.far = 0.0
        self.distance, self.off_bos = np.zeros(n_heads), np.zeros(n_heads)
        self.bins = np.zeros((len(BINS), 2))

    def add(self, tokens: np.ndarray, position: int, table: np.ndarray) -> None:
        self.n += 1
        for source in range(position + 1):
            column, back = np.maximum(table[:, source], 0), position - source
            self.total += column
            for name in kinds(tokens, position, source):
                self.kind[name] += column
            low = -1 if source == 0 else back
            bin_ = next(i for i, (a, b) in enumerate(BINS) if a <= low <= b)
            self.bins[bin_] += column.sum(), np.maximum(-table[:, source], 0).sum()
            if source > 0:
                self.off_bos += column
                self.distance += back * column
                self.local += column.sum() if 1 <= back <= 8 else 0
                self.far += column.sum() if back > 32 else 0


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


def summary_tables(world: World, key: Row, found: list[tuple[Row, Row, np.ndarray]]) -> dict[str, list[Row]]:
    """dfa_summary, dfa_distances and dfa_tokens from (example, dfa row, dense table) of top examples."""
    if not found:
        return {}
    sums = Positive(world.n_heads)
    for example, _, table in found:
        sums.add(world.tokens[example["block"]], example["position"], table)
    total = sums.total.sum()
    matches = [row["matched_prefix"] for _, row, _ in found]
    longer = [n for n in matches if n > 0]
    summary = {
        **key, "n": sums.n, **{name: _ratio(sums.kind[name].sum(), total) for name in KINDS},
        "local": _ratio(sums.local, total), "long_range": _ratio(sums.far, total),
        "distance": _ratio(sums.distance.sum(), sums.off_bos.sum()),
        "matched": len(longer) / len(matches), "matched_prefix": float(np.mean(longer)) if longer else None,
    }  # fmt: skip
    distances = [
        {**key, "low": low, "high": high, "share": share / total, "negative": negative / total}
        for (low, high), (share, negative) in zip(BINS, sums.bins, strict=True)
        if total > 0 and (share or negative)
    ]
    return {"dfa_summary": [summary], "dfa_distances": distances, "dfa_tokens": _tokens(world, key, found)}


def _tokens(world: World, key: Row, found: list[tuple[Row, Row, np.ndarray]]) -> list[Row]:
    share: dict[int, float] = {}
    seen: dict[int, set[int]] = {}
    for number, (example, row, _) in enumerate(found):
        for entry in row["sources"]:
            if entry["weight"] > 0:
                token = int(world.tokens[example["block"], entry["source"]])
                seen.setdefault(token, set()).add(number)
                share[token] = share.get(token, 0.0) + entry["weight"] * float(row["unit"])
    total = sum(share.values())
    best = sorted(share, key=lambda t: (-share[t], t))[:10]
    return [
        {**key, "rank": rank, "token": t, "share": share[t] / total, "n": len(seen[t])}
        for rank, t in enumerate(best)
    ]


def _fve(parts: np.ndarray) -> np.ndarray | None:
    """Cov(d_h, p) / Var(p) of [token, head] parts."""
    total = parts.sum(-1)
    if len(parts) == 0 or total.var() == 0:
        return None
    return ((parts - parts.mean(0)) * (total - total.mean())[:, None]).mean(0) / total.var()


def attribution_rows(
    world: World, sae: Encoded, key: Row, share: np.ndarray, logits: np.ndarray, fires: Firing,
    found: list[tuple[Row, Row, np.ndarray]],
) -> list[Row]:  # fmt: skip
    """head_attribution of one feature; ``logits`` is [head, d_vocab], ``found`` as in summary_tables."""
    x = sae.x.reshape(*world.tokens.shape, world.n_heads, D_HEAD).astype(np.float64)
    enc = sae.W_enc[:, key["feature"]].reshape(world.n_heads, D_HEAD)
    parts = np.einsum("bphd,hd->bph", x, enc)
    all_tokens = _fve(parts[:, 1:].reshape(-1, world.n_heads))
    active = _fve(parts[fires.block, fires.position]) if len(fires.value) >= 10 else None
    sums_of = [table.sum(-1) for _, _, table in found]
    ratios = [d / d.sum() for d in sums_of if 5 * d.sum() >= np.abs(d).sum()]
    dfa_share = np.mean(ratios, axis=0) if ratios else None
    effects = logits.sum(0)
    logit_share = (logits * effects).mean(-1) / (effects**2).mean()
    sums = Positive(world.n_heads)
    for example, _, table in found:
        sums.add(world.tokens[example["block"]], example["position"], table)
    return [
        {**key, "head": h, "decoder_share": share[h], "fve": all_tokens[h],
         "fve_active": None if active is None else active[h],
         "dfa_share": None if dfa_share is None else dfa_share[h], "logit_share": logit_share[h],
         **{f"dfa_{name}": _ratio(sums.kind[name][h], sums.total[h]) for name in KINDS},
         "dfa_distance": _ratio(sums.distance[h], sums.off_bos[h])}
        for h in range(world.n_heads)
    ]  # fmt: skip
