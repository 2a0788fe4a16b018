"""Head scores against plain loops over blocks, destinations and sources."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.errors import ConfigError
from atlas.heads.scores import (
    HeadScores,
    PooledScore,
    after_earlier_copies,
    duplicate_token_score,
    earlier_copies,
    induction_score,
    masked_score,
    previous_token_score,
)
from atlas.lm.repeats import random_repeats


def causal_pattern(batch: int, heads: int, positions: int, seed: int = 0) -> torch.Tensor:
    """Random attention: rows that sum to 1 and see no later position."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(batch, heads, positions, positions, generator=generator)
    ahead = torch.ones(positions, positions).triu(1).bool()
    return scores.masked_fill(ahead, -math.inf).softmax(-1)


def brute(pattern: torch.Tensor, sources) -> tuple[list[float], int]:
    """sources(block, destination) -> set of sources; sums per head and the number of destinations."""
    batch, heads, positions, _ = pattern.shape
    sums, n = [0.0] * heads, 0
    for b in range(batch):
        for i in range(positions):
            wanted = sources(b, i)
            n += bool(wanted)
            for h in range(heads):
                sums[h] += sum(float(pattern[b, h, i, j]) for j in wanted)
    return sums, n


def assert_equal(score: PooledScore, expected: tuple[list[float], int]):
    assert score.n == expected[1]
    torch.testing.assert_close(
        score.sum, torch.tensor(expected[0], dtype=torch.float64), rtol=1e-6, atol=1e-6
    )
    assert ((score.mean() >= 0) & (score.mean() <= 1 + 1e-6)).all() or score.n == 0


sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.integers(0, 1000))


@settings(max_examples=25, deadline=None)
@given(sizes)
def test_previous_token_score(size: tuple[int, int, int, int]):
    batch, heads, positions, seed = size
    pattern = causal_pattern(batch, heads, positions, seed)
    assert_equal(previous_token_score(pattern), brute(pattern, lambda b, i: {i - 1} if i >= 1 else set()))


@settings(max_examples=25, deadline=None)
@given(sizes)
def test_scores_on_repeats(size: tuple[int, int, int, int]):
    batch, heads, length, seed = size
    pattern = causal_pattern(batch, heads, 2 * length + 1, seed)

    def second(i: int) -> bool:
        return length + 1 <= i <= 2 * length

    duplicate = brute(pattern, lambda b, i: {i - length} if second(i) else set())
    induction = brute(pattern, lambda b, i: {i - length + 1} if second(i) else set())
    assert_equal(duplicate_token_score(pattern, length), duplicate)
    assert_equal(induction_score(pattern, length), induction)
    assert induction[1] == batch * length


@settings(max_examples=25, deadline=None)
@given(sizes)
def test_scores_on_text_with_repeated_tokens(size: tuple[int, int, int, int]):
    batch, heads, positions, seed = size
    pattern = causal_pattern(batch, heads, positions, seed)
    tokens = torch.randint(0, 3, (batch, positions), generator=torch.Generator().manual_seed(seed))

    def copies(b: int, i: int) -> set[int]:
        return {j for j in range(i) if tokens[b, j] == tokens[b, i]}

    assert_equal(masked_score(pattern, earlier_copies(tokens)), brute(pattern, copies))
    following = brute(pattern, lambda b, i: {j + 1 for j in copies(b, i) if j + 1 != i})
    assert_equal(masked_score(pattern, after_earlier_copies(tokens)), following)


def test_both_definitions_agree_on_distinct_tokens():
    length, batch = 7, 4
    order = torch.stack(
        [torch.randperm(50, generator=torch.Generator().manual_seed(i))[:length] + 1 for i in range(batch)]
    )
    tokens = torch.cat([torch.zeros(batch, 1, dtype=torch.long), order, order], 1)
    pattern = causal_pattern(batch, 3, 2 * length + 1)
    by_offset, by_token = (
        duplicate_token_score(pattern, length),
        masked_score(pattern, earlier_copies(tokens)),
    )
    assert by_offset.n == by_token.n
    torch.testing.assert_close(by_offset.sum, by_token.sum)
    by_offset, by_token = (
        induction_score(pattern, length),
        masked_score(pattern, after_earlier_copies(tokens)),
    )
    assert by_offset.n == by_token.n
    torch.testing.assert_close(by_offset.sum, by_token.sum)


@pytest.mark.parametrize("length", [2, 5, 20])
def test_perfect_heads_score_one(length: int):
    """A head that does exactly what the name says scores 1, and 0 on the other names."""
    positions = 2 * length + 1
    pattern = torch.zeros(2, 3, positions, positions)
    for head, back in enumerate((1, length, length - 1)):
        for i in range(positions):
            pattern[:, head, i, max(0, i - back)] = 1
    assert previous_token_score(pattern).mean()[0] == 1
    assert duplicate_token_score(pattern, length).mean().tolist()[1] == 1
    assert induction_score(pattern, length).mean().tolist()[2] == 1
    if length > 2:
        assert previous_token_score(pattern).mean()[1:].max() < 0.6
        assert induction_score(pattern, length).mean().tolist() == [0, 0, 1]


