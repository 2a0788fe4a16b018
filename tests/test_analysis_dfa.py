"""Direct feature attribution: against a triple loop, and exact from the text to the table."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.analysis import dfa
from atlas.analysis.dfa import Attributions, DFAPass, Kept, columns_of, contributions, dfa_share, largest
from atlas.configs import ARCHITECTURES, NORMALISATIONS, SPARSE_BY_K
from atlas.corpus.tokens import TokenStore
from atlas.lm.hooks import capture
from atlas.progress import NullProgress
from atlas.sites import Site
from atlas.tables import SOURCES

from .tiny import D_HEAD, N_HEADS, random_sae, random_tokens, save_store, tiny_model

TOKENS = random_tokens(7, 10)


def test_dense_matrix_against_a_triple_loop():
    g = torch.Generator().manual_seed(0)
    pattern = torch.rand(3, 5, 5, generator=g).tril()
    v, W = torch.randn(5, 3, 4, generator=g), torch.randn(3, 4, 2, generator=g)
    position = torch.tensor([4, 1])
    dense = contributions(pattern, v, W, position)
    assert dense.shape == (2, 3, 5)
    for i, p in enumerate(position.tolist()):
        for h in range(3):
            for source in range(5):
                dot = sum(v[source, h, d].item() * W[h, d, i].item() for d in range(4))
                assert dense[i, h, source].item() == pytest.approx(
                    pattern[h, p, source].item() * dot, abs=1e-6
                )


# ---------------------------------------------------------------- the largest sources


def by_rule(values: list[float]) -> list[float]:
    """The largest by magnitude until 95 % of the absolute sum, at most 32, never a zero."""
    total, kept, covered = sum(map(abs, values)), [], 0.0
    for v in sorted(values, key=abs, reverse=True):
        if v == 0 or covered >= 0.95 * total or len(kept) == 32:
            break
        kept.append(v)
        covered += abs(v)
    return kept


# Whole numbers whose sum is no multiple of 20, so that 95 % of it is never met exactly.
WHOLE_NUMBERS = st.lists(st.integers(-50, 50), min_size=12, max_size=12).filter(
    lambda row: sum(map(abs, row)) % 20 != 0 or not any(row)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(WHOLE_NUMBERS, min_size=1, max_size=3))
def test_largest_stops_at_95_percent(rows):
    dense = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), 3, 4)
    index, value, count = largest(dense)
    for i, row in enumerate(rows):
        n = int(count[i])
        kept = value[i, :n].tolist()
        assert [abs(v) for v in kept] == [abs(v) for v in by_rule(row)]
        assert [row[j] for j in index[i, :n].tolist()] == kept, "index and value belong together"
        assert len(set(index[i, :n].tolist())) == n


def test_largest_keeps_at_most_32():
    dense = torch.linspace(1, 2, 60).reshape(1, 3, 20)
    index, value, count = largest(dense)
    assert count.tolist() == [32]
    assert index[0].tolist() == list(range(59, 27, -1))
    assert value[0].tolist() == dense.flatten()[index[0]].tolist()


def test_largest_of_one_and_of_nothing():
    dense = torch.zeros(2, 2, 3)
    dense[1, 1, 0] = -4
    index, value, count = largest(dense)
    assert count.tolist() == [0, 1]
    assert (index[1, 0].item(), value[1, 0].item()) == (3, -4.0)


# ---------------------------------------------------------------- on a model


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore(save_store(tmp_path_factory.mktemp("dfa") / "store", TOKENS))


def kept_examples(d_sae: int, seed: int) -> Kept:
    """Examples in no order, some blocks with several and block 2 with none."""
    rng = np.random.default_rng(seed)
    block = rng.choice([0, 1, 3, 4, 5, 6], 25)
    return Kept(rng.integers(0, d_sae, 25), block, rng.integers(1, 10, 25))


@pytest.fixture(scope="module", params=["raw", "folded"])
def attributed(request, store):
    model = tiny_model(request.param)
    saes = [random_sae("L00.z", seed=1), random_sae("L01.z", seed=2, k=4)]
    kept = [kept_examples(20, 1), kept_examples(20, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dfa, "BATCH_BLOCKS", 2)
        found = DFAPass(model, saes, kept).run(store, NullProgress())
    sites = [sae.info.site for sae in saes]
    hooks = [f"blocks.{layer}.attn.hook_{what}" for layer in (0, 1) for what in ("pattern", "v")]
    z, raw = capture(model, torch.from_numpy(TOKENS), sites, hooks)
    return list(zip(saes, kept, found, [z[s] for s in sites], strict=True)), raw


def test_contributions_and_bias_give_the_preactivation(attributed):
    for sae, kept, found, z in attributed[0]:
        for i in range(len(kept.feature)):
            f = kept.feature[i]
            x = z[kept.block[i], kept.position[i]].double()
            pre = (x - sae.b_dec.double()) @ sae.W_enc[:, f].double() + sae.b_enc[f].double()
            bias = sae.b_enc[f].double() - sae.b_dec.double() @ sae.W_enc[:, f].double()
            assert found.pre_activation[i] == pytest.approx(pre.item(), abs=1e-5)
            assert found.by_head[i].sum() + bias.item() == pytest.approx(pre.item(), abs=1e-5)
            assert sae.bias_term[f].item() == pytest.approx(bias.item(), abs=1e-5)


def test_heads_parts_are_the_heads_parts_of_x(attributed):
    for sae, kept, found, z in attributed[0]:
        for i in range(len(kept.feature)):
            x = z[kept.block[i], kept.position[i]].reshape(N_HEADS, D_HEAD)
            W = sae.W_enc[:, kept.feature[i]].reshape(N_HEADS, D_HEAD)
            np.testing.assert_allclose(found.by_head[i], (x * W).sum(1).numpy(), atol=1e-5)


def test_stored_sources_are_the_largest_of_a_loop(attributed):
    examples, raw = attributed
    for sae, kept, found, _ in examples:
        layer = sae.info.site.layer
        pattern, v = (raw[f"blocks.{layer}.attn.hook_{what}"].double() for what in ("pattern", "v"))
        for i, (f, b, p) in enumerate(zip(*kept, strict=True)):
            W = sae.W_enc[:, f].double().reshape(N_HEADS, D_HEAD)
            dense = {
                (h, s): (pattern[b, h, p, s] * (v[b, s, h] @ W[h])).item()
                for h in range(N_HEADS)
                for s in range(10)
            }
            n = found.n_sources[i]
            stored = list(zip(found.head[i, :n].tolist(), found.source[i, :n].tolist(), strict=True))
            assert len(set(stored)) == n
            assert all(s <= p for _, s in stored), "attention looks back only"
            expected = [dense[place] for place in stored]
            np.testing.assert_allclose(found.contribution[i, :n], expected, atol=1e-5)
            np.testing.assert_allclose(np.abs(expected), np.abs(by_rule(list(dense.values()))), atol=1e-5)
            for h in range(N_HEADS):
                whole = sum(value for (head, _), value in dense.items() if head == h)
                assert found.by_head[i, h] == pytest.approx(whole, abs=1e-5)


def test_batches_do_not_matter(store, monkeypatch):
    sae, kept = random_sae("L01.z", seed=2), kept_examples(20, 2)
    whole = DFAPass(tiny_model(), [sae], [kept]).run(store, NullProgress())[0]
    monkeypatch.setattr(dfa, "BATCH_BLOCKS", 2)
    parts = DFAPass(tiny_model(), [sae], [kept]).run(store, NullProgress())[0]
    assert np.array_equal(whole.n_sources, parts.n_sources)
    np.testing.assert_allclose(whole.by_head, parts.by_head, atol=1e-5)
    np.testing.assert_allclose(whole.pre_activation, parts.pre_activation, atol=1e-5)


def test_folded_values_hold_no_value_bias(store):
    """The raw pre-activation's heads differ from the folded ones by the constant through W_enc."""
    sae, kept = random_sae("L01.z", seed=3), kept_examples(20, 3)
    raw, folded = (
        DFAPass(tiny_model(p), [sae], [kept]).run(store, NullProgress())[0] for p in ("raw", "folded")
    )
    site = Site("z", 1)
    tokens = torch.from_numpy(TOKENS)
    shift = (
        capture(tiny_model("raw"), tokens, [site])[0][site][0, 0]
        - (capture(tiny_model("folded"), tokens, [site])[0][site][0, 0])
    )
    for i, f in enumerate(kept.feature):
        W = sae.W_enc[:, f].reshape(N_HEADS, D_HEAD)
        expected = (shift.reshape(N_HEADS, D_HEAD) * W).sum(1).numpy()
        np.testing.assert_allclose(raw.by_head[i] - folded.by_head[i], expected, atol=2e-5)


