"""Direct feature attribution: against a triple loop, and exact from the text to the table."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.analysis import dfa
from atlas.analysis.contributions import Places, by_block, by_example, contributions, largest, linear_parts
from atlas.analysis.dfa import DFAPass, Kept
from atlas.analysis.dfa_rows import DFARows, Rows, StoredRows, columns_of
from atlas.analysis.dfa_sums import DFASums, matched_prefix
from atlas.analysis.examples import GROUPS, TOP
from atlas.configs import ARCHITECTURES, NORMALISATIONS, SPARSE_BY_K
from atlas.corpus.tokens import TokenStore
from atlas.errors import StoreError
from atlas.lm.hooks import capture
from atlas.progress import NullProgress
from atlas.sites import Site
from atlas.tables import SOURCES

from .tiny import D_HEAD, N_HEADS, random_sae, random_tokens, save_store, tiny_model

TOKENS = random_tokens(7, 10)


def test_dense_matrix_against_a_triple_loop():
    g = torch.Generator().manual_seed(0)
    pattern = torch.rand(3, 5, 5, generator=g).tril()
    v, W = torch.randn(5, 3, 4, generator=g), torch.randn(2, 3, 4, generator=g)
    position = torch.tensor([4, 1])
    dense = contributions(pattern, v, W, position)
    assert dense.shape == (2, 3, 5)
    for i, p in enumerate(position.tolist()):
        for h in range(3):
            for source in range(5):
                dot = sum(v[source, h, d].item() * W[i, h, d].item() for d in range(4))
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
    index, value, count, _ = largest(dense, np.full(len(rows), 3))
    for i, row in enumerate(rows):
        n = int(count[i])
        kept = value[i, :n].tolist()
        assert [abs(v) for v in kept] == [abs(v) for v in by_rule(row)]
        assert [row[j] for j in index[i, :n].tolist()] == kept, "index and value belong together"
        assert len(set(index[i, :n].tolist())) == n


@pytest.mark.parametrize("shape", [(2, 20), (12, 128), (5, 1000)])
@pytest.mark.parametrize("seed", [0, 1])
def test_largest_and_best_against_a_sort_of_everything(shape, seed):
    """Ties go to the lower head, then source; what lies after the position is not looked at."""
    rng = np.random.default_rng(seed)
    heads, key = shape
    dense = (rng.standard_normal((11, heads, key)) * rng.integers(0, 3, (11, heads, key))).astype(np.float32)
    dense[1] = -np.abs(dense[1])
    dense[2, :, ::3], dense[3] = dense[2, :1, :1], 1.5  # many ties, and nothing but ties
    dense[4, 0, :40] = -np.linspace(50, 60, len(dense[4, 0, :40]))  # the largest 32 are negative, not all
    dense[9] *= 10.0 ** rng.uniform(-43, 30, (heads, key))  # down to numbers of few bits
    dense[10] = np.where(np.arange(heads * key) % 7 == 0, np.float32(1e-45), 0).reshape(heads, key)
    dense[10, 0, 0] = 3e38
    position = np.array([key - 1, key // 2, key - 1, key - 1, key - 1, 0, 3, key // 3, 1, key - 1, key - 1])
    found = largest(torch.from_numpy(dense), position)
    for i, p in enumerate(position):
        flat = np.where(np.arange(key) <= p, dense[i], 0).ravel()
        order = np.argsort(-np.abs(flat), kind="stable")[: min(32, np.count_nonzero(flat))]
        assert found.place[i, : len(order)].tolist() == order.tolist()
        assert found.value[i, : len(order)].tolist() == flat[order].tolist()
        before = np.abs(flat[order].astype(np.float64)).cumsum() - np.abs(flat[order])
        assert found.n[i] == (before < 0.95 * np.abs(flat.astype(np.float64)).sum()).sum()
        assert found.best[i] == (flat.argmax() if flat.max() > 0 else -1)


def test_largest_keeps_at_most_32():
    dense = torch.linspace(1, 2, 60).reshape(1, 3, 20)
    index, value, count, _ = largest(dense, np.array([19]))
    assert count.tolist() == [32]
    assert index[0].tolist() == list(range(59, 27, -1))
    assert value[0].tolist() == dense.flatten()[index[0]].tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_one_example_at_a_time_gives_what_the_dense_matrix_gives(key, d_head, seed):
    """What a CPU does and what a GPU does, over contexts and heads of any size.

    Of numbers whose products and sums are exact, so that the order of their sums decides nothing.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    n, heads, blocks = 12, 3, 3
    pattern = torch.randint(0, 17, (blocks, heads, key, key), generator=generator).tril() / 16
    v = torch.randint(-40, 41, (blocks, key, heads, d_head), generator=generator).float()
    directions = torch.randint(-9, 10, (5, heads, d_head), generator=generator).float()
    scale = 2.0 ** torch.randint(-2, 3, (n,), generator=generator)
    block, position = np.sort(rng.integers(0, blocks, n)), rng.integers(0, key, n)
    places = Places(rng.integers(0, 5, n), block, position, rng.random(n) < 0.4)
    one, other = (way(places, pattern, v, directions, scale) for way in (by_example, by_block))
    torch.testing.assert_close(one.by_head, other.by_head)
    np.testing.assert_allclose(one.top, other.top, rtol=1e-5, atol=1e-6)
    assert one.largest.n.tolist() == other.largest.n.tolist()
    assert one.largest.best.tolist() == other.largest.best.tolist()
    for i, kept in enumerate(one.largest.n):
        assert one.largest.place[i, :kept].tolist() == other.largest.place[i, :kept].tolist()
        np.testing.assert_allclose(one.largest.value[i], other.largest.value[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d_in", [3, 16, 37])
def test_linear_parts_against_float64(d_in):
    rng, generator = np.random.default_rng(d_in), torch.Generator().manual_seed(d_in)
    x = torch.randn(4, 6, d_in, generator=generator)
    W = torch.randn(5, d_in, generator=generator)
    block, position, feature = np.sort(rng.integers(0, 4, 20)), rng.integers(0, 6, 20), rng.integers(0, 5, 20)
    found = linear_parts(x, Places(feature, block, position, np.zeros(20, bool)), W)
    expected = (x.double().numpy()[block, position] * W.double().numpy()[feature]).sum(1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_linear_parts_of_one_head_do_not_depend_on_how_it_lies_in_memory():
    """Of a whole pass it lies among the other heads, of a replay by itself."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    z, W = torch.randn(3, 6, 4, 64, generator=generator), torch.randn(5, 64, generator=generator)
    block, position, feature = np.sort(rng.integers(0, 3, 90)), rng.integers(0, 6, 90), rng.integers(0, 5, 90)
    places = Places(feature, block, position, np.zeros(90, bool))
    among, alone = linear_parts(z[:, :, 1], places, W), linear_parts(z[:, :, 1].contiguous(), places, W)
    assert torch.equal(among, alone)


def test_largest_of_one_and_of_nothing():
    dense = torch.zeros(2, 2, 3)
    dense[1, 1, 0] = -4
    index, value, count, best = largest(dense, np.array([2, 2]))
    assert best.tolist() == [-1, -1]
    assert count.tolist() == [0, 1]
    assert (index[1, 0].item(), value[1, 0].item()) == (3, -4.0)


# ---------------------------------------------------------------- on a model


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore(save_store(tmp_path_factory.mktemp("dfa") / "store", TOKENS))


def kept_examples(d_sae: int, seed: int) -> Kept:
    """Examples in the order of the table, some blocks with several and block 2 with none."""
    rng = np.random.default_rng(seed)
    feature = np.sort(rng.integers(0, d_sae, 25))
    code = np.where(np.arange(25) % 3, TOP, 4)
    order = np.lexsort((code, feature))
    block, position = rng.choice([0, 1, 3, 4, 5, 6], 25), rng.integers(1, 10, 25)
    return Kept(feature, code[order], np.arange(25), block, position)


def attribute(model, saes, kept, store) -> list[Rows]:
    """The rows of each SAE, in the order of its kept examples."""
    work = DFAPass(model, saes, kept)
    work.run(store, range(len(store)), NullProgress())
    return [joined(rows) for rows in work.rows]


def joined(rows: DFARows) -> Rows:
    return Rows(*(np.concatenate(parts) for parts in zip(*rows.parts, strict=True))).sorted()


def sources_of(found: Rows, i: int) -> np.ndarray:
    ends = found.rows["n_sources"].cumsum()
    return found.sources[ends[i] - found.rows["n_sources"][i] : ends[i]]


@pytest.fixture(scope="module", params=["raw", "folded"])
def attributed(request, store):
    model = tiny_model(request.param)
    saes = [
        random_sae("L00.z", seed=1), random_sae("L01.z", seed=2, k=4),
        random_sae("L01.H01.z", d_in=D_HEAD, seed=6), random_sae("L01.attn_out", seed=7),
    ]  # fmt: skip
    kept = [kept_examples(20, n) for n in range(1, 5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dfa, "BATCH_BLOCKS", 2)
        found = attribute(model, saes, kept, store)
    sites = [sae.info.site for sae in saes]
    hooks = [f"blocks.{layer}.attn.hook_{what}" for layer in (0, 1) for what in ("pattern", "v")]
    z, raw = capture(model, torch.from_numpy(TOKENS), sites, hooks)
    return list(zip(saes, kept, found, [z[s] for s in sites], strict=True)), raw, model


def test_contributions_and_bias_give_the_preactivation(attributed):
    for sae, kept, found, z in attributed[0]:
        for i in range(len(kept.feature)):
            f = kept.feature[i]
            x = z[kept.block[i], kept.position[i]].double()
            pre = (x - sae.b_dec.double()) @ sae.W_enc[:, f].double() + sae.b_enc[f].double()
            bias = sae.b_enc[f].double() - sae.b_dec.double() @ sae.W_enc[:, f].double()
            assert found.rows["pre"][i] == pytest.approx(pre.item(), abs=1e-5)
            assert found.by_head[i].sum() + found.rows["bias"][i] == pytest.approx(pre.item(), abs=1e-5)
            if sae.info.site.kind == "z":
                assert found.rows["bias"][i] == pytest.approx(bias.item(), abs=1e-5)


def test_heads_parts_are_the_heads_parts_of_x(attributed):
    for sae, kept, found, z in attributed[0][:2]:
        for i in range(len(kept.feature)):
            x = z[kept.block[i], kept.position[i]].reshape(N_HEADS, D_HEAD)
            W = sae.W_enc[:, kept.feature[i]].reshape(N_HEADS, D_HEAD)
            np.testing.assert_allclose(found.by_head[i], (x * W).sum(1).numpy(), atol=1e-5)


def dense_by_loop(sae, model, raw, f, b, p) -> dict[tuple[int, int], float]:
    """Every (head, source) contribution, in float64 and without matrix products."""
    site = sae.info.site
    pattern, v = (raw[f"blocks.{site.layer}.attn.hook_{what}"].double() for what in ("pattern", "v"))
    W = sae.W_enc[:, f].double()
    if site.kind == "attn_out":
        W = torch.stack([model.W_O(site.layer)[h].double() @ W for h in range(N_HEADS)])
    heads = range(N_HEADS) if site.head is None else [site.head]
    W = W.reshape(len(heads), D_HEAD)
    return {
        (h, s): (pattern[b, h, p, s] * (v[b, s, h] @ W[n])).item()
        for n, h in enumerate(heads)
        for s in range(10)
    }


def test_stored_sources_are_the_largest_of_a_loop(attributed):
    examples, raw, model = attributed
    for sae, kept, found, _ in examples:
        for i, (f, b, p) in enumerate(zip(kept.feature, kept.block, kept.position, strict=True)):
            dense = dense_by_loop(sae, model, raw, f, b, p)
            row, stored = found.rows[i], sources_of(found, i)
            places = list(zip(stored["head"].tolist(), stored["source"].tolist(), strict=True))
            assert len(set(places)) == len(places) == row["n_sources"]
            assert all(s <= p for _, s in places), "attention looks back only"
            expected = np.array([dense[place] for place in places])
            values = stored["weight"] * row["unit"]
            assert np.abs(values).max() == pytest.approx(
                np.abs(expected).max(), abs=float(row["unit"]) / 2 + 1e-5
            )
            np.testing.assert_allclose(values, expected, atol=row["unit"] / 2 + 1e-5)
            largest_by_rule = np.abs(by_rule(list(dense.values())))
            np.testing.assert_allclose(np.abs(expected), largest_by_rule, rtol=1e-3, atol=1e-5)
            for n, h in enumerate(sorted({h for h, _ in dense})):
                whole = sum(value for (head, _), value in dense.items() if head == h)
                assert found.by_head[i, n] == pytest.approx(whole, abs=1e-5)
            best = max(dense, key=lambda place: dense[place])
            top = (int(row["top_head"]), int(row["top_source"]))
            assert top == (best if dense[best] > 0 else (-1, -1))


def test_batches_and_parts_of_the_text_do_not_matter(store, tmp_path, monkeypatch):
    sae, kept = random_sae("L01.z", seed=2), kept_examples(20, 2)
    (whole,) = attribute(tiny_model(), [sae], [kept], store)
    monkeypatch.setattr(dfa, "BATCH_BLOCKS", 2)
    for n, inside in enumerate((kept.block < 3, kept.block >= 3)):
        work = DFAPass(tiny_model(), [sae], [kept.at(inside)])
        work.run(store, range(len(store)), NullProgress())
        work.rows[0].save(tmp_path / str(n))
    stored = StoredRows([tmp_path / "1", tmp_path / "0"])
    parts = [stored.read(range(start, start + 7)) for start in range(0, 20, 7)]
    merged = Rows(*(np.concatenate(p) for p in zip(*parts, strict=True)))
    for name in ("feature", "code", "rank", "block", "n_sources", "top_source", "matched"):
        assert np.array_equal(whole.rows[name], merged.rows[name]), name
    assert np.array_equal(whole.sources[["head", "source"]], merged.sources[["head", "source"]])
    np.testing.assert_allclose(whole.by_head, merged.by_head, atol=1e-5)
    np.testing.assert_allclose(whole.rows["pre"], merged.rows["pre"], atol=1e-5)
    data = bytearray((tmp_path / "0" / "sources.npy").read_bytes())
    data[-1] ^= 4
    (tmp_path / "0" / "sources.npy").write_bytes(bytes(data))
    with pytest.raises(StoreError, match="sources"):
        StoredRows([tmp_path / "0"])


def test_folded_values_hold_no_value_bias(store):
    """The raw pre-activation's heads differ from the folded ones by the constant through W_enc."""
    sae, kept = random_sae("L01.z", seed=3), kept_examples(20, 3)
    raw, folded = (attribute(tiny_model(p), [sae], [kept], store)[0] for p in ("raw", "folded"))
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
    (found,) = attribute(tiny_model(), [sae], [kept], store)
    z = capture(tiny_model(), torch.from_numpy(TOKENS), [sae.info.site])[0][sae.info.site].double().numpy()
    for i, (f, b, p) in enumerate(zip(kept.feature, kept.block, kept.position, strict=True)):
        pre, parts = preactivation_by_hand(sae, z[b, p], f)
        assert found.rows["pre"][i] == pytest.approx(pre, abs=2e-5)
        assert found.by_head[i].sum() + sae.bias_term[f].item() == pytest.approx(pre, abs=2e-5)
        np.testing.assert_allclose(found.by_head[i], parts, atol=2e-5)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_attn_out_is_exact_with_biases_and_normalised_inputs(store, normalisation):
    sae = random_sae("L01.attn_out", seed=8, normalize_activations=normalisation)
    kept = kept_examples(20, 5)
    (found,) = attribute(tiny_model(), [sae], [kept], store)
    x = capture(tiny_model(), torch.from_numpy(TOKENS), [sae.info.site])[0][sae.info.site].double().numpy()
    for i, (f, b, p) in enumerate(zip(kept.feature, kept.block, kept.position, strict=True)):
        pre, _ = preactivation_by_hand(sae, x[b, p], f)
        assert found.rows["pre"][i] == pytest.approx(pre, abs=2e-5)
        assert found.by_head[i].sum() + found.rows["bias"][i] == pytest.approx(pre, abs=2e-5)


def test_no_examples(store):
    nothing = Kept(*(np.empty(0, np.int64) for _ in range(5)))
    (found,) = attribute(tiny_model(), [random_sae("L00.z")], [nothing], store)
    assert found.by_head.shape == (0, N_HEADS)
    columns = columns_of(found)
    assert len(columns["by_head"]) == len(columns["sources"]) == 0


def test_columns_hold_each_examples_own_sources(attributed):
    _, kept, found, _ = attributed[0][0]
    columns = columns_of(found)
    assert columns["example_group"].tolist() == GROUPS[kept.code].tolist()
    assert columns["sources"].type == SOURCES
    assert columns["by_head"].to_pylist() == found.by_head.tolist()
    for i, sources in enumerate(columns["sources"].to_pylist()):
        expected = [tuple(row) for row in sources_of(found, i).tolist()]
        assert [tuple(s.values()) for s in sources] == expected


# ---------------------------------------------------------------- where the evidence lies


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 2), min_size=3, max_size=9), st.data())
def test_matched_prefix_by_comparing_stretches(text, data):
    tokens = np.array([0, *text])
    p = data.draw(st.integers(1, len(tokens) - 1))
    s = data.draw(st.integers(-1, p))
    expected = 0
    if 2 <= s < p:
        for n in range(1, s):
            if tokens[s - n : s].tolist() == tokens[p - n + 1 : p + 1].tolist():
                expected = n
    (found,) = matched_prefix(tokens, np.array([p]), np.array([s]))
    assert found == expected


