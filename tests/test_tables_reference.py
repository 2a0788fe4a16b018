"""Every table about features' activations, against float64 brute force on a tiny model.

First the recorded activations are compared with the model and the SAEs written out in float64; the tables,
which are exact functions of what was recorded, are then recomputed from it in plain loops.
"""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from tests.reference import (
    AMBIGUOUS,
    ANALYSED,
    BLOCKS,
    COACTIVATION_BLOCKS,
    CONTEXT,
    COPIED,
    DEAD,
    LOSS_BLOCKS,
    N_HEADS,
    PROCESSINGS,
    RARE,
    SAES,
)  # fmt: skip
from tests.reference_release import release, same, same_ranking

FEW = 1e-6
"""Relative error of one rounding to float32, and a little."""


@pytest.fixture(scope="module", params=PROCESSINGS)
def built(request):
    return release(request.param)


@pytest.fixture(scope="module", params=range(len(SAES)), ids=lambda i: f"{SAES[i]['site']}-{i}")
def one(request, built):
    return built.evidence[request.param]


# ---------------------------------------------------------------- the world, and what was recorded


def test_the_text_is_the_stream_of_words(built):
    """The first blocks of the corpus, then the extension, each in some order."""
    stream = []
    for path in sorted((built.root / "text").iterdir()):
        stream += [0, *(int(word[1:]) + 1 for word in path.read_text().split())]
    width = CONTEXT - 1
    runs = [[0, *stream[1 + i * width : 1 + (i + 1) * width]] for i in range(len(stream) // width)]
    blocks = built.tokens.tolist()
    assert len(blocks) == ANALYSED
    assert sorted(blocks[:BLOCKS]) == sorted(runs[:BLOCKS])
    assert all(block in runs[BLOCKS : 2 * BLOCKS] for block in blocks[BLOCKS:])
    assert len(set(map(tuple, blocks))) == ANALYSED


def test_recorded_activations_are_those_of_the_model_in_float64(one):
    margin = one.sae.margins(one.x)
    margin[:, 0] = -1
    clear = np.abs(margin) > AMBIGUOUS
    assert (~clear).mean() < 0.02 or one.sae.info.rescale_acts_by_decoder_norm
    fires = one.acts > 0
    assert ((margin > 0) == fires)[clear].all()
    np.testing.assert_allclose(one.acts[fires], one.pre[fires], rtol=1e-5, atol=2e-5)


def test_the_world_has_what_the_tables_have_to_show(built):
    counts = [(one.acts > 0).sum((0, 1)) for one in built.evidence]
    n_tokens = ANALYSED * (CONTEXT - 1)
    assert all(n[DEAD] == 0 for n in counts)
    assert any(0 < n[RARE] < 10 for n in counts)
    assert any((n > 2000).any() for n in counts)
    assert any(((n > 300) & (n < 2000)).any() for n in counts)
    assert max(n.max() for n in counts) > 0.8 * n_tokens
    alike = [one.acts[..., COPIED] for one in built.evidence]
    assert any(a.any() for a in alike)


# ---------------------------------------------------------------- features


def test_feature_counts_and_sizes(one):
    for f, (row,) in one.of("features").items():
        where, values = (one.name, f), np.array([v for _, _, v in one.fires(f)], np.float64)
        assert row["n_active"] == len(values), where
        assert row["alive"] == (len(values) > 0), where
        same(row["density"], len(values) / (ANALYSED * (CONTEXT - 1)), where, rtol=1e-12)
        same(row["max_activation"], max(values, default=0.0), where)
        same(row["mean_activation"], values.mean() if len(values) else None, where, rtol=FEW)
        deciles = np.quantile(values, np.arange(11) / 10) if len(values) else None
        same(row["quantiles"], deciles, where, rtol=FEW)
    assert sorted(one.of("features")) == list(range(one.d_sae))


def test_feature_weights(one):
    sae = one.sae
    for f, (row,) in one.of("features").items():
        where, encoder, decoder = (one.name, f), sae.W_enc[:, f], sae.W_dec[f]
        norms = np.linalg.norm(encoder), np.linalg.norm(decoder)
        same(row["encoder_norm"], norms[0], where, rtol=FEW)
        same(row["decoder_norm"], norms[1], where, rtol=FEW)
        cosine = encoder @ decoder / max(norms[0] * norms[1], 1e-30)
        same(row["encoder_decoder_cosine"], cosine, where, atol=FEW)
        same(row["bias"], sae.b_enc[f], where, rtol=FEW)
        assert row["pruned"] == 0
        if not sae.whole_z:
            assert row["top_head"] is None
            continue
        slices = np.linalg.norm(decoder.reshape(N_HEADS, -1), axis=1)
        assert row["top_head"] == slices.argmax(), where


def commonest(labels):
    """The commonest label, ties to the smaller one, and its share."""
    counts = Counter(labels)
    label = min(counts, key=lambda key: (-counts[key], key))
    return label, counts[label] / len(labels)


def test_feature_traits(one):
    tokens = one.built.tokens
    for f, (row,) in one.of("features").items():
        where, strongest = (one.name, f), one.strongest(f)
        names = ("top_position", "top_position_share", "effective_positions", "top_token")
        if not strongest:
            assert {
                row[name] for name in (*names, "top_token_share", "top_previous_share", "top_pair_share")
            } == {None}, where
            continue
        positions = [p for _, p, _ in strongest[:2000]]
        position, share = commonest(positions)
        assert row["top_position"] == position, where
        same(row["top_position_share"], share, where, rtol=FEW)
        n = np.array(list(Counter(positions).values()))
        same(row["effective_positions"], n.sum() ** 2 / (n**2).sum(), where, rtol=FEW)
        strong = [(b, p) for b, p, _ in strongest[:200]]
        token, share = commonest([tokens[b, p] for b, p in strong])
        assert row["top_token"] == token, where
        same(row["top_token_share"], share, where, rtol=FEW)
        token, share = commonest([tokens[b, p - 1] for b, p in strong])
        assert row["top_previous_token"] == token, where
        same(row["top_previous_share"], share, where, rtol=FEW)
        _, share = commonest([(tokens[b, p - 1], tokens[b, p]) for b, p in strong])
        same(row["top_pair_share"], share, where, rtol=FEW)


def test_loss_effects(one):
    """First order: minus what the feature adds to the site, along the gradient of the summed loss."""
    back = one.sae.scale(one.x)[2]
    for f, (row,) in one.of("features").items():
        where = (one.name, f)
        fires = [(b, p, float(v)) for b, p, v in one.fires(f) if b < LOSS_BLOCKS]
        effects = [-v * back[b, p, 0] * (one.sae.W_dec[f] @ one.grad[b, p]) for b, p, v in fires]
        assert row["n_loss"] == len(fires), where
        size = max(map(abs, effects), default=0)
        same(row["loss_effect"], np.mean(effects) if fires else None, where, rtol=1e-4, atol=1e-4 * size)


def test_gradients_of_the_reference_are_slopes(built):
    """A small step in a bias changes the float64 loss by as much as the gradients there say."""
    found = built.run.grads["1.attn_out"]
    model, tokens = built.model, built.tokens[:1]
    bias, step = model.w["h.1.attn.c_proj.bias"], 1e-6
    direction = np.random.default_rng(0).standard_normal(len(bias))

    def loss(moved):
        model.w["h.1.attn.c_proj.bias"] = bias + moved * bias.new_tensor(direction)
        return model.loss(tokens)

    try:
        slope = (loss(step) - loss(-step)) / (2 * step)
    finally:
        model.w["h.1.attn.c_proj.bias"] = bias
    assert slope == pytest.approx((found[0] @ direction).sum(), rel=1e-6)


# ---------------------------------------------------------------- histograms, positions, tokens


def test_activation_histogram(one):
    for f in range(one.d_sae):
        values = np.array([v for _, _, v in one.fires(f)])
        found = one.of("activation_histogram")[f]
        if not len(values):
            assert found == []
            continue
        top, least = float(values.max()), float(values.min())
        edges = {
            "linear": [top * i / 50 for i in range(51)],
            "log": [least * (top / least) ** (i / 30) for i in range(31)],
        }
        for scale, expected in edges.items():
            rows, where = [row for row in found if row["scale"] == scale], (one.name, f, scale)
            assert [row["bin"] for row in rows] == list(range(len(expected) - 1)), where
            same([row["low"] for row in rows], expected[:-1], where, rtol=FEW)
            same([row["high"] for row in rows], expected[1:], where, rtol=FEW)
            for row in rows:
                low, high = np.float32(row["low"]), np.float32(row["high"])
                last = row["bin"] == len(rows) - 1
                inside = (values >= low) & ((values <= high) if last else (values < high))
                assert row["n"] == inside.sum(), (where, row)
            assert sum(row["n"] for row in rows) == len(values), where


def test_positions(one):
    for f in range(one.d_sae):
        strongest, found = one.strongest(f), one.of("positions")[f]
        top, every, total = Counter(p for _, p, _ in strongest[:2000]), Counter(), defaultdict(list)
        for _, p, v in strongest:
            every[p] += 1
            total[p].append(float(v))
        assert [row["position"] for row in found] == sorted(every), (one.name, f)
        for row in found:
            p = row["position"]
            assert (row["n_top"], row["n_active"]) == (top[p], every[p]), (one.name, f, p)
            same(row["sum_activation"], math.fsum(total[p]), (one.name, f, p), rtol=FEW)


@pytest.mark.parametrize("role", ["at", "next"])
def test_token_stats(one, role):
    tokens, later = one.built.tokens, int(role == "next")
    occurrences = Counter(tokens[:, 1 + later :].ravel().tolist())
    for f in range(one.d_sae):
        found = [row for row in one.of("token_stats")[f] if row["role"] == role]
        by_token = defaultdict(list)
        for b, p, v in one.fires(f):
            if p + later < CONTEXT:
                by_token[int(tokens[b, p + later])].append(v)
        firings = sum(map(len, by_token.values()))
        total = {t: np.float32(math.fsum(map(float, values))) for t, values in by_token.items()}
        ranked = sorted(total, key=lambda t: (-total[t], t))[:50]
        assert [row["token"] for row in found] == ranked, (one.name, f, role)
        for rank, row in enumerate(found):
            t, where = row["token"], (one.name, f, role, rank)
            assert (row["rank"], row["n_active"]) == (rank, len(by_token[t])), where
            same(row["sum_activation"], total[t], where)
            same(row["max_activation"], max(by_token[t]), where)
            shares = {"precision": len(by_token[t]) / firings, "recall": len(by_token[t]) / occurrences[t]}
            for name, share in shares.items():
                same(row[name], share, (*where, name), atol=5.01e-5)  # stored in 4 decimals


# ---------------------------------------------------------------- examples


def test_top_examples(one):
    for f in range(one.d_sae):
        best = {}
        for b, p, v in one.strongest(f):
            best.setdefault(b, (b, p, v))
        expected = list(best.values())[:20]
        found = [row for row in one.of("examples")[f] if row["example_group"] == "top"]
        places = [(row["block"], row["position"], row["activation"]) for row in found]
        assert places == expected, (one.name, f)
        assert [row["rank"] for row in found] == list(range(len(found)))


def test_drawn_examples(one):
    for f in range(one.d_sae):
        strongest = one.strongest(f)
        n = len(strongest)
        place = {(b, p): rank for rank, (b, p, _) in enumerate(strongest)}
        tenths = Counter((n - 1 - rank) * 10 // n for rank in place.values())
        groups = defaultdict(list)
        for row in one.of("examples")[f]:
            groups[row["example_group"]].append(row)
        for group in (*(f"q{g}" for g in range(10)), "random"):
            rows, where = groups[group], (one.name, f, group)
            size = n if group == "random" else tenths[int(group[1])]
            ranks = [place[row["block"], row["position"]] for row in rows]
            assert len(ranks) == len(set(ranks)) == min(5, size), where
            assert ranks == sorted(ranks), where
            assert [row["rank"] for row in rows] == list(range(len(rows))), where
            if group != "random":
                assert {(n - 1 - rank) * 10 // n for rank in ranks} <= {int(group[1])}, where


def test_near_misses(one):
    for f in range(one.d_sae):
        where = (one.name, f)
        pre = np.where(one.acts[..., f] > 0, -np.inf, one.pre[..., f])
        pre[:, 0] = -np.inf
        by_block = {b: pre[b].max() for b in range(len(pre)) if np.isfinite(pre[b].max())}
        found = [row for row in one.of("examples")[f] if row["example_group"] == "negative"]
        near = [(row["block"], row["near_miss"]) for row in found]
        same_ranking(near, by_block, 5, where, atol=3e-5)
        for rank, row in enumerate(found):
            same(row["near_miss"], pre[row["block"], row["position"]], (*where, rank), atol=3e-5)
            assert (row["rank"], row["activation"]) == (rank, 0), where


def test_the_rest_of_the_block_of_every_example(one):
    groups = {"top", "random", "negative", *(f"q{g}" for g in range(10))}
    for f, rows in one.of("examples").items():
        for row in rows:
            where, values = (one.name, f, row["example_group"], row["rank"]), one.acts[row["block"], :, f]
            assert row["example_group"] in groups
            assert row["active_positions"] == np.flatnonzero(values).tolist(), where
            np.testing.assert_allclose(
                row["active_values"], values[values > 0], rtol=0, atol=values.max(initial=0) / 4095
            )
            assert row["activation"] == values[row["position"]], where
            assert (row["near_miss"] is None) == (row["example_group"] != "negative"), where
            assert 1 <= row["position"] < CONTEXT


# ---------------------------------------------------------------- features that fire together


def test_coactivation(one):
    acts = one.acts[:COACTIVATION_BLOCKS, 1:].reshape(-1, one.d_sae).astype(np.float64)
    n_tokens, alone = len(acts), (acts > 0).sum(0)
    for f in range(one.d_sae):
        candidates = []
        for other in range(one.d_sae):
            both = int(((acts[:, f] > 0) & (acts[:, other] > 0)).sum())
            if other != f and both >= 2:
                candidates.append((both / (alone[f] + alone[other] - both), both, other))
        candidates.sort(key=lambda c: (-c[0], -c[1], c[2]))
        found = one.of("coactivation")[f]
        assert [row["other"] for row in found] == [other for *_, other in candidates[:10]], (one.name, f)
        for rank, (row, (jaccard, both, other)) in enumerate(zip(found, candidates, strict=False)):
            where = (one.name, f, rank)
            assert (row["rank"], row["n_both"], row["n_tokens"]) == (rank, both, n_tokens), where
            same(row["jaccard"], jaccard, where, rtol=FEW)
            same(row["pmi"], math.log(both * n_tokens / (alone[f] * alone[other])), where, atol=FEW)
            varies = acts[:, f].std() > 0 and acts[:, other].std() > 0
            pearson = np.corrcoef(acts[:, f], acts[:, other])[0, 1] if varies else None
            same(row["pearson"], pearson, where, atol=1e-5)
