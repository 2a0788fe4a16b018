"""Features on a typed text: the numbers of the tables, for the same tokens."""

import numpy as np
import pytest
import torch

from atlas.analysis import own_text
from atlas.analysis.dfa import DFAPass, Kept
from atlas.analysis.dfa_rows import columns_of
from atlas.corpus.tokens import TokenStore
from atlas.errors import ConfigError, SAEError
from atlas.lm.hooks import capture
from atlas.progress import NullProgress

from .tiny import D_MODEL, N_CTX, random_sae, random_tokens, save_store, tiny_model

TOKENS = random_tokens(1, 12, seed=3)
CASES = [
    {"site": "L01.z"},
    {"site": "L00.z", "k": 4},
    {"site": "L01.z", "architecture": "gated", "normalize_activations": "layer_norm"},
    {"site": "L01.attn_out", "architecture": "jumprelu"},
    {"site": "L01.attn_out", "normalize_activations": "constant_norm_rescale"},
    {"site": "L01.H02.z", "d_in": D_MODEL // 3},
]


def table_rows(sae, feature, positions, folder):
    """The rows of the table dfa for one feature at some positions of the text."""
    n = len(positions)
    same = np.zeros(n, np.int64)
    kept = Kept(same + feature, same, np.arange(n), same, np.array(positions))
    done, store = DFAPass(tiny_model(), [sae], [kept]), TokenStore(save_store(folder, TOKENS))
    done.run(store, range(len(store)), NullProgress())
    rows = done.rows[0]
    joined = type(rows.parts[0])(*(np.concatenate(p) for p in zip(*rows.parts, strict=True))).sorted()
    columns = columns_of(joined)
    return {name: getattr(columns[name], "to_pylist", columns[name].tolist)() for name in columns
            if name != "example_group"}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_same_as_the_tables(case, tmp_path):
    sae, tokens = random_sae(**case), torch.from_numpy(TOKENS[0])
    site = sae.info.site
    x = capture(tiny_model(), tokens[None], [site])[0][site][0]
    dense = sae.encode(x)
    feature = int(dense[1:].amax(0).argmax())
    found = own_text.feature_on_text(tiny_model(), sae, tokens, feature)
    fires = dense[:, feature].nonzero()[:, 0].tolist()
    assert [p for p, _ in found["active"]] == fires
    assert [a for _, a in found["active"]] == pytest.approx(dense[fires, feature].tolist(), rel=1e-5)
    assert found["pre"] == pytest.approx(sae.preactivations(x)[:, feature].tolist(), rel=1e-5)
    positions = [one["position"] for one in found["dfa"]]
    assert set(positions) == set(fires) - {0}
    rows = table_rows(sae, feature, positions, tmp_path)
    for i, one in enumerate(found["dfa"]):
        assert one["by_head"] == pytest.approx(rows["by_head"][i], rel=1e-4, abs=1e-6)
        assert one["bias_term"] == pytest.approx(rows["bias_term"][i], rel=1e-4, abs=1e-6)
        assert one["pre_activation"] == pytest.approx(rows["pre_activation"][i], rel=1e-4, abs=1e-5)
        assert (one["top_source"], one["matched_prefix"]) == (
            rows["top_source"][i],
            rows["matched_prefix"][i],
        )
        unit, stored = rows["unit"][i], rows["sources"][i]
        assert [(h, s) for h, s, _ in one["sources"]] == [(r["head"], r["source"]) for r in stored]
        assert [v for _, _, v in one["sources"]] == pytest.approx(
            [r["weight"] * unit for r in stored], abs=0.51 * unit
        )


def test_the_strongest_features_of_each_sae():
    saes = [random_sae("L00.z", k=3), random_sae("L01.z"), random_sae("L01.mlp_out", seed=2)]
    tokens = torch.from_numpy(TOKENS[0])
    for sae, found in zip(saes, own_text.firing_features(tiny_model(), saes, tokens, 4), strict=True):
        site = sae.info.site
        acts = sae.encode(capture(tiny_model(), tokens[None], [site])[0][site][0])[1:].numpy()
        order = sorted(range(sae.d_sae), key=lambda f: (-acts[:, f].max(), f))
        expected = [f for f in order if acts[:, f].max() > 0][:4]
        assert [one["feature"] for one in found] == expected
        for one in found:
            column = acts[:, one["feature"]]
            assert one["position"] == int(column.argmax()) + 1
            assert one["activation"] == pytest.approx(float(column.max()), rel=1e-5)
            assert [p for p, _ in one["active"]] == (np.flatnonzero(column) + 1).tolist()


def test_a_feature_that_does_not_fire_shows_where_it_came_nearest():
    sae = random_sae("L01.z")
    silent = sae.with_tensors({"b_enc": sae.b_enc - 100})
    found = own_text.feature_on_text(tiny_model(), silent, torch.from_numpy(TOKENS[0]), 3)
    assert found["active"] == []
    (one,) = found["dfa"]
    assert one["position"] == int(np.argmax(found["pre"][1:])) + 1
    assert one["pre_activation"] == pytest.approx(found["pre"][one["position"]], rel=1e-4)


def test_no_dfa_where_a_site_does_not_sum_over_heads():
    found = own_text.feature_on_text(
        tiny_model(), random_sae("L01.resid_pre"), torch.from_numpy(TOKENS[0]), 0
    )
    assert found["dfa"] == []
    assert len(found["pre"]) == TOKENS.shape[1]


def test_text_becomes_bos_and_tokens():
    read = own_text.read_text(tiny_model(), "w1 w2 w3")
    assert read.tokens.tolist() == [0, 2, 3, 4]
    assert not read.cut
    assert read.texts == ["<bos>", "w1", "w2", "w3"]
    long = own_text.read_text(tiny_model(), "w5 " * 100)
    assert len(long.tokens) == N_CTX
    assert long.cut
    exact = own_text.read_text(tiny_model(), "w5 " * (N_CTX - 1))
    assert len(exact.tokens) == N_CTX
    assert not exact.cut


@pytest.mark.parametrize("text", ["", "  \n", "w1 " * 10_000])
def test_texts_that_are_refused(text):
    with pytest.raises(ConfigError, match="allowed: 1 to 20,000"):
        own_text.read_text(tiny_model(), text)


def test_unknown_feature():
    with pytest.raises(SAEError, match=r"feature 20 is not in .*allowed: 0 to 19"):
        own_text.feature_on_text(tiny_model(), random_sae("L01.z"), torch.from_numpy(TOKENS[0]), 20)


def test_where_a_feature_fires_in_blocks():
    sae, tokens = random_sae("L01.z", k=4), torch.from_numpy(random_tokens(3, 12, seed=5))
    site = sae.info.site
    x = capture(tiny_model(), tokens, [site])[0][site]
    found = own_text.feature_on_blocks(tiny_model(), sae, tokens, 7)
    assert sum(map(len, found)) > 0
    for block, active in zip(x, found, strict=True):
        dense = sae.encode(block)[:, 7]
        assert [p for p, _ in active] == [p for p in dense.nonzero()[:, 0].tolist() if p > 0]
        assert [a for _, a in active] == pytest.approx([float(dense[p]) for p, _ in active])
    with pytest.raises(SAEError, match="feature 20 is not in"):
        own_text.feature_on_blocks(tiny_model(), sae, tokens, 20)
