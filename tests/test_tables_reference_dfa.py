"""Every table about which head, looking where, made features fire, against float64 brute force.

The dense head x source matrix of each kept example is made here from the model written out in float64;
sums over top examples and shares follow from it in plain loops.
"""

from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

from atlas.tables import DFA_SHARES, FULL_WEIGHT
from tests.reference import CONTEXT, D_HEAD, N_HEADS, PROCESSINGS, SAES, SILENT
from tests.reference_release import release, same

FEW = 1e-6
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""For shares and means of contributions, which are sums of many float32 products."""
LOWS = (-1, 0, 1, 2, 3, 5, 9, 17, 33, 65, 129)
HIGHS = (-1, 0, 1, 2, 4, 8, 16, 32, 64, 128, 32767)
READING = [i for i, sae in enumerate(SAES) if sae["site"].split(".")[-1] in ("z", "attn_out")]
WHOLE = [i for i in READING if SAES[i]["site"] in ("L00.z", "L01.z")]


def ids(item):
    return f"{SAES[item]['site']}-{item}"


@pytest.fixture(scope="module", params=PROCESSINGS)
def built(request):
    return release(request.param)


@pytest.fixture(scope="module", params=READING, ids=ids)
def one(request, built):
    return built.evidence[request.param]


@pytest.fixture(scope="module", params=WHOLE, ids=ids)
def whole(request, built):
    return built.evidence[request.param]


# ---------------------------------------------------------------- contributions


def directions(one):
    """[d_sae, heads, d_head]: how pre-activations read the z of each head; and those heads."""
    sae, W = one.sae, one.sae.W_enc
    if sae.info.normalize_activations == "layer_norm":
        W = W - W.mean(0)
    if sae.site.kind == "attn_out":
        through = one.built.model.W_O(sae.site.layer) @ W
        return through.transpose(2, 0, 1), list(range(N_HEADS))
    heads = list(range(N_HEADS)) if sae.site.head is None else [sae.site.head]
    return W.T.reshape(one.d_sae, len(heads), D_HEAD), heads


def bias_term(one, f, block, position):
    """What a pre-activation holds beside its heads' parts."""
    bias = one.sae.bias_term[f]
    if one.sae.site.kind == "attn_out":
        bias += (
            one.built.model.b_O(one.sae.site.layer)
            @ one.sae.W_enc[:, f]
            / one.sae.scale(one.x[block, position])[1][0]
        )
    return bias


def dense(one, f, block, position):
    """[heads, sources]: pattern times value times direction, over the token's size."""
    acts, layer = one.built.run.acts, one.sae.site.layer
    W, heads = directions(one)
    pattern, v = acts[f"{layer}.pattern"][block], acts[f"{layer}.v"][block]
    out = np.zeros((len(heads), CONTEXT))
    for row, head in enumerate(heads):
        for source in range(CONTEXT):
            out[row, source] = pattern[head, position, source] * (v[source, head] @ W[f, row])
    return out / one.sae.scale(one.x[block, position])[1][0]


class Example(NamedTuple):
    """A kept example on which a feature fires: its rows in two tables, and its dense contributions."""

    example: dict
    dfa: dict
    dense: np.ndarray


@cache
def examples_of(one):
    """By feature, every example on which it fires, in the order of the table."""
    key = ("feature", "example_group", "rank")
    rows = {tuple(row[c] for c in key): row for row in one.built.rows("dfa") if row["sae"] == one.name}
    found, seen = defaultdict(list), 0
    for f, kept in one.of("examples").items():
        for row in kept:
            if row["example_group"] != "negative":
                contributions = dense(one, f, row["block"], row["position"])
                found[f].append(Example(row, rows[tuple(row[c] for c in key)], contributions))
                seen += 1
    assert seen == len(rows) > 0, "one row for each example on which a feature fires, and no more"
    return found


def top_of(one, f):
    return [e for e in examples_of(one)[f] if e.example["example_group"] == "top"]