def sums_by_loop(tokens, position, dense) -> dict[str, np.ndarray]:
    """Positive DFA of one example by kind of source, [heads], and what distances take."""
    positive = np.maximum(dense, 0).astype(np.float64)
    p, kinds = position, {}
    for s in range(p + 1):
        here = {
            "bos": s == 0,
            "current": s == p,
            "previous": s == p - 1 and s > 0,
            "same_token": 0 < s < p and tokens[s] == tokens[p],
            "after_match": 2 <= s < p and tokens[s - 1] == tokens[p],
            "local": s > 0 and 1 <= p - s <= 8,
            "long_range": s > 0 and p - s > 32,
            "not_bos": s > 0,
            "all": True,
        }
        for name, yes in here.items():
            kinds[name] = kinds.get(name, 0) + yes * positive[:, s]
        kinds["weighted"] = kinds.get("weighted", 0) + (s > 0) * (p - s) * positive[:, s]
    return kinds


def random_top_examples(seed: int, n_blocks: int, context: int = 50, bos: float = 1):
    """(features, positions, tokens, dense DFA) of some top examples in each block; BOS ``bos`` times."""
    rng = np.random.default_rng(seed)
    for _ in range(n_blocks):
        tokens = np.concatenate([[0], rng.integers(1, 6, context - 1)])
        n = int(rng.integers(1, 5))
        position = rng.integers(1, context, n)
        dense = rng.standard_normal((n, 2, context)).astype(np.float32)
        dense *= (np.arange(context) <= position[:, None])[:, None]
        dense[:, :, 0] *= bos
        yield rng.integers(0, 3, n), position, tokens, dense


