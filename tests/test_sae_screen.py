"""What fires and what nearly fires, found by upper bounds: the same as from all pre-activations."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from atlas.analysis.misses import NearMisses, without_firing
from atlas.analysis.shard import SAEPass
from atlas.kernels.screen import compute, floors, to_keys
from atlas.sae import screen as module
from atlas.sae.screen import Firing, Screen

from .tiny import random_sae

SINGLES = st.floats(width=32, allow_nan=False, allow_infinity=False)
SCALES = st.sampled_from([0.0, 1e-22, 1e-12, 1e-3, 1.0, 30.0, 1e6])
SMALLEST_NORMAL = 2.0**-126


@pytest.fixture
def fast(monkeypatch):
    """The processor is said to be fast in bfloat16, whatever it is."""
    monkeypatch.setattr(module, "fast_bfloat16", lambda _: True)


def all_of(screen: Screen, x: torch.Tensor) -> torch.Tensor:
    """Every product, added up as the screen adds up those that it looks at."""
    n, width = len(x), len(screen.weights)
    at = np.arange(n + 1) * width
    found = np.tile(np.arange(width, dtype=np.int32), n)
    place, exact = np.empty_like(found), np.empty(len(found), np.float32)
    compute(at, found, x.numpy(), screen.weights, screen.bias, place, exact)
    np.testing.assert_array_equal(found.reshape(n, width), np.tile(np.arange(width), (n, 1)))
    whole = x.double() @ torch.from_numpy(screen.weights).double().T + torch.from_numpy(screen.bias).double()
    size = x.double().norm(dim=1)[:, None] * torch.from_numpy(screen.weights).double().norm(dim=1)
    found = torch.from_numpy(exact).reshape(n, width)
    off = (found - whole).abs() - 1e-5 * (size + torch.from_numpy(screen.bias).abs())
    assert float(off.max()) <= 1e-30
    return found


@st.composite
def problems(draw, least_width=64):
    """Rows, directions, biases and a centre: of one size or of many, with equal directions and numbers."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    n, d, width = draw(st.integers(1, 9)), draw(st.integers(1, 40)), draw(st.integers(least_width, 200))
    x, W = rng.standard_normal((n, d)), rng.standard_normal((width, d))
    if draw(st.booleans()):
        x, W = np.round(x), np.round(W)
    x += draw(SCALES) * rng.standard_normal(d)
    if draw(st.booleans()):
        W *= np.exp(3 * rng.standard_normal((width, 1)))
    if draw(st.booleans()):
        x *= np.exp(3 * rng.standard_normal((n, 1)))
    W[rng.integers(0, width, width // 3)] = W[rng.integers(0, width, width // 3)]
    x, W = x * draw(SCALES), W * draw(SCALES)
    bias, centre = draw(SCALES) * rng.standard_normal(width), draw(SCALES) * rng.standard_normal(d)
    return [torch.from_numpy(part.astype(np.float32)) for part in (x, W, bias, centre)]


@settings(max_examples=300, deadline=None)
@given(problems(), st.integers(1, 12), st.integers(0, 3))
def test_the_largest_are_those_of_all(problem, k, room):
    """The k largest by a stable sort, and every bit of their values, however much room there is at once."""
    x, W, bias, centre = problem
    screen, k = Screen(W, bias, centre), min(k, len(W) // 16)
    seen = screen.look(x)
    assume(seen is not None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROOM", room)
        index, value = screen.largest(seen, k)
    products = all_of(screen, x)
    order = products.sort(dim=1, descending=True, stable=True).indices[:, :k]
    expected = order.sort(dim=1).values
    assert torch.equal(index, expected)
    assert torch.equal(value, products.gather(1, expected))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_a_bound_is_below_no_product(problem):
    x, W, bias, centre = problem
    screen = Screen(W, bias, centre)
    seen = screen.look(x)
    assume(seen is not None)
    to_keys(seen.keys.reshape(-1))
    products = all_of(screen, x)
    assert (seen.keys >= floors(products.numpy().reshape(-1)).reshape(products.shape)).all()


@settings(max_examples=500, deadline=None)
@given(SINGLES, SINGLES)
def test_the_floor_of_a_number_is_below_every_larger_one(one, other):
    """However the larger is rounded to bfloat16, and where numbers too small for it are taken for zero."""
    low, high = sorted((one, other))
    least = int(floors(np.array([low], np.float32))[0])
    bits = torch.tensor([high]).bfloat16().view(torch.int16).numpy().copy()
    to_keys(bits)
    assert int(bits[0]) >= least
    if abs(high) < SMALLEST_NORMAL:
        assert least <= 0


def test_keys_order_like_numbers():
    numbers = torch.tensor([-torch.inf, -3e38, -2.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, torch.inf]).bfloat16()
    keys = numbers.view(torch.int16).numpy().copy()
    to_keys(keys)
    assert (np.diff(keys) >= 0).all()
    assert keys[4] == keys[5] == 0
    assert keys[0] > -32768, "what marks a feature that fires is less than any number"


def sae_of(architecture: str, seed: int, **known):
    k = 4 if architecture == "topk" else None
    return random_sae("L00.z", d_sae=130, k=k, seed=seed, architecture=architecture, **known)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["topk", "relu", "jumprelu"]), st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 3)
)  # fmt: skip
def test_an_sae_fires_and_misses_as_from_all_pre_activations(architecture, seed, blocks, size):
    sae, context = sae_of(architecture, seed), 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fast_bfloat16", lambda _: True)
        assert Firing.suits(sae)
    firing = Firing(sae)
    x = torch.randn(blocks * (context - 1), sae.d_in, generator=torch.Generator().manual_seed(seed))
    pre = all_of(firing.screen, x)
    torch.testing.assert_close(pre, sae.preactivations(x), rtol=1e-4, atol=1e-4)
    expected = sae.firing(x, pre)
    misses, plain = (NearMisses(sae.d_sae, context) for _ in range(2))
    missed = without_firing(pre.clone(), expected.row, expected.feature)
    plain.update(missed.reshape(blocks, -1, sae.d_sae), 2)
    parts = []
    for first in range(0, blocks, size):
        rows = slice(first * (context - 1), (first + size) * (context - 1))
        seen = firing.screen.look(x[rows])
        found = firing.of(seen)
        misses.update_screened(firing.screen, seen, found, 2 + first)
        parts.append(found._replace(row=found.row + rows.start))
    for column, whole in zip(zip(*parts, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(column), whole)
    np.testing.assert_array_equal(misses.token, plain.token)
    np.testing.assert_array_equal(misses.pre, plain.pre)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.usefixtures("fast")
def test_tokens_that_cannot_be_bounded_are_left_to_all_pre_activations(value):
    sae = sae_of("topk", 0)
    x = torch.ones(3, sae.d_in)
    x[1, 2] = value
    assert Firing(sae).screen.look(x) is None
    part = SAEPass(sae, 3, context=4)
    assert part.screened is not None
    found, expected = part._firing(x, 0), sae.active(x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.usefixtures("fast")
def test_which_saes_are_screened():
    assert not Firing.suits(random_sae(d_sae=130, architecture="gated"))
    assert not Firing.suits(random_sae(d_sae=130, k=9)), "a good part of its features"
    assert Firing.suits(random_sae(d_sae=130, k=8))
    assert not Firing.suits(random_sae(d_sae=63))
    huge = random_sae(d_sae=130)
    assert not Firing.suits(huge.with_tensors({"W_enc": huge.W_enc * 1e20}))


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu", "gated"])
@pytest.mark.parametrize("how", ["none", "layer_norm"])
def test_a_corpus_pass_with_and_without(architecture, how, monkeypatch, tmp_path):
    """The same tokens and features, and activations up to rounding, whatever the processor."""
    sae, context = sae_of(architecture, 3, normalize_activations=how), 6
    x = torch.randn(7 * (context - 1), sae.d_in, generator=torch.Generator().manual_seed(1))
    found = []
    for fast in (True, False):
        monkeypatch.setattr(module, "fast_bfloat16", lambda _, fast=fast: fast)
        part = SAEPass(sae, 3, context)
        assert (part.screened is not None) == (fast and architecture != "gated")
        part.update(x, 4)
        (feature, token, value), sums = part.triples[0], part.shares.sums
        found.append(SimpleNamespace(at=list(zip(token, feature, strict=True)), value=value, sums=sums,
                                     misses=part.misses))  # fmt: skip
    one, other = found
    assert one.at == other.at
    np.testing.assert_allclose(one.value, other.value, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(one.misses.token, other.misses.token)
    np.testing.assert_allclose(one.misses.pre, other.misses.pre, rtol=1e-5, atol=1e-5)
    for name, sums in one.sums.items():
        np.testing.assert_allclose(sums, other.sums[name], rtol=1e-4, atol=1e-4)