def test_pattern_times_values_is_z(built):
    acts = built.run.acts
    z = np.einsum("bhqk,bkhd->bqhd", acts["1.pattern"], acts["1.v"])
    np.testing.assert_allclose(z, acts["1.z"], atol=1e-12)


def test_heads_and_bias_are_the_preactivation(one):
    heads = directions(one)[1]
    for f, examples in examples_of(one).items():
        for example, row, matrix in examples:
            where = (one.name, f, row["example_group"], row["rank"])
            pre, by_head = one.pre[example["block"], example["position"], f], matrix.sum(1)
            bias = bias_term(one, f, example["block"], example["position"])
            assert by_head.sum() + bias == pytest.approx(pre, abs=1e-10)
            assert len(row["by_head"]) == len(heads)
            rounded = np.abs(by_head).max() / 4095  # stored in 12 bits of the largest
            same(row["by_head"], by_head, where, rtol=1e-5, atol=2e-5 + rounded)
            same(row["bias_term"], bias, where, rtol=1e-5, atol=2e-5)
            same(row["pre_activation"], pre, where, rtol=1e-5, atol=2e-5)
            same(row["pre_activation"], example["activation"], where, rtol=1e-5, atol=2e-5)


def prefix(tokens, position, source):
    """Tokens before the source that repeat those up to the position; BOS at the start never counts."""
    n = 0
    if source is not None and 2 <= source < position:
        while source - 1 - n >= 1 and tokens[source - 1 - n] == tokens[position - n]:
            n += 1
    return n


def test_the_strongest_source(one):
    heads = directions(one)[1]
    for f, examples in examples_of(one).items():
        for example, row, matrix in examples:
            where = (one.name, f, row["example_group"], row["rank"])
            tokens = one.built.tokens[example["block"]]
            if row["top_head"] is None:
                assert row["top_source"] is None, where
                assert matrix.max() < 1e-6, where
            else:
                strength = matrix[heads.index(row["top_head"]), row["top_source"]]
                assert strength > 0, where
                same(strength, matrix.max(), where, rtol=1e-5, atol=1e-6)
            assert row["matched_prefix"] == prefix(tokens, example["position"], row["top_source"]), where


def test_the_text_repeats_itself(built):
    found = [row["matched_prefix"] for row in built.rows("dfa")]
    assert min(found) == 0
    assert max(found) > 2


def test_stored_sources(one):
    heads = directions(one)[1]
    for f, examples in examples_of(one).items():
        for _, row, matrix in examples:
            where = (one.name, f, row["example_group"], row["rank"])
            size, total, eps = np.abs(matrix), np.abs(matrix).sum(), 5e-6 + 1e-5 * np.abs(matrix).max()
            steps = size.max() / row["unit"] if row["unit"] else FULL_WEIGHT
            assert FULL_WEIGHT / 1.0101 <= steps <= FULL_WEIGHT * (1 + 1e-5), where
            places = [(heads.index(s["head"]), s["source"]) for s in row["sources"]]
            assert len(set(places)) == len(places) <= 32, where
            for s, place in zip(row["sources"], places, strict=True):
                assert abs(s["weight"] * row["unit"] - matrix[place]) <= row["unit"] / 2 + eps, (where, s)
            stored = [size[place] for place in places]
            assert all(a >= b - eps for a, b in pairwise(stored)), where
            # Contributions that differ by less than a step of the stored weights count as equal.
            left_out = np.delete(size.ravel(), [head * CONTEXT + source for head, source in places])
            assert left_out.max() <= min(stored, default=np.inf) + row["unit"] + eps, where
            done = len(stored) == 32 or np.count_nonzero(size) == len(stored)
            assert done or sum(stored) >= 0.95 * total - 32 * eps, where
            assert len(stored) <= 1 or sum(stored[:-1]) < 0.95 * total + 32 * eps, where


# ---------------------------------------------------------------- where the evidence lies


