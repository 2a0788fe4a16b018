"""Heads read through SAEs on their queries and keys: identities on a random model, edits by brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atlas.circuits.edits import ablate
from atlas.circuits.pairs.naming import Places, followers, places, subdiagonal
from atlas.circuits.pairs.pair import make_pair, run
from atlas.circuits.pairs.prompts import look
from atlas.circuits.pairs.repeats import (
    VARIANTS,
    Repeats,
    Target,
    blocks_with,
    copied_attention,
    edits_of,
    place_of,
    right_log_probs,
)
from atlas.circuits.pairs.rows import curve_rows, prompt_rows
from atlas.circuits.pairs.scan import N_PAIRS, scan, strongest_pairs
from atlas.circuits.splice import Splice
from atlas.configs import ModelConfig
from atlas.errors import ConfigError, SAEError
from atlas.lm.load import load_model
from atlas.progress import NullProgress

from .tiny import CPU, D_HEAD, D_VOCAB, N_CTX, random_sae, rotary_folder, tiny_model

LAYER, HEAD = 1, 2
HOW = ("none", "constant_norm_rescale", "layer_norm")
TOKENS = torch.tensor([[0, 5, 9, 14, 5, 9, 30, 5], [0, 7, 7, 8, 1, 2, 3, 4]])


def side(letter, d_sae=14, seed=0, **known):
    return random_sae(f"L{LAYER:02d}.H{HEAD:02d}.{letter}", d_in=D_HEAD, d_sae=d_sae, seed=seed, **known)


@pytest.fixture(scope="module")
def model():
    return tiny_model("raw")


@pytest.fixture(scope="module", params=HOW)
def pair(request):
    known = {"normalize_activations": request.param, "rescale_acts_by_decoder_norm": request.param == "none"}
    return make_pair(side("q", 14, 1, **known), side("k", 11, 2, **known))


def rebuilt_vectors(model, pair, edits=()):
    """q and k of the pair's head as the model used them, float64 [batch, pos, d_head]."""
    seen = {}

    def keep_as(name):
        def keep(value, hook):
            seen[name] = value[:, :, HEAD].double()

        return keep

    hooks = [(f"blocks.{LAYER}.attn.hook_{name}", keep_as(name)) for name in "qk"]
    with Splice(model, pair, edits, error=False):
        model.bridge.run_with_hooks(TOKENS, return_type=None, fwd_hooks=hooks)
    return seen["q"], seen["k"]


