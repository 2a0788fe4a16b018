"""Neighbours against cosines of every pair in float64, from the Hugging Face weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.analysis import neighbours as module
from atlas.analysis.neighbours import Nearest, neighbours
from atlas.errors import SAEError

from .tiny import D_HEAD, D_MODEL, model_folder, random_sae, tiny_model

SITES = (
    "L00.z", "L01.z", "L01.z", "L01.H02.z", "L01.H02.v", "L00.H01.q", "L00.H01.q", "L00.H01.k",
    "L00.resid_pre", "L01.resid_pre", "L00.attn_out", "L01.mlp_out",
)  # fmt: skip


def the_saes():
    """SAEs of different widths on every kind of site; features 1 and 4 have no decoder or no encoder."""
    saes = []
    for number, site in enumerate(SITES):
        d_in = D_HEAD if "H" in site else D_MODEL
        sae = random_sae(
            site, d_in=d_in, d_sae=6 + number, seed=number, rescale_acts_by_decoder_norm=number == 1
        )
        W_dec, W_enc = sae.W_dec.clone(), sae.W_enc.clone()
        W_dec[1], W_enc[:, 4] = 0, 0
        saes.append(sae.with_tensors({"W_dec": W_dec, "W_enc": W_enc}))
    return saes


@pytest.fixture(scope="module")
def W_O():
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float64)
    return [layer.attn.c_proj.weight.detach().numpy() for layer in hf.transformer.h]


def space(sae, direction: str, scope: str, W_O) -> tuple[str, np.ndarray]:
    """The name of the space in which a direction is compared, and the directions in it."""
    site = sae.info.site
    if direction == "encoder":
        name = "stream" if site.kind == "resid_pre" else site.name
        W_enc = sae.W_enc.T.double().numpy()
        if sae.info.rescale_acts_by_decoder_norm:  # a feature without a decoder row then has no encoder
            W_enc = W_enc * np.linalg.norm(sae.W_dec.double().numpy(), axis=1, keepdims=True)
        return name, W_enc
    rows = sae.W_dec.double().numpy()
    if scope == "within" or site.kind in ("q", "k"):
        return site.name, rows
    if site.kind in ("z", "v"):
        head = slice(None) if site.head is None else slice(site.head * D_HEAD, (site.head + 1) * D_HEAD)
        rows = rows @ W_O[site.layer][head]
    return "stream", rows


def expected_rows(saes, item: int, W_O) -> dict[tuple, list[tuple[str, int, float]]]:
    found = {}
    for direction in ("decoder", "encoder"):
        for scope in ("within", "across"):
            here, mine = space(saes[item], direction, scope, W_O)
            for f, row in enumerate(mine):
                near = []
                for number, other in enumerate(saes):
                    there, theirs = space(other, direction, scope, W_O)
                    if there != here or (number == item) != (scope == "within"):
                        continue
                    for g, against in enumerate(theirs):
                        if (number, g) == (item, f) or not row.any() or not against.any():
                            continue
                        cosine = sum(a * b for a, b in zip(row, against, strict=True))
                        cosine /= np.sqrt(sum(a * a for a in row) * sum(b * b for b in against))
                        near.append((-cosine, number, g))
                found[f, direction, scope] = [(saes[s].info.name, g, -c) for c, s, g in sorted(near)[:5]]
    return found


@pytest.mark.parametrize("processing", ["raw", "folded"])
@pytest.mark.parametrize("item", range(len(SITES)))
def test_neighbours_are_the_nearest_of_all_pairs(processing, item, W_O):
    saes = the_saes()
    rows = neighbours(tiny_model(processing), saes, item)
    found: dict[tuple, list] = {}
    for row in zip(*(rows[c].tolist() for c in ("feature", "direction", "scope", "rank")), strict=True):
        found.setdefault(row[:3], []).append(row[3])
    if processing == "folded":  # what the heads write is centred over d_model
        W_O = [w - w.mean(1, keepdims=True) for w in W_O]
    expected = {key: near for key, near in expected_rows(saes, item, W_O).items() if near}
    assert found == {key: list(range(len(near))) for key, near in expected.items()}
    flat = [near for key in found for near in expected[key]]
    assert rows["other_sae"].tolist() == [near[0] for near in flat]
    assert rows["other"].tolist() == [near[1] for near in flat]
    np.testing.assert_allclose(rows["cosine"], [near[2] for near in flat], atol=1e-6)


def test_chunks_change_nothing(monkeypatch):
    saes = the_saes()[:4]
    whole = [neighbours(tiny_model(), saes, item) for item in range(len(saes))]
    monkeypatch.setattr(module, "_ROWS", 4)
    monkeypatch.setattr(module, "_COLUMNS", 3)
    for item, before in enumerate(whole):
        after = neighbours(tiny_model(), saes, item)
        for name in ("feature", "direction", "scope", "rank", "other_sae", "other"):
            assert after[name].tolist() == before[name].tolist()
        np.testing.assert_allclose(after["cosine"], before["cosine"], atol=1e-6)


STEPS = ((1.0, 0.0), (0.0, 3.0), (-2.0, 0.0), (0.0, -1.0), (0.0, 0.0))
DIRECTIONS = st.lists(st.sampled_from(STEPS), min_size=1, max_size=9)


@settings(max_examples=100, deadline=None)
@given(DIRECTIONS, st.lists(DIRECTIONS, max_size=3), st.integers(1, 4), st.booleans())
def test_ties_go_to_the_sae_that_comes_first_and_then_to_the_smaller_feature(mine, others, n, own):
    """Cosines of these directions are -1, 0 or 1 exactly, so that nearly all of them tie."""
    near = Nearest(torch.tensor(mine), n)
    if own:
        near.show(0)
    for number, directions in enumerate(others, 1):
        near.show(number, torch.tensor(directions))
    shown = [(0, mine)] * own + list(enumerate(others, 1))
    expected = []
    for f, (x, y) in enumerate(mine):
        all_of_them = sorted(
            (-(np.sign(x) * np.sign(a) + np.sign(y) * np.sign(b)), number, g)
            for number, directions in shown
            for g, (a, b) in enumerate(directions)
            if (x or y) and (a or b) and (number, g) != (0, f)
        )
        expected += [(f, r, s, g, -c) for r, (c, s, g) in enumerate(all_of_them[:n])]
    assert list(zip(*(column.tolist() for column in near.rows()), strict=True)) == expected


def test_an_sae_alone_has_no_others():
    rows = neighbours(tiny_model(), [random_sae("L00.H01.q", d_in=D_HEAD, d_sae=1)], 0)
    assert {name: len(column) for name, column in rows.items()} == dict.fromkeys(rows, 0)
    assert list(rows) == ["feature", "direction", "scope", "rank", "other_sae", "other", "cosine"]


@pytest.mark.parametrize("item", [-1, 2])
def test_an_sae_that_is_not_there(item):
    with pytest.raises(SAEError, match=f"number {item} does not exist; allowed: 0 to 1"):
        neighbours(tiny_model(), [random_sae(), random_sae()], item)
