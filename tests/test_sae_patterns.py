"""Pattern metrics against loops, partners, and the models whose patterns they can rebuild."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.configs import ModelConfig
from atlas.corpus.tokens import TokenStore
from atlas.lm.load import load_model
from atlas.progress import NullProgress
from atlas.sae import patterns
from atlas.sae.evaluate import evaluate
from atlas.sae.patterns import PatternSums, follows_scores, partners

from .tiny import CPU, D_HEAD, N_LAYERS, random_sae, random_tokens, rotary_folder, save_store, tiny_model


def row_softmax(scores):
    e = [math.exp(s - max(scores)) for s in scores]
    return [v / sum(e) for v in e]


def by_loops(q, k, q_hat, k_hat):
    """The three metrics in plain Python, one (query, source) after the other."""
    kl, same, a, b = [], [], [], []
    for block in range(len(q)):
        for i in range(q.shape[1]):
            true, hat = (
                [
                    sum(x * y for x, y in zip(qs[block, i], ks[block, j], strict=True))
                    / math.sqrt(q.shape[2])
                    for j in range(i + 1)
                ]
                for qs, ks in ((q, k), (q_hat, k_hat))
            )
            a += [s - sum(true) / len(true) for s in true]
            b += [s - sum(hat) / len(hat) for s in hat]
            if i:
                p, p_hat = row_softmax(true), row_softmax(hat)
                kl.append(sum(u * math.log(u / v) for u, v in zip(p, p_hat, strict=True)))
                same.append(true.index(max(true)) == hat.index(max(hat)))
    return sum(kl) / len(kl), sum(same) / len(same), np.corrcoef(a, b)[0, 1]


def random_sides(seed, blocks, positions=5, d_head=3):
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(2, blocks, positions, d_head))
    return [*true, *(true + 0.7 * rng.normal(size=true.shape))]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 1000), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.sampled_from([1, 60, 10**6])
)
def test_sums_against_loops_in_any_batches(seed, sizes, most):
    sides = random_sides(seed, sum(sizes))
    merged, start = PatternSums(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "_MOST_PAIRS", most)
        for size in sizes:
            part = PatternSums()
            part.update(*(torch.from_numpy(x[start : start + size]) for x in sides))
            merged, start = merged.merge(part), start + size
    found = merged.metrics()
    kl, same, correlation = by_loops(*sides)
    assert merged.n == sum(sizes) * 4
    assert found["pattern_kl"] == pytest.approx(kl, rel=1e-9, abs=1e-12)
    assert found["pattern_top1"] == pytest.approx(same)
    assert found["score_correlation"] == pytest.approx(correlation, abs=1e-9)


def test_a_perfect_rebuilding_and_one_that_adds_a_constant_per_query():
    """Softmax ignores what is added to all sources of a query, and so does the correlation."""
    q, k, _, _ = (torch.from_numpy(x) for x in random_sides(0, 2))
    perfect, shifted = PatternSums(), PatternSums()
    perfect.update(q, k, q, k)
    shifted.update(q, k, q, k + torch.tensor([3.0, -1.0, 2.0]))
    for sums in (perfect, shifted):
        m = sums.metrics()
        assert m["pattern_kl"] == pytest.approx(0, abs=1e-12)
        assert m["pattern_top1"] == 1
        assert m["score_correlation"] == pytest.approx(1, abs=1e-9)


def test_a_dead_rebuilding_looks_evenly_and_its_strongest_source_is_the_first():
    q, k, _, _ = (torch.from_numpy(x) for x in random_sides(1, 3))
    sums = PatternSums()
    sums.update(q, k, torch.zeros_like(q), k)
    m = sums.metrics()
    scores = patterns.scores(q, k)
    first = [int(scores[b, i, : i + 1].argmax()) == 0 for b in range(3) for i in range(1, 5)]
    assert m["pattern_top1"] == pytest.approx(np.mean(first))
    assert math.isnan(m["score_correlation"])
    entropies = [
        sum(p * math.log(p * (i + 1)) for p in row_softmax(scores[b, i, : i + 1].tolist()))
        for b in range(3)
        for i in range(1, 5)
    ]
    assert m["pattern_kl"] == pytest.approx(np.mean(entropies))


def test_strong_scores_stay_finite():
    q, k = torch.full((1, 4, 2), 300.0), torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(0))
    sums = PatternSums()
    sums.update(q, k, q, -k)
    assert math.isfinite(sums.metrics()["pattern_kl"])
    assert sums.metrics()["pattern_kl"] > 10


def test_nothing_gives_nan():
    assert all(math.isnan(value) for value in PatternSums().metrics().values())
    one = PatternSums()
    one.update(*(torch.ones(2, 1, 3) for _ in range(4)))
    assert math.isnan(one.metrics()["pattern_kl"]), "a single position has no query to judge"


# ---------------------------------------------------------------- partners


def side(name, **how):
    return random_sae(name, d_in=D_HEAD, **how)


def test_partners_are_the_same_sae_of_the_other_side():
    pair = [side("L00.H01.q"), side("L00.H01.k", seed=1)]
    others = [
        side("L00.H01.q", d_sae=24),
        side("L00.H02.k"),
        side("L01.H01.k", d_sae=24),
        side("L00.H01.v"),
        side("L00.H00.q", k=2),
    ]
    names = {sae.info.name for sae in others if sae.info.site.kind != "v"}
    found = partners([*others, *pair])
    assert found == dict.fromkeys(names) | {
        pair[0].info.name: pair[1].info.name,
        pair[1].info.name: pair[0].info.name,
    }


def test_a_name_alone_does_not_make_a_partner():
    q, k = side("L00.H01.q"), side("L00.H01.k", architecture="gated")
    named = replace(k, info=replace(k.info, name=q.info.name.replace(".q.", ".k.")))
    elsewhere = side("L01.H01.k")
    misplaced = replace(elsewhere, info=replace(elsewhere.info, name=named.info.name))
    assert partners([q, named])[q.info.name] is None
    assert partners([q, misplaced])[q.info.name] is None


def test_width_may_differ_where_the_names_agree():
    q, k = side("L00.H01.q"), side("L00.H01.k", d_sae=9)
    k = replace(k, info=replace(k.info, name=q.info.name.replace(".q.", ".k.")))
    assert partners([q, k]) == {q.info.name: k.info.name, k.info.name: q.info.name}


# ---------------------------------------------------------------- which models


@pytest.fixture(scope="module")
def rotary():
    return load_model(ModelConfig(str(rotary_folder())), CPU)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_learned_positions_are_rebuilt_and_rotary_ones_are_not(rotary, layer):
    tokens = torch.from_numpy(random_tokens(1, 12))
    assert follows_scores(tiny_model(), tokens, layer)
    assert follows_scores(tiny_model("folded"), tokens, layer)
    assert not follows_scores(rotary, tokens, layer)


def test_another_scale_is_noticed(monkeypatch):
    tokens = torch.from_numpy(random_tokens(1, 12))
    model = tiny_model()
    monkeypatch.setattr(model.bridge.blocks[1].attn.config, "scale_attn_by_inverse_layer_idx", True)
    assert follows_scores(model, tokens, 0)
    assert not follows_scores(model, tokens, 1)


def test_a_rotary_model_is_judged_without_patterns(rotary, tmp_path):
    store = TokenStore(save_store(tmp_path / "store", random_tokens(4, 9)))
    saes = [side("L01.H00.q"), side("L01.H00.k", seed=1)]
    rows = evaluate(rotary, saes, store, 4, NullProgress())
    assert len(rows) == 4
    for row in rows:
        assert not {"partner", "pattern_kl", "ce_pattern"} & set(row)
        assert all(math.isfinite(row[name]) for name in ("ce_spliced", "ce_zero", "ce_mean", "kl"))
    assert rows[0]["ce_mean"] != rows[0]["ce_zero"]