def test_the_pattern_is_that_of_the_rebuilt_vectors_and_other_heads_keep_theirs(model, pair):
    found = run(model, TOKENS, pair)
    q, k = rebuilt_vectors(model, pair)
    scores = q @ k.transpose(1, 2) / math.sqrt(D_HEAD)
    hidden = torch.ones(8, 8, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(hidden, -math.inf).softmax(-1)
    torch.testing.assert_close(found.pattern.double(), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found.pattern, run(model, TOKENS, pair, rebuilt=False).pattern, atol=1e-3)


def test_with_error_terms_and_no_edit_nothing_changes(model, pair):
    plain, spliced = run(model, TOKENS, pair, rebuilt=False), run(model, TOKENS, pair, error=True)
    assert torch.equal(plain.logits, spliced.logits)
    assert torch.equal(plain.pattern, spliced.pattern)


@pytest.mark.parametrize(("row", "query", "source"), [(0, 7, 2), (1, 5, 5), (0, 3, 0)])
def test_a_score_splits_into_its_features(model, pair, row, query, source):
    found = scan(pair, run(model, TOKENS, pair), query, source, row)
    q, k = rebuilt_vectors(model, pair)
    assert found.score == pytest.approx(float(q[row, query] @ k[row, source]) / math.sqrt(D_HEAD), abs=1e-5)
    root = math.sqrt(D_HEAD)
    biases = found.q.rest @ found.k.rest + (found.q.added @ found.k.rest).sum()
    biases = (biases + (found.k.added @ found.q.rest).sum()) / root
    assert found.score == pytest.approx(float(biases + found.weighted.sum()), abs=1e-9)


@pytest.mark.parametrize("letter", ["q", "k"])
def test_without_a_feature_as_if_it_were_ablated_in_the_model(model, pair, letter):
    row, query, source = 0, 7, 2
    found = scan(pair, run(model, TOKENS, pair), query, source, row)
    of, without = (found.q, found.without_q) if letter == "q" else (found.k, found.without_k)
    sae, place = (pair.q, query) if letter == "q" else (pair.k, source)
    assert len(of.feature) > 1
    for feature, score in zip(of.feature.tolist(), without.tolist(), strict=True):
        q, k = rebuilt_vectors(model, pair, [ablate(sae.info.name, feature, place)])
        assert score == pytest.approx(float(q[row, query] @ k[row, source]) / math.sqrt(D_HEAD), abs=1e-5)


def test_pairs_of_features_come_strongest_first(model, pair):
    found = scan(pair, run(model, TOKENS, pair), 7, 2)
    chosen = strongest_pairs(found)
    values = [float(found.weighted[i, j]) for i, j in chosen]
    everything = sorted(found.weighted.flatten().tolist(), reverse=True)
    assert values == everything[:N_PAIRS]
    i, j = chosen[0]
    rows = (pair.q.decoder_directions[found.q.feature[i]], pair.k.decoder_directions[found.k.feature[j]])
    expected = sum(float(a) * float(b) for a, b in zip(*(r.double() for r in rows), strict=True))
    assert float(found.products[i, j]) == pytest.approx(expected, abs=1e-9)


def test_only_the_two_sides_of_one_head_make_a_pair():
    with pytest.raises(SAEError, match=r"L01.H02.k and L01.H02.q; they must be on the q and the k"):
        make_pair(side("k"), side("q"))


def test_right_log_probs_against_loops():
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 3, 5, 1], [0, 2, 2, 4]])
    found = right_log_probs(logits, tokens)
    assert found[:, 0].isnan().all()
    for b in range(2):
        for t in range(1, 4):
            row = [math.exp(v) for v in logits[b, t - 1].double().tolist()]
            expected = math.log(row[tokens[b, t]] / sum(row))
            assert float(found[b, t]) == pytest.approx(expected, abs=1e-12)


def test_copied_attention_is_that_to_the_token_that_comes_next():
    half = 4
    tokens = blocks_with(3, 2, half, 12, bos=0, seed=5)
    pattern = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(1))
    found = copied_attention(pattern, half)
    for t in range(9):
        if t < half + 2:
            assert found[:, t].isnan().all()
            continue
        source = t - half
        assert torch.equal(tokens[:, source], tokens[:, t])
        assert torch.equal(tokens[:, source - 1], tokens[:, t - 1])
        assert torch.equal(found[:, t], pattern[:, t - 1, source].double())


@given(half=st.integers(4, 12), seed=st.integers(0, 99), token=st.integers(1, D_VOCAB - 1))
def test_blocks_hold_the_token_at_its_two_places_alone(half, seed, token):
    blocks = blocks_with(token, 3, half, D_VOCAB, bos=0, seed=seed)
    assert torch.equal(blocks[:, 1 : half + 1], blocks[:, half + 1 :])
    at = (blocks == token).nonzero()[:, 1].reshape(3, 2)
    assert at.tolist() == [[place_of(half), place_of(half) + half]] * 3


def test_variants_change_the_keys_that_they_say(model, pair):
    """The keys' features in the pass, place by place, against what each variant is said to take out."""
    half, factor = 8, 3.0
    tokens = blocks_with(6, 2, half, D_VOCAB, bos=0, seed=1)
    plain = run(model, tokens, pair).splice.acts[pair.k.info.name]
    feature = int((plain[:, 1 : half + 1] > 0).sum((0, 1)).argmax())
    target, after = Target(feature, 6), place_of(half) + 1
    expected = {"ablated": plain.clone(), "only": plain.clone()}
    expected["ablated"][:, 1 : half + 1, feature] = 0
    others = [f for f in range(pair.k.d_sae) if f != feature]
    expected["only"][:, after, others] = 0
    expected["scaled"] = expected["only"].clone()
    expected["scaled"][:, after, feature] *= factor
    expected["subtracted"] = expected["ablated"]
    assert set(expected) == set(VARIANTS) - {"original", "rebuilt"}
    for variant, acts in expected.items():
        edits = edits_of(variant, pair, target, half, factor)
        seen = run(model, tokens, pair, edits, error=variant == "subtracted")
        torch.testing.assert_close(seen.splice.acts[pair.k.info.name], acts)
        assert torch.equal(
            seen.splice.acts[pair.q.info.name], run(model, tokens, pair).splice.acts[pair.q.info.name]
        )


