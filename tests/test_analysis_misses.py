"""Near misses against a plain search, whatever the batches, shards and their order."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.analysis.misses import NearMisses, without_firing
from atlas.errors import StoreError

CONTEXT, D_SAE, N = 5, 4, 3


def made(seed: int, blocks: int) -> np.ndarray:
    """Pre-activations [blocks, positions, d_sae] with ties; -inf where a feature fires; one always does."""
    rng = np.random.default_rng(seed)
    pre = rng.integers(-4, 3, (blocks, CONTEXT - 1, D_SAE)).astype(np.float32)
    pre[rng.random(pre.shape) < 0.3] = -np.inf
    pre[..., 3] = -np.inf
    return pre


def by_search(pre: np.ndarray, feature: int) -> list[tuple[int, float]]:
    """The nearest misses: one per block, largest first, ties to the smaller token."""
    found = []
    for block in range(len(pre)):
        rows = [(float(v), p + 1) for p, v in enumerate(pre[block, :, feature]) if v > -np.inf]
        if rows:
            value, position = max(rows, key=lambda r: (r[0], -r[1]))
            found.append((block * CONTEXT + position, value))
    return sorted(found, key=lambda r: (-r[1], r[0]))[:N]


def rows_of(misses: NearMisses) -> list[list[tuple[int, float]]]:
    out: list[list[tuple[int, float]]] = [[] for _ in range(D_SAE)]
    for feature, token, value in zip(*(c.tolist() for c in misses.finish(range(D_SAE))), strict=True):
        out[feature].append((token, value))
    return out


def fed(pre: np.ndarray, first: int, size: int) -> NearMisses:
    found = NearMisses(D_SAE, CONTEXT, N)
    for start in range(0, len(pre), size):
        found.update(torch.from_numpy(pre[start : start + size]), first + start)
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(1, 9),
    st.lists(st.integers(1, 9), max_size=2),
    st.integers(1, 4),
    st.permutations(range(3)),
)
def test_any_cut_and_any_order_of_merging(seed, blocks, cuts, size, order):
    pre = made(seed, blocks)
    edges = [0, *sorted(min(c, blocks) for c in cuts), blocks]
    parts = [fed(pre[a:b], a, size) for a, b in pairwise(edges)]
    merged = NearMisses(D_SAE, CONTEXT, N)
    for i in order:
        if i < len(parts):
            merged = merged.merge(parts[i])
    assert rows_of(merged) == [by_search(pre, f) for f in range(D_SAE)]


@pytest.mark.parametrize("way", ["update", "_search"])
def test_either_way_and_blocks_in_any_order(way):
    """That of a CPU and that of a GPU; of equal values the smaller token is kept, whenever it comes."""
    pre = made(3, 12)
    found = NearMisses(D_SAE, CONTEXT, N)
    for block in (5, 0, 11, 3, 1, 2, 10, 9, 4, 6, 8, 7):
        getattr(found, way)(torch.from_numpy(pre[block : block + 1]), block)
    assert rows_of(found) == [by_search(pre, f) for f in range(D_SAE)]


def test_what_fires_is_left_out():
    pre = torch.arange(12.0).reshape(3, 4)
    expected, row, feature = pre.clone(), torch.tensor([0, 2, 2]), torch.tensor([1, 0, 3])
    expected[row, feature] = -torch.inf
    assert torch.equal(without_firing(pre, row, feature), expected)


def test_a_range_counts_from_its_first_feature():
    misses = fed(made(1, 6), 0, 2)
    part = misses.finish(range(1, 3))
    assert set(part.feature.tolist()) == {0, 1}
    assert part.token.tolist() == [t for rows in rows_of(misses)[1:3] for t, _ in rows]


def test_saving_loading_and_damage(tmp_path):
    misses, path = fed(made(2, 6), 0, 4), tmp_path / "m.npz"
    misses.save(path)
    assert rows_of(NearMisses.load(path)) == rows_of(misses)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"m\.npz"):
        NearMisses.load(path)