def kinds(tokens, position):
    """Which sources count for each share, one after the other."""
    found = defaultdict(list)
    for s in range(position + 1):
        back, here = position - s, tokens[position]
        member = {
            "all": True,
            "bos": s == 0,
            "not_bos": s > 0,
            "current": back == 0,
            "previous": s > 0 and back == 1,
            "same_token": s > 0 and back > 0 and tokens[s] == here,
            "after_match": s > 1 and back > 0 and tokens[s - 1] == here,
            "local": s > 0 and 1 <= back <= 8,
            "long_range": s > 0 and back > 32,
        }
        for name, inside in member.items():
            if inside:
                found[name].append(s)
    return found


def positive_sums(one, f):
    """By kind, each head's positive contributions over the top examples; ``distance`` weighs them by it."""
    heads = directions(one)[1]
    sums = defaultdict(lambda: np.zeros(len(heads)))
    for example, _, matrix in top_of(one, f):
        position, positive = example["position"], np.maximum(matrix, 0)
        for name, sources in kinds(one.built.tokens[example["block"]], position).items():
            sums[name] += positive[:, sources].sum(1)
        sums["distance"] += sum(
            (positive[:, s] * (position - s) for s in range(1, position + 1)), np.zeros(len(heads))
        )
    return sums


def ratio(part, total):
    return part / total if total > 0 else None


def test_dfa_summary(one):
    found = one.of("dfa_summary")
    assert sorted(found) == [f for f in range(one.d_sae) if one.acts[..., f].any()]
    for f, (row,) in found.items():
        top, sums = top_of(one, f), {name: v.sum() for name, v in positive_sums(one, f).items()}
        assert row["n"] == len(top)
        for name in (*DFA_SHARES, "local", "long_range"):
            same(row[name], ratio(sums.get(name, 0.0), sums["all"]), (one.name, f, name), **CLOSE)
        same(row["distance"], ratio(sums["distance"], sums["not_bos"]), (one.name, f), rtol=1e-4)
        prefixes = [e.dfa["matched_prefix"] for e in top]
        matched = [n for n in prefixes if n > 0]
        same(row["matched"], len(matched) / len(top), (one.name, f), rtol=FEW)
        same(row["matched_prefix"], np.mean(matched) if matched else None, (one.name, f), rtol=FEW)


def test_dfa_distances(one):
    for f in range(one.d_sae):
        positive, negative = np.zeros(len(LOWS)), np.zeros(len(LOWS))
        for example, _, matrix in top_of(one, f):
            for s in range(example["position"] + 1):
                back = -1 if s == 0 else example["position"] - s
                (place,) = (i for i, low in enumerate(LOWS) if low <= back <= HIGHS[i])
                positive[place] += np.maximum(matrix[:, s], 0).sum()
                negative[place] += np.maximum(-matrix[:, s], 0).sum()
        found = {row["low"]: row for row in one.of("dfa_distances")[f]}
        assert sorted(found) == [row["low"] for row in one.of("dfa_distances")[f]]
        total = positive.sum()
        for low, high, p, n in zip(LOWS, HIGHS, positive, negative, strict=True):
            if low not in found:
                assert total == 0 or (p + n) / total < 1e-6, (one.name, f, low)
                continue
            row, where = found.pop(low), (one.name, f, low)
            assert row["high"] == high, where
            same(row["share"], p / total, where, **CLOSE)
            same(row["negative"], n / total, where, **CLOSE)
        assert not found, (one.name, f)