def test_curves_are_means_over_blocks_however_they_are_batched(model, pair, monkeypatch):
    def curves(most):
        monkeypatch.setattr("atlas.circuits.pairs.repeats._MOST_LOGITS", most)
        work = Repeats(model, pair, bos=0, n=3, half=50, seed=4)
        assert work.half == (N_CTX - 1) // 2
        return work, work.curves([Target(2, 9)], 5.0, NullProgress())

    (work, whole), (_, single) = curves(2**23), curves(1)
    assert set(whole) == {(-1, "original"), (-1, "rebuilt"), *((0, variant) for variant in VARIANTS)}
    for key, curve in whole.items():
        torch.testing.assert_close(curve.log_prob, single[key].log_prob, equal_nan=True, atol=1e-5, rtol=0)
        assert curve.n == 3
    tokens = work.blocks(None)
    logits = model.bridge(tokens, return_type="logits").double().log_softmax(-1)
    t = 2 * work.half
    each = [float(logits[b, t - 1, tokens[b, t]]) for b in range(3)]
    assert float(whole[-1, "original"].log_prob[t]) == pytest.approx(np.mean(each), abs=1e-5)
    assert float(whole[-1, "original"].probability[t]) == pytest.approx(np.mean(np.exp(each)), abs=1e-6)
    rows = curve_rows(pair, whole)
    assert len(rows) == 8 * t
    assert {row["position"] for row in rows if row["attention"] is None} == set(range(1, work.half + 2))


def test_a_prompt_follows_what_the_head_copies(model, pair):
    tokens = [0, 5, 9, 14, 5]
    found = look(model, pair, tokens)
    pattern = run(model, torch.tensor([tokens]), pair, rebuilt=False).pattern[0]
    source = 1 + int(pattern[4, 1:].argmax())
    assert (found.query, found.source) == (4, source)
    logits = model.bridge(torch.tensor([tokens]), return_type="logits")[0, 4]
    assert found.target == (9 if source == 2 else int(logits.argmax()))
    expected = float(logits.double().log_softmax(-1)[found.target])
    assert found.outcomes["original"].log_prob == pytest.approx(expected, abs=1e-6)
    assert found.outcomes["original"].attention == pytest.approx(float(pattern[4, source]), abs=1e-6)
    feature = found.k_feature
    assert feature == int(found.scan.k.feature[found.scan.without_k.argmin()])
    name = pair.k.info.name
    without = run(model, torch.tensor([tokens]), pair, [ablate(name, feature, source)])
    assert found.outcomes["without"].attention == pytest.approx(
        float(without.pattern[0, 4, source]), abs=1e-6
    )
    others = [f for f in range(pair.k.d_sae) if f != feature]
    only = run(model, torch.tensor([tokens]), pair, [ablate(name, others, source)])
    assert found.outcomes["only"].attention == pytest.approx(float(only.pattern[0, 4, source]), abs=1e-6)


def test_rows_of_a_prompt_agree_with_each_other(model, pair):
    rows = prompt_rows(pair, 0, "some text", look(model, pair, [0, 5, 9, 14, 5, 9]))
    (prompt,) = rows["qk_prompts"]
    pattern = np.array(prompt["rebuilt"]).reshape(6, 6)
    np.testing.assert_allclose(pattern.sum(1), 1, atol=1e-5)
    attention = {row["variant"]: row["attention"] for row in rows["qk_outcomes"]}
    assert attention["rebuilt"] == pytest.approx(pattern[5, prompt["source"]], abs=1e-6)
    assert set(attention) == {"original", "rebuilt", "without", "only"}
    changes = {row["feature"]: row["change"] for row in rows["qk_scans"] if row["side"] == "k"}
    assert min(changes, key=changes.get) == prompt["k_feature"]