def sums_of(parts) -> DFASums:
    sums = DFASums(4, 2)
    for feature, position, tokens, dense in parts:
        matched = matched_prefix(tokens, position, dense.max(1).argmax(1))
        sums.update(feature, position, tokens, dense, dense.sum(2), matched)
    return sums


def test_examples_whose_heads_cancel_have_no_share():
    """2 + 2 and 2.5 - 0.5 count; -0.5 - 0.5, which the bias makes fire, and 4 - 3 = 1 of 7 do not."""
    dense = np.zeros((4, 2, 3), np.float32)
    dense[:, :, 1] = [[2, 2], [2.5, -0.5], [-0.5, -0.5], [4, -3]]
    sums = DFASums(2, 2)
    place, tokens = np.full(4, 2), np.array([0, 1, 2])
    sums.update(np.array([0, 0, 0, 0]), place, tokens, dense, dense.sum(2), np.zeros(4, np.int64))
    assert sums.dfa_share().tolist()[0] == [(0.5 + 1.25) / 2, (0.5 - 0.25) / 2]
    assert np.isnan(sums.dfa_share()[1]).all()
    assert sums.summary()["n"].tolist() == [4]


@pytest.mark.parametrize("bos", [1, 1e7])
def test_sums_by_head_distance_and_kind_against_a_loop(bos):
    """What is not BOS is told from it, however little it is beside BOS."""
    parts = list(random_top_examples(0, 12, bos=bos))
    sums, by_feature = sums_of(parts), {}
    for features, positions, tokens, dense in parts:
        for f, p, d in zip(features, positions, dense, strict=True):
            by_feature.setdefault(int(f), []).append((sums_by_loop(tokens, p, d), p, d))
    summary, heads, bins = sums.summary(), sums.head_columns(), sums.distances()
    assert summary["feature"].tolist() == sorted(by_feature)
    for row, f in enumerate(sorted(by_feature)):
        found = by_feature[f]
        assert summary["n"][row] == len(found)
        total = {name: sum(kinds[name] for kinds, _, _ in found) for name in found[0][0]}
        for name in ("bos", "current", "previous", "same_token", "after_match", "local", "long_range"):
            assert summary[name][row] == pytest.approx(total[name].sum() / total["all"].sum(), rel=1e-5)
            if name not in ("local", "long_range"):
                np.testing.assert_allclose(
                    heads[f"dfa_{name}"].reshape(4, 2)[f], total[name] / total["all"], rtol=1e-5
                )
        np.testing.assert_allclose(
            heads["dfa_distance"].reshape(4, 2)[f], total["weighted"] / total["not_bos"], rtol=1e-5
        )
        far = total["weighted"].sum() / total["not_bos"].sum()
        assert summary["distance"][row] == pytest.approx(far, rel=1e-5)
        parts = [d.sum(1) for _, _, d in found]
        shares = [d / d.sum() for d in parts if 5 * d.sum() >= np.abs(d).sum()]
        share = np.mean(shares, axis=0) if shares else np.full(2, np.nan)
        np.testing.assert_allclose(sums.dfa_share()[f], share, rtol=2e-4)
        mine = bins["feature"] == f
        assert bins["share"][mine].sum() == pytest.approx(1)
        for low, high, part, less in zip(
            *(bins[c][mine] for c in ("low", "high", "share", "negative")), strict=True
        ):
            expected = np.zeros(2)
            for _, p, d in found:
                for s in range(p + 1):
                    if (s == 0 and low == -1) or (s > 0 and low <= p - s <= high and low >= 0):
                        expected += [np.maximum(d[:, s], 0).sum(), np.maximum(-d[:, s], 0).sum()]
            np.testing.assert_allclose([part, less], expected / total["all"].sum(), rtol=1e-4, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 50), st.integers(1, 6), st.integers(0, 6))
def test_sums_merge(seed, n, cut):
    parts = list(random_top_examples(seed, n))
    one, other, whole = sums_of(parts[:cut]), sums_of(parts[cut:]), sums_of(parts)
    for merged in (one.merge(other), other.merge(one)):
        for name, expected in vars(whole).items():
            np.testing.assert_allclose(vars(merged)[name], expected, rtol=1e-12, atol=1e-12)


def test_sums_on_disk(tmp_path):
    sums = sums_of(random_top_examples(1, 4))
    sums.save(tmp_path / "s.npz")
    for name, expected in vars(sums).items():
        assert np.array_equal(vars(DFASums.load(tmp_path / "s.npz"))[name], expected)
    (tmp_path / "s.npz").write_bytes(b"PK")
    with pytest.raises(StoreError, match=r"s\.npz"):
        DFASums.load(tmp_path / "s.npz")