def test_dfa_tokens(one):
    """From the stored sources, which are compared with the dense ones above."""
    for f in range(one.d_sae):
        share, among = defaultdict(float), defaultdict(set)
        for number, (example, row, _) in enumerate(top_of(one, f)):
            for s in row["sources"]:
                if s["weight"] > 0:
                    token = int(one.built.tokens[example["block"], s["source"]])
                    share[token] += s["weight"] * row["unit"]
                    among[token].add(number)
        ranked = sorted(share, key=lambda t: (-share[t], t))[:10]
        found = one.of("dfa_tokens")[f]
        assert [row["token"] for row in found] == ranked, (one.name, f)
        for rank, row in enumerate(found):
            where = (one.name, f, rank)
            assert (row["rank"], row["n"]) == (rank, len(among[row["token"]])), where
            same(row["share"], share[row["token"]] / sum(share.values()), where, rtol=FEW)


# ---------------------------------------------------------------- heads


def covariance_shares(parts):
    """Cov(part, sum) / Var(sum) of each column of [n, parts]."""
    total = parts.sum(1)
    variance = total.var()
    if variance < 1e-20:
        return [None] * parts.shape[1]
    return [np.mean((part - part.mean()) * (total - total.mean())) / variance for part in parts.T]


def parts_of(one, f):
    """Each head's part of the linear pre-activation, [blocks, context, heads]."""
    x, sae = one.x, one.sae
    W = directions(one)[0][f]
    return np.einsum("bphd,hd->bph", x.reshape(*x.shape[:2], N_HEADS, D_HEAD), W) / sae.scale(x)[1]


def attributed(row, name, expected, where, atol, rtol=0.0):
    """Compare a column of head_attribution."""
    same(row[name], expected, (*where, name), rtol, atol)


def test_head_attribution_of_weights(whole):
    model, sae = whole.built.model, whole.sae
    for f, rows in whole.of("head_attribution").items():
        assert [row["head"] for row in rows] == list(range(N_HEADS))
        slices = sae.W_dec[f].reshape(N_HEADS, D_HEAD)
        norms = np.linalg.norm(slices, axis=1)
        effects = np.einsum("hd,hdm->hm", slices, model.W_O(sae.site.layer)) @ model.unembedding
        shares = covariance_shares(effects.T)
        for h, row in enumerate(rows):
            where = (whole.name, f, h)
            attributed(row, "decoder_share", norms[h] / max(norms.sum(), 1e-30), where, 6e-6)
            attributed(row, "logit_share", shares[h], where, 1.5e-5)
    (silent,) = {row["logit_share"] for row in whole.of("head_attribution")[SILENT]}
    assert silent is None


def test_fve(whole):
    for f, rows in whole.of("head_attribution").items():
        parts, fires = parts_of(whole, f), whole.acts[..., f] > 0
        shares = covariance_shares(parts[:, 1:].reshape(-1, N_HEADS))
        active = covariance_shares(parts[fires]) if fires.sum() >= 10 else [None] * N_HEADS
        for h, row in enumerate(rows):
            attributed(row, "fve", shares[h], (whole.name, f, h), 1e-4)
            attributed(row, "fve_active", active[h], (whole.name, f, h), 1e-3)


def test_dfa_of_heads(whole):
    for f, rows in whole.of("head_attribution").items():
        sums, by_head = positive_sums(whole, f), [e.dense.sum(1) for e in top_of(whole, f)]
        usable = [d for d in by_head if 5 * d.sum() >= np.abs(d).sum()]
        share = np.mean([d / d.sum() for d in usable], axis=0) if usable else [None] * N_HEADS
        # Where the parts cancel, their rounding is divided by a small sum.
        error = np.mean([2e-5 * np.abs(d).sum() / d.sum() ** 2 for d in usable]) if usable else 0
        for h, row in enumerate(rows):
            where = (whole.name, f, h)
            attributed(row, "dfa_share", share[h], where, error + 5e-6, 1e-5)
            for name in DFA_SHARES:
                total = sums["all"][h] if by_head else 0.0
                attributed(row, f"dfa_{name}", ratio(sums[name][h], total), where, **CLOSE)
            attributed(row, "dfa_distance", ratio(sums["distance"][h], sums["not_bos"][h]), where, 0, 1e-4)


# ---------------------------------------------------------------- the summary of each head


