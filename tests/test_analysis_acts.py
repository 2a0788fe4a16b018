"""Activations of a text: any cut and any order of its parts gives the same arrays, and damage is named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.analysis.acts import FeatureActs, StoredActs, first_of_runs, rank_in_runs, sorted_within
from atlas.errors import StoreError

CONTEXT, D_SAE = 5, 4
# Few distinct values, so that ties are common.
VALUES = st.sampled_from([2.0**-126, 0.1, 0.25, 1.0, 1.5, 3e38])


@st.composite
def cut_texts(draw):
    """Activations {(feature, token): value}, in a drawn order, cut into a drawn number of parts."""
    cells = draw(
        st.dictionaries(st.tuples(st.integers(0, D_SAE - 1), st.integers(0, 29)), VALUES, max_size=40)
    )
    rows = draw(st.permutations([(f, t, v) for (f, t), v in cells.items()]))
    parts: list[list] = [[] for _ in range(draw(st.integers(1, 4)))]
    for row in rows:
        parts[draw(st.integers(0, len(parts) - 1))].append(row)
    return cells, parts


def triples(rows):
    return tuple([row[i] for row in rows] for i in range(3))


def same(a: FeatureActs, b: FeatureActs) -> bool:
    pairs = [(a.starts, b.starts), (a.token, b.token), (a.value, b.value)]
    return a.context == b.context and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


@settings(max_examples=60, deadline=None)
@given(cut_texts())
def test_any_cut_and_order_gives_the_sorted_activations(text):
    cells, parts = text
    collected = FeatureActs.collect([triples(rows) for rows in parts], D_SAE, CONTEXT)
    expected = sorted(cells.items())
    assert list(zip(collected.feature.tolist(), collected.token.tolist(), strict=True)) == [
        k for k, _ in expected
    ]
    assert collected.value.tolist() == [np.float32(v) for _, v in expected]
    assert collected.counts.tolist() == [sum(f == n for f, _ in cells) for n in range(D_SAE)]
    assert collected.block.tolist() == [t // CONTEXT for (_, t), _ in expected]
    assert collected.position.tolist() == [t % CONTEXT for (_, t), _ in expected]

    shards = [FeatureActs.collect([triples(rows)], D_SAE, CONTEXT) for rows in parts]
    assert same(FeatureActs.merge(shards), collected)
    assert same(FeatureActs.merge(shards[::-1]), collected)
    grouped = [FeatureActs.merge(shards[:2]), *shards[2:]]
    assert same(FeatureActs.merge(grouped), collected)


@settings(max_examples=60, deadline=None)
@given(cut_texts())
def test_strongest_first_sorts_by_value_then_token(text):
    _, parts = text
    acts = FeatureActs.collect([triples(rows) for rows in parts], D_SAE, CONTEXT)
    order = sorted(
        range(len(acts.token)), key=lambda i: (acts.feature[i], -float(acts.value[i]), acts.token[i])
    )
    assert acts.strongest_first.tolist() == order
    seen: dict[int, int] = {}
    for place, i in enumerate(order):
        rank = seen.get(int(acts.feature[i]), 0)
        assert acts.rank[place] == rank
        seen[int(acts.feature[i])] = rank + 1


def test_no_activation_at_all():
    acts = FeatureActs.collect([], 3, CONTEXT)
    assert acts.d_sae == 3
    assert acts.starts.tolist() == [0, 0, 0, 0]
    assert acts.strongest_first.tolist() == acts.rank.tolist() == acts.token.tolist() == []
    assert same(FeatureActs.merge([acts, acts]), acts)


def test_a_large_text_does_not_overflow():
    """Feature times tokens is beyond 32 bits in a real build."""
    parts = [([50_000, 7], [900_000, 2_000_000], [1.0, 2.0]), ([50_000], [3], [4.0])]
    acts = FeatureActs.collect(parts, 50_001, 128)
    assert acts.token.tolist() == [2_000_000, 3, 900_000]
    assert acts.feature.tolist() == [7, 50_000, 50_000]


def test_parts_of_different_shape_are_refused():
    a, b = FeatureActs.collect([], 3, 5), FeatureActs.collect([], 4, 5)
    with pytest.raises(StoreError):
        FeatureActs.merge([a, b])
    with pytest.raises(StoreError):
        FeatureActs.merge([])


@settings(max_examples=20, deadline=None)
@given(cut_texts())
def test_saving_and_loading_changes_nothing(tmp_path_factory, text):
    acts = FeatureActs.collect([triples(rows) for rows in text[1]], D_SAE, CONTEXT)
    path = tmp_path_factory.mktemp("acts") / "acts"
    acts.save(path)
    assert same(FeatureActs.load(path), acts)


@settings(max_examples=40, deadline=None)
@given(cut_texts(), st.randoms(use_true_random=False), st.integers(1, 12))
def test_shards_on_disk_are_the_whole_text(tmp_path_factory, text, random, at_once):
    """Runs of blocks saved one by one, opened in any order and read in ranges of features."""
    rows = sorted((row for part in text[1] for row in part), key=lambda r: r[1])
    whole = FeatureActs.collect([triples(rows)], D_SAE, CONTEXT)
    edges = sorted(random.sample(range(1, 12), 2))
    folder, folders = tmp_path_factory.mktemp("shards"), []
    for n, (low, high) in enumerate(zip([0, *edges], [*edges, 10**9], strict=True)):
        inside = [row for row in rows if low * CONTEXT <= row[1] < high * CONTEXT]
        FeatureActs.collect([triples(inside)], D_SAE, CONTEXT).save(folder / str(n))
        folders.append(folder / str(n))
    random.shuffle(folders)
    stored = StoredActs(folders)
    ranges = list(stored.ranges(at_once))
    assert [f for r in ranges for f in r] == list(range(D_SAE))
    assert all(len(r) == 1 or stored.counts[r.start : r.stop].sum() <= at_once for r in ranges)
    parts = [stored.read(r) for r in ranges]
    assert [part.first for part in parts] == [r.start for r in ranges]
    assert np.array_equal(np.concatenate([part.token for part in parts]), whole.token)
    assert np.array_equal(np.concatenate([part.value for part in parts]), whole.value)
    assert np.array_equal(np.concatenate([part.counts for part in parts]), whole.counts)
    early = stored.read(range(D_SAE), before=3 * CONTEXT)
    assert early.token.tolist() == [t for t in whole.token.tolist() if t < 3 * CONTEXT]


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "acts"
    FeatureActs.collect([([0, 1, 3], [5, 6, 11], [1.0, 2.0, 3.0])], D_SAE, CONTEXT).save(path)
    return path


@pytest.mark.parametrize("name", ["starts.npy", "token.npy", "value.npy", "checksums.npz"])
@pytest.mark.parametrize("keep", [0, 1, 30, -1, -3])
def test_a_truncated_file_is_a_store_error(saved, name, keep):
    (saved / name).write_bytes((saved / name).read_bytes()[:keep])
    with pytest.raises(StoreError, match="acts") as caught:
        FeatureActs.load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["starts.npy", "token.npy", "value.npy", "checksums.npz"])
@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"PK\x03\x04garbage", b"\x93NUMPY\x01\x00", b"\x80\x04."]
)
def test_garbage_is_a_store_error(saved, name, content):
    (saved / name).write_bytes(content)
    with pytest.raises(StoreError):
        FeatureActs.load(saved)


@pytest.mark.parametrize("name", ["starts.npy", "token.npy", "value.npy"])
def test_a_flipped_bit_is_a_store_error(saved, name):
    data = bytearray((saved / name).read_bytes())
    data[-2] ^= 1
    (saved / name).write_bytes(bytes(data))
    with pytest.raises(StoreError, match="checksum"):
        FeatureActs.load(saved)


@pytest.mark.parametrize("name", ["starts.npy", "token.npy", "value.npy", "checksums.npz"])
def test_a_missing_file_is_a_store_error(saved, name):
    (saved / name).unlink()
    with pytest.raises(StoreError):
        FeatureActs.load(saved)


GROUPED = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=30)


@given(GROUPED, st.booleans())
def test_sorted_within_groups(pairs, wide):
    """Packed into 64 bits or not, the order is that of (group, key, index)."""
    group, key = (np.array([p[i] for p in pairs], np.int64) for i in range(2))
    found = sorted_within(group, key, 4, 63 if wide else 4)
    assert found.tolist() == sorted(range(len(pairs)), key=lambda i: (*pairs[i], i))


@given(st.lists(st.integers(0, 5), max_size=20).map(sorted))
def test_runs(keys):
    array = np.array(keys, dtype=np.int64)
    assert first_of_runs(array).tolist() == [i for i, k in enumerate(keys) if k not in keys[:i]]
    assert rank_in_runs(array).tolist() == [keys[:i].count(k) for i, k in enumerate(keys)]
