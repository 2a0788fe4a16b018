"""Products of query features with key features and with positions, against loops in float64."""

import numpy as np
import pytest
import torch

from atlas.analysis import qk
from atlas.analysis.qk import position_products, qk_partners, qk_products
from atlas.configs import ModelConfig
from atlas.errors import SAEError
from atlas.lm.load import load_model

from .tiny import CPU, D_HEAD, D_MODEL, N_CTX, model_folder, random_sae, rotary_folder, tiny_model


def side(name: str, d_sae: int, seed: int = 0, **known):
    return random_sae(name, d_in=D_HEAD, d_sae=d_sae, seed=seed, **known)


def product(one, other) -> float:
    return sum(float(a) * float(b) for a, b in zip(one, other, strict=True))


def best(mine, theirs, n: int = 10) -> list[tuple[int, int, int, float]]:
    """(feature, rank, other, product), largest first, ties to the smaller feature of the other side."""
    rows = []
    for f, row in enumerate(mine.decoder_directions.tolist()):
        others = sorted((-product(row, o), g) for g, o in enumerate(theirs.decoder_directions.tolist()))
        rows += [(f, r, g, -p) for r, (p, g) in enumerate(others[:n])]
    return rows


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("width", [3, 16])
def test_partners_in_both_directions(rescaled, width):
    q = side("L00.H01.q", 13, seed=1, rescale_acts_by_decoder_norm=rescaled)
    k = side("L00.H01.k", width, seed=2)
    for mine, theirs in ((q, k), (k, q)):
        rows, expected = qk_partners(mine, theirs), best(mine, theirs)
        keys = list(zip(*(rows[c].tolist() for c in ("feature", "rank", "other")), strict=True))
        assert keys == [row[:3] for row in expected]
        np.testing.assert_allclose(rows["product"], [row[3] for row in expected], atol=1e-6)


def test_ties_go_to_the_smaller_feature_and_chunks_change_nothing(monkeypatch):
    steps = torch.Generator().manual_seed(3)
    q, k = side("L00.H01.q", 13), side("L00.H01.k", 40)
    q, k = (
        s.with_tensors({"W_dec": torch.randint(-1, 2, s.W_dec.shape, generator=steps).float()})
        for s in (q, k)
    )
    expected = best(q, k)
    for entries in (qk._ENTRIES, 100, 1):
        monkeypatch.setattr(qk, "_ENTRIES", entries)
        rows = qk_partners(q, k)
        assert list(zip(*(column.tolist() for column in rows.values()), strict=True)) == expected


def test_every_product_of_a_pair_that_is_small_enough(monkeypatch):
    q, k = side("L01.H02.q", 5, seed=1, rescale_acts_by_decoder_norm=True), side("L01.H02.k", 8, seed=2)
    rows = qk_products(q, k)
    assert rows["feature"].tolist() == list(range(5))
    expected = [[product(a, b) for b in k.decoder_directions.tolist()] for a in q.decoder_directions.tolist()]
    np.testing.assert_allclose(rows["products"].to_pylist(), expected, atol=1e-6)
    monkeypatch.setattr(qk, "MOST_PRODUCTS", 40)
    assert len(qk_products(q, k)["products"]) == 5
    monkeypatch.setattr(qk, "MOST_PRODUCTS", 39)
    rows = qk_products(q, k)
    assert (len(rows["feature"]), len(rows["products"])) == (0, 0)


@pytest.mark.parametrize("other", ["L00.H01.q", "L00.H02.k", "L01.H01.k", "L00.H01.v", "L00.H01.z"])
def test_two_that_are_not_the_sides_of_one_head(other):
    q, wrong = side("L00.H01.q", 5), side(other, 5)
    with pytest.raises(SAEError, match=f"are on L00.H01.q and {other}; they must be the q and the k"):
        qk_partners(q, wrong)
    with pytest.raises(SAEError, match="they must be the q and the k"):
        qk_products(q, wrong)
    if other[-1] in "vz":
        with pytest.raises(SAEError, match="they must be the q and the k"):
            qk_partners(wrong, q)


def test_rows_of_products_are_query_features():
    with pytest.raises(SAEError, match="is not on q"):
        qk_products(side("L00.H01.k", 5), side("L00.H01.q", 5))


@pytest.fixture(scope="module")
def hf():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float64)


@pytest.mark.parametrize("processing", ["raw", "folded"])
@pytest.mark.parametrize("name", ["L00.H01.q", "L01.H02.k"])
@pytest.mark.parametrize("context", [1, 10, N_CTX])
def test_products_with_positions(hf, processing, name, context):
    sae = side(name, 6, rescale_acts_by_decoder_norm=True)
    site, layer = sae.info.site, hf.transformer.h[sae.info.site.layer]
    start = (D_MODEL if site.kind == "k" else 0) + site.head * D_HEAD
    W = layer.attn.c_attn.weight.detach().numpy()[:, start : start + D_HEAD]
    W_pos = hf.transformer.wpe.weight.detach().numpy()[:context]
    if processing == "folded":
        W = np.diag(layer.ln_1.weight.detach().numpy()) @ W
        W = W - W.mean(0)
    rows = position_products(tiny_model(processing), sae, context)
    assert rows["feature"].tolist() == list(range(6))
    centred = W_pos - W_pos.mean(0)
    for f, row in enumerate(sae.decoder_directions.tolist()):
        for column, embeddings in (("products", W_pos), ("centred", centred)):
            expected = [product(row, W.T @ embedding) for embedding in embeddings]
            np.testing.assert_allclose(rows[column][f].as_py(), expected, atol=1e-5)


def test_a_model_with_rotary_positions_has_no_products_with_them():
    model = load_model(ModelConfig(str(rotary_folder())), CPU)
    assert position_products(model, side("L00.H01.q", 6), 10) == {}


@pytest.mark.parametrize("context", [0, N_CTX + 1])
def test_positions_that_the_model_lacks(context):
    with pytest.raises(SAEError, match=rf"context {context} is not allowed; .* 1 to {N_CTX}"):
        position_products(tiny_model(), side("L00.H01.q", 6), context)


def test_products_with_positions_of_a_site_that_does_not_look():
    with pytest.raises(SAEError, match="is on v; products with positions are for q and k"):
        position_products(tiny_model(), side("L00.H01.v", 6), 10)