def average_ranks(values):
    """Ranks from 1; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) + 1) / 2 for v in values]


def families(feature, summary):
    """The families of a feature, by the rules of ``atlas.store.families``."""
    found = {"dead"} if not feature["alive"] else set()
    found |= {"dense"} if feature["density"] > 0.1 else set()
    if feature["n_active"] >= 10:
        pair = feature["top_pair_share"] >= 0.8
        found |= {"positional"} if feature["top_position_share"] >= 0.5 else set()
        found |= {"single_token"} if feature["top_token_share"] >= 0.8 and not pair else set()
        found |= {"bigram"} if pair else set()
    if summary and summary["n"] >= 5 and summary["bos"] is not None:
        s = summary
        after, same_token, previous = s["after_match"], s["same_token"], s["previous"]
        rules = {
            "previous_token": previous >= 0.5,
            "duplicate_token": same_token >= 0.5 and same_token >= after,
            "induction": after >= 0.5 and s["matched"] >= 0.5 and after > max(previous, same_token),
            "local_context": s["local"] >= 0.5 and previous < 0.5,
            "long_range_context": s["long_range"] >= 0.5,
        }
        found |= {name for name, member in rules.items() if member}
    return found


def test_head_summary(whole):
    features = {f: row for f, (row,) in whole.of("features").items()}
    summaries = whole.of("dfa_summary")
    rows = [row for row in whole.built.rows("head_summary") if row["sae"] == whole.name]
    assert [row["head"] for row in rows] == list(range(N_HEADS))
    for row in rows:
        head, where = row["head"], (whole.name, row["head"])
        mine = {f: r[head] for f, r in whole.of("head_attribution").items() if features[f]["alive"]}
        values = {
            name: [r[name] for r in mine.values() if r[name] is not None]
            for name in ("decoder_share", "fve", "dfa_share")
        }
        assert (row["model"], row["layer"]) == ("tiny", whole.sae.site.layer)
        assert row["n_features"] == len(mine)
        assert row["n_top"] == sum(features[f]["top_head"] == head for f in mine)
        s = np.array(values["decoder_share"])
        same(row["effective_features"], s.sum() ** 2 / (s**2).sum(), where, rtol=FEW)
        same(row["max_decoder_share"], s.max(), where, rtol=FEW)
        for name, numbers in values.items():
            same(row[f"top10_{name}"], np.mean(sorted(numbers)[-10:]), (where, name), rtol=FEW)
        whole_rows = [r for r in mine.values() if None not in (r["fve"], r["dfa_share"])]
        for name, (a, b) in {
            "corr_decoder_fve": ("decoder_share", "fve"),
            "corr_decoder_dfa": ("decoder_share", "dfa_share"),
            "corr_fve_dfa": ("fve", "dfa_share"),
        }.items():
            ranks = [average_ranks([r[m] for r in whole_rows]) for m in (a, b)]
            same(row[name], np.corrcoef(*ranks)[0, 1], (where, name), atol=1e-9)
        for name in ("distance", *DFA_SHARES):
            column = f"dfa_{name}"
            weighted = [(max(r["fve"], 0), r[column]) for r in mine.values() if r[column] is not None]
            weights = sum(w for w, _ in weighted)
            mean = sum(w * v for w, v in weighted) / weights if weights else None
            same(row[name], mean, (where, name), rtol=FEW)
        counts = Counter()
        for f, feature in features.items():
            if feature["top_head"] == head:
                counts.update(families(feature, summaries[f][0] if f in summaries else None))
        found = {name[2:]: n for name, n in row.items() if name[2:] in ALL_FAMILIES and name[:2] == "n_"}
        assert found == {name: counts[name] for name in ALL_FAMILIES}, where


ALL_FAMILIES = (
    "dead", "dense", "positional", "single_token", "bigram", "previous_token", "duplicate_token",
    "induction", "local_context", "long_range_context",
)  # fmt: skip