def preactivation_by_hand(sae, x: np.ndarray, f: int) -> tuple[float, np.ndarray]:
    """Pre-activation (gated: of the magnitude path) and each head's part of it, from the raw tensors."""
    t = {name: tensor.double().numpy() for name, tensor in sae.tensors().items()}
    mean, size = 0.0, 1.0
    if sae.info.normalize_activations == "layer_norm":
        mean, size = x.mean(), x.std(ddof=1) + 1e-5
    elif sae.info.normalize_activations == "constant_norm_rescale":
        size = np.linalg.norm(x) / np.sqrt(len(x))
    inside = (x - mean) / size
    if sae.info.apply_b_dec_to_input:
        inside = inside - t["b_dec"]
    w, gain = t["W_enc"][:, f], np.exp(t["r_mag"][f]) if "r_mag" in t else 1.0
    pre = inside @ w * gain + t["b_enc"][f]
    norm = np.linalg.norm(t["W_dec"][f]) if sae.info.rescale_acts_by_decoder_norm else 1.0
    centre = w.mean() if sae.info.normalize_activations == "layer_norm" else 0.0
    parts = (x * (w - centre) * gain * norm / size).reshape(N_HEADS, D_HEAD).sum(1)
    return pre * norm, parts


@pytest.mark.parametrize("b_dec_rescale", [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attribution_is_exact_for_every_kind_of_sae(store, architecture, normalisation, b_dec_rescale):
    sae = random_sae(
        architecture=architecture,
        k=4 if architecture in SPARSE_BY_K else None,
        seed=5,
        normalize_activations=normalisation,
        apply_b_dec_to_input=b_dec_rescale[0],
        rescale_acts_by_decoder_norm=b_dec_rescale[1],
    )
    kept = kept_examples(20, 4)
    (found,) = DFAPass(tiny_model(), [sae], [kept]).run(store, NullProgress())
    z = capture(tiny_model(), torch.from_numpy(TOKENS), [sae.info.site])[0][sae.info.site].double().numpy()
    for i, (f, b, p) in enumerate(zip(*kept, strict=True)):
        pre, parts = preactivation_by_hand(sae, z[b, p], f)
        assert found.pre_activation[i] == pytest.approx(pre, abs=2e-5)
        assert found.by_head[i].sum() + sae.bias_term[f].item() == pytest.approx(pre, abs=2e-5)
        np.testing.assert_allclose(found.by_head[i], parts, atol=2e-5)


def test_no_examples(store):
    nothing = Kept(*(np.empty(0, np.int64) for _ in range(3)))
    (found,) = DFAPass(tiny_model(), [random_sae("L00.z")], [nothing]).run(store, NullProgress())
    assert found.by_head.shape == (0, N_HEADS)
    columns = columns_of(found, np.empty(0, np.float32))
    assert len(columns["by_head"]) == len(columns["sources"]) == 0


# ---------------------------------------------------------------- columns and shares


def made_up(by_head, n_sources=None):
    by_head = np.array(by_head, np.float32)
    n = len(by_head)
    counts = np.array(n_sources or [0] * n, np.int16)
    head, source = np.arange(n * 3).reshape(n, 3), 10 + np.arange(n * 3).reshape(n, 3)
    value = np.arange(n * 3).reshape(n, 3) / 2
    return Attributions(
        by_head,
        np.arange(n, dtype=np.float32),
        head.astype(np.int16),
        source.astype(np.int16),
        value.astype(np.float32),
        counts,
    )


def test_columns_hold_each_examples_own_sources():
    columns = columns_of(made_up([[1, 2], [3, 4], [5, 6]], [2, 0, 3]), np.array([7, 8, 9], np.float32))
    assert columns["by_head"].to_pylist() == [[1, 2], [3, 4], [5, 6]]
    assert columns["sources"].type == SOURCES
    assert columns["sources"].to_pylist() == [
        [{"head": 0, "source": 10, "contribution": 0.0}, {"head": 1, "source": 11, "contribution": 0.5}],
        [],
        [{"head": j, "source": 10 + j, "contribution": j / 2} for j in (6, 7, 8)],
    ]
    assert columns["bias_term"].tolist() == [7, 8, 9]
    assert columns["pre_activation"].tolist() == [0, 1, 2]


def test_dfa_share_is_the_mean_over_top_examples():
    a = made_up([[1, 3], [2, 2], [9, 1], [-1, 3], [1, -1]])
    feature = np.array([0, 0, 0, 2, 3])
    is_top = np.array([True, True, False, True, True])
    share = dfa_share(a, feature, is_top, 4)
    assert share[0].tolist() == [(0.25 + 0.5) / 2, (0.75 + 0.5) / 2]
    assert np.isnan(share[1]).all()
    assert share[2].tolist() == [-0.5, 1.5]
    assert np.isnan(share[3]).all(), "p is zero"