def test_uniform_attention_by_hand():
    """Row i spreads 1/(i+1) over its sources: the mean over i = 1..3 is (1/2 + 1/3 + 1/4) / 3."""
    pattern = torch.ones(1, 1, 4, 4).tril() / torch.arange(1, 5)[:, None]
    assert previous_token_score(pattern).mean().item() == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)


# ---------------------------------------------------------------- random repeats


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(5, 40), st.integers(0, 2**31))
def test_random_repeats(blocks: int, length: int, d_vocab: int, seed: int):
    tokens = random_repeats(blocks, length, d_vocab, bos=2, seed=seed, exclude=[0, 1])
    assert tokens.shape == (blocks, 2 * length + 1)
    assert (tokens[:, 0] == 2).all()
    assert torch.equal(tokens[:, 1 : length + 1], tokens[:, length + 1 :])
    assert 3 <= int(tokens[:, 1:].min()) <= int(tokens[:, 1:].max()) < d_vocab
    assert torch.equal(tokens, random_repeats(blocks, length, d_vocab, bos=2, seed=seed, exclude=[0, 1]))


def test_another_seed_gives_other_tokens_and_all_are_drawn():
    first = random_repeats(8, 50, 12, bos=0, seed=1, exclude=[11])
    assert not torch.equal(first, random_repeats(8, 50, 12, bos=0, seed=2, exclude=[11]))
    assert set(first[:, 1:].flatten().tolist()) == set(range(1, 11))


@pytest.mark.parametrize(("blocks", "length", "d_vocab"), [(0, 5, 10), (1, 1, 10), (1, 5, 1)])
def test_impossible_repeats_are_refused(blocks: int, length: int, d_vocab: int):
    with pytest.raises(ConfigError, match="allowed: at least 1 block, 2 tokens"):
        random_repeats(blocks, length, d_vocab, bos=0, seed=0)


# ---------------------------------------------------------------- the accumulator


def filled(blocks: slice) -> HeadScores:
    scores = HeadScores(2, 3)
    tokens = torch.randint(0, 4, (6, 9), generator=torch.Generator().manual_seed(1))[blocks]
    for layer in range(2):
        pattern = causal_pattern(6, 3, 9, seed=layer)[blocks]
        scores.update_text(layer, pattern, tokens)
        scores.update_repeats(layer, pattern, 4)
    return scores


def test_parts_merge_to_the_whole():
    whole, merged = filled(slice(0, 6)), filled(slice(0, 2)).merge(filled(slice(2, 6)))
    assert [row[:3] + row[4:] for row in merged.finish()] == [row[:3] + row[4:] for row in whole.finish()]
    for name in whole.sums:
        torch.testing.assert_close(merged.table(name), whole.table(name))


def test_merging_leaves_the_parts_alone_and_nothing_is_neutral():
    part = filled(slice(0, 2))
    before = part.finish()
    assert HeadScores(2, 3).merge(part).finish() == before
    assert part.merge(filled(slice(2, 6))).finish() != before
    assert part.finish() == before


def test_rows_say_what_was_counted():
    rows = filled(slice(0, 6)).finish()
    assert len(rows) == 5 * 2 * 3
    by_key = {(row.score, row.layer, row.head): row for row in rows}
    previous = by_key["previous_token", 1, 2]
    assert previous.n == 6 * 8
    assert previous.how == "text"
    expected = previous_token_score(causal_pattern(6, 3, 9, seed=1)).mean()[2]
    assert previous.value == pytest.approx(float(expected))
    assert by_key["induction", 0, 0].n == 6 * 4
    assert by_key["induction", 0, 0].how == "random repeats"


def test_without_tokens_only_the_previous_token_is_scored():
    scores = HeadScores(2, 1)
    scores.update_text(0, causal_pattern(1, 1, 4))
    assert {(row.score, row.layer) for row in scores.finish()} == {("previous_token", 0)}
    assert scores.table("previous_token")[1].isnan().all()


def test_half_precision_patterns_are_summed_in_double():
    pattern = causal_pattern(2, 2, 8).half()
    score = previous_token_score(pattern)
    assert score.sum.dtype == torch.float64


def test_what_does_not_fit_is_refused():
    scores = HeadScores(1, 2)
    with pytest.raises(ConfigError, match="layer 1 is not known; allowed: 0"):
        scores.update_text(1, causal_pattern(1, 2, 4))
    with pytest.raises(ConfigError, match="3 heads; allowed: 2"):
        scores.update_text(0, causal_pattern(1, 3, 4))
    with pytest.raises(ConfigError, match="allowed: at least 2, and BOS plus twice"):
        scores.update_repeats(0, causal_pattern(1, 2, 8), 4)
    with pytest.raises(ConfigError, match="as many queries as keys"):
        previous_token_score(torch.zeros(1, 1, 3, 4))
    with pytest.raises(ConfigError, match="cannot be merged; allowed: 1 x 2"):
        scores.merge(HeadScores(2, 2))
    with pytest.raises(ConfigError, match="head score 'copying' is not known"):
        scores.table("copying")
    assert PooledScore(torch.zeros(2), 0).mean().isnan().all()