@pytest.mark.parametrize("n", [2, N_CTX + 1])
def test_a_prompt_of_the_wrong_length_is_refused(model, pair, n):
    with pytest.raises(ConfigError, match=f"a prompt of {n} tokens with BOS is not allowed"):
        look(model, pair, [0] * n)


def test_scores_of_a_rotary_model_do_not_split_but_its_patterns_are_there():
    rotary = load_model(ModelConfig(str(rotary_folder())), CPU)
    pair = make_pair(side("q", model=rotary.name), side("k", model=rotary.name))
    found = look(rotary, pair, [0, 5, 9, 14, 5])
    assert found.scan is None
    assert found.metrics == {}
    assert set(found.outcomes) == {"original", "rebuilt", "without", "only"}
    rows = prompt_rows(pair, 0, "x", found)
    assert rows["qk_scans"] == rows["qk_feature_pairs"] == []


def columns(n, **given):
    names = ("n_active", "top_position", "top_position_share", "top_token", "top_token_share",
             "top_previous_token", "top_previous_share")  # fmt: skip
    return {name: np.asarray(given.get(name, np.zeros(n))) for name in names}


@given(st.data())
def test_followers_against_a_plain_search(data):
    n = data.draw(st.integers(0, 12))
    shares = st.sampled_from([0.1, 0.5, 0.6, 0.9])
    k = columns(
        n,
        n_active=np.array(data.draw(st.lists(st.sampled_from([3, 10, 40]), min_size=n, max_size=n)), int),
        top_previous_token=np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), int),
        **{
            name: np.array(data.draw(st.lists(shares, min_size=n, max_size=n)), float)
            for name in ("top_previous_share", "top_token_share", "top_position_share")
        },
    )
    asked = data.draw(st.integers(0, 3))
    able = [
        f for f in range(n)
        if k["top_previous_share"][f] >= 0.5 and k["n_active"][f] >= 10 and k["top_previous_token"][f] != 0
        and k["top_token_share"][f] < 0.5 and k["top_position_share"][f] < 0.5
    ]  # fmt: skip
    able.sort(key=lambda f: (-k["top_previous_share"][f], -k["n_active"][f], f))
    expected: list[int] = []
    for f in able:
        if k["top_previous_token"][f] not in [k["top_previous_token"][g] for g in expected]:
            expected.append(f)
    assert [one.feature for one in followers(k, asked, bos=0)] == expected[:asked]


@given(st.data())
def test_subdiagonal_against_loops(data):
    def draw():
        n = data.draw(st.integers(0, 5))
        position = sorted(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)))
        return Places(np.arange(n), np.array(position, int))

    q, k = draw(), draw()
    values = data.draw(st.lists(st.integers(-9, 9), min_size=len(q.position) * len(k.position), max_size=25))
    table = np.array(values[: len(q.position) * len(k.position)], np.float32)
    table = table.reshape(len(q.position), len(k.position))
    found = subdiagonal(table, q, k)
    on, off, right, able = [], [], 0, 0
    for i, p in enumerate(q.position.tolist()):
        for j, r in enumerate(k.position.tolist()):
            (on if r == p - 1 else off).append(float(table[i, j]))
        if p - 1 in k.position:
            able += 1
            right += k.position[int(np.argmax(table[i]))] == p - 1
    assert found.n == (able if len(k.position) else 0)
    same = (found.share, right / able if able else math.nan), (found.on, np.mean(on) if on else math.nan), (
        found.off, np.mean(off) if off else math.nan)  # fmt: skip
    for got, expected in same:
        assert got == pytest.approx(expected, nan_ok=True)


def test_positional_features_and_the_positions_that_they_cover():
    k = columns(
        5, n_active=[50, 50, 5, 50, 9000], top_position=[7, 3, 1, 3, 3],
        top_position_share=[0.95, 0.9, 1, 0.8, 0.24],
    )  # fmt: skip
    found = places(k, n_blocks=4096)
    assert found.positional.tolist() == [1, 0]
    assert found.position.tolist() == [3, 7]
    assert found.covered == 2
    # Of 512 blocks at most 512 of the 2000 strongest tokens can be at one position: 0.256 of them.
    assert places(k, n_blocks=512).positional.tolist() == [1, 4, 0]
