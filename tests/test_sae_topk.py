"""Selection of the largest entries against a stable sort, with ties, infinities and NaN."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from atlas.errors import SAEError
from atlas.kernels.largest import GROUP
from atlas.sae import topk
from atlas.sae.topk import top_k, top_of_batch

FEW_VALUES = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 0.5, 2.0, np.inf])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def stable(values, n):
    """The places of the n largest by a stable sort; NaN counts as infinity."""
    order = sorted(range(len(values)), key=lambda i: -np.inf if np.isnan(values[i]) else -values[i])
    return sorted(order[:n])


def check_rows(x, k):
    values, index = top_k(x, k)
    assert values.dtype == x.dtype
    for row, chosen, kept in zip(x, index, values, strict=True):
        expected = stable(row.tolist(), k)
        assert chosen.tolist() == expected, "ties go to the lower index, in index order"
        np.testing.assert_array_equal(kept.tolist(), row[expected].tolist())


def check_batch(x, n):
    row, column, value = top_of_batch(x, n)
    flat = x.reshape(-1)
    expected = stable(flat.tolist(), n)
    assert (row * x.shape[1] + column).tolist() == expected
    assert ((column >= 0) & (column < x.shape[1])).all()
    np.testing.assert_array_equal(value.tolist(), flat[expected].tolist())


@st.composite
def matrices(draw, elements, most_rows=4, most_width=3 * GROUP):
    shape = draw(st.integers(1, most_rows)), draw(st.integers(1, most_width))
    x = draw(arrays.arrays(np.float64, shape, elements=elements, fill=elements))
    return torch.from_numpy(x).to(draw(DTYPES))


@settings(max_examples=150, deadline=None)
@given(matrices(FEW_VALUES), st.data())
def test_top_k_is_a_stable_sort(x, data):
    check_rows(x, data.draw(st.integers(1, x.shape[1])))


@settings(max_examples=150, deadline=None)
@given(matrices(FEW_VALUES), st.data())
def test_top_of_batch_is_a_stable_sort(x, data):
    check_batch(x, data.draw(st.integers(1, x.numel())))


@settings(max_examples=60, deadline=None)
@given(
    matrices(FEW_VALUES | st.just(np.nan), most_rows=3, most_width=8 * GROUP),
    st.integers(1, 4),
    st.integers(1, 12),
)
def test_wide_rows_are_searched_by_groups_with_the_same_result(x, k, n):
    check_rows(x, min(k, x.shape[1]))
    check_batch(x, min(n, x.numel()))


@pytest.mark.parametrize("width", [16, 256, 6 * GROUP, 6 * GROUP + 1, 10 * GROUP - 1, 3072])
@pytest.mark.parametrize("k", [1, 2, 3, 16])
@pytest.mark.parametrize("special", [0.0, -np.inf, np.inf, np.nan])
def test_rows_of_many_kinds(width, k, special):
    """Random rows, and rows in which some, nearly all or all entries are one value."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((5, width)).astype(np.float32)
    x[1, rng.random(width) < 0.5] = special
    x[2] = special
    x[3] = special
    x[3, [0, width - 1]] = 1.0
    check_rows(torch.from_numpy(x), k)
    for n in (1, k, 5 * k):
        check_batch(torch.from_numpy(x), n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_of_either_sign_is_infinity(dtype):
    x = torch.tensor([[1.0, -torch.inf, torch.nan, torch.inf, 0.0, torch.nan] * 20], dtype=dtype)
    x[0, 2::6] = torch.copysign(x[0, 2::6], torch.tensor(-1.0, dtype=dtype))
    for k in (1, 40, 60, 61, 120):
        check_rows(x, k)
        check_batch(x, k)


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan, -1.0, 0.0])
@pytest.mark.parametrize("width", [1, GROUP - 1, GROUP, 5 * GROUP + 3])
def test_rows_of_one_value_give_the_first(value, width):
    x = torch.full((2, width), value)
    for k in {1, width // 2 or 1, width}:
        assert top_k(x, k)[1].tolist() == [list(range(k))] * 2


def test_every_entry_may_be_asked_for():
    x = torch.tensor([[3.0, -torch.inf, 3.0], [0.0, 1.0, torch.inf]])
    values, index = top_k(x, 3)
    assert torch.equal(values, x)
    assert index.tolist() == [[0, 1, 2], [0, 1, 2]]
    row, column, value = top_of_batch(x, 6)
    assert (row.tolist(), column.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
    assert torch.equal(value, x.reshape(-1))


def test_views_that_are_not_contiguous():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)).T
    check_rows(x, 2)
    check_batch(x, 5)
    check_rows(x[:, ::2].requires_grad_(), 4)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_and_the_chunks_do_not_matter(monkeypatch, threads):
    """Ties straddle the borders of chunks; the expected places come from one stable sort."""
    monkeypatch.setattr(topk, "CHUNK_ELEMENTS", 700)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    g = torch.Generator().manual_seed(1)
    for width, k in ((300, 2), (301, 2), (40, 5)):
        x = torch.randn(23, width, generator=g).mul(2).round()
        check_rows(x, k)
        check_batch(x, 23 * k)


def test_top_k_of_many_random_rows():
    x = torch.randn(200, 4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in (9, 64, 65):
        values, index = top_k(x, k)
        expected = torch.topk(x, k)
        assert torch.equal(index, expected.indices.sort(1).values)
        assert torch.equal(values.sort(1, descending=True).values, expected.values)
    row, column, _ = top_of_batch(x, 1800)
    flat = torch.topk(x.reshape(-1), 1800).indices.sort().values
    assert torch.equal(row * 4096 + column, flat)


def test_selection_on_a_gpu_is_the_same_rule():
    """The path for CUDA tensors, run on this machine's tensors."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(7, 60, generator=g).round()
    x[1, 5] = torch.nan
    x[2], x[3, 3:] = -torch.inf, torch.inf
    for k in (1, 7, 60):
        assert torch.equal(topk._cuda(x, k), top_k(x, k)[1])


@pytest.mark.parametrize("k", [0, 4, -1])
def test_more_than_there_is_cannot_be_asked_for(k):
    with pytest.raises(SAEError, match=rf"k {k} is not allowed; it must be from 1 to 3"):
        top_k(torch.zeros(2, 3), k)


@pytest.mark.parametrize("n", [0, 7])
def test_more_of_a_batch_than_there_is_cannot_be_asked_for(n):
    with pytest.raises(SAEError, match=rf"n {n} is not allowed; it must be from 1 to 6"):
        top_of_batch(torch.zeros(2, 3), n)


def test_no_rows():
    values, index = top_k(torch.zeros(0, 300), 2)
    assert values.shape == index.shape == (0, 2)
