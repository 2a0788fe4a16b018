"""Every table that comes from weights alone, against float64 brute force: logits, neighbours, q and k."""

import numpy as np
import pytest

from tests.reference import CONTEXT, D_HEAD, D_VOCAB, N_HEADS, PROCESSINGS, SAES, SILENT
from tests.reference_release import release, same, same_ranking

FEW = 1e-6
CLOSE = 3e-5
"""Logit effects and products are sums of a few float32 products of size up to about 10."""


@pytest.fixture(scope="module", params=PROCESSINGS)
def built(request):
    return release(request.param)


@pytest.fixture(scope="module", params=range(len(SAES)), ids=lambda i: f"{SAES[i]['site']}-{i}")
def one(request, built):
    return built.evidence[request.param]


def written(one):
    """[d_sae, d_model]: what a unit of each feature adds to the residual stream; None for q and k."""
    site, W_dec = one.sae.site, one.sae.W_dec
    if site.kind in ("q", "k"):
        return None
    if site.kind != "z":
        return W_dec
    heads = range(N_HEADS) if site.head is None else [site.head]
    slices = W_dec.reshape(len(W_dec), len(heads), D_HEAD)
    return sum(slices[:, i] @ one.built.model.W_O(site.layer)[head] for i, head in enumerate(heads))


# ---------------------------------------------------------------- logits


def test_logit_moments(one):
    directions = written(one)
    for f, (row,) in one.of("features").items():
        moments = [row[f"logit_{name}"] for name in ("mean", "std", "skew", "kurtosis")]
        if directions is None:
            assert moments == [None] * 4
            continue
        effects = directions[f] @ one.built.model.unembedding
        off = effects - effects.mean()
        std = np.sqrt((off**2).mean())
        same(moments[:2], [effects.mean(), std], (one.name, f), rtol=1e-5, atol=1e-6)
        expected = [(off**n).mean() / std**n if std > 0 else None for n in (3, 4)]
        for value, wanted in zip(moments[2:], expected, strict=True):
            same(value, wanted, (one.name, f), rtol=1e-4, atol=1e-4)


def ends(rows, effects, n, where):
    """Promoted and suppressed tokens among some rows."""
    for sign in (1, -1):
        found = [row for row in rows if row["sign"] == sign]
        assert [row["rank"] for row in found] == list(range(n)), where
        scores = {token: sign * value for token, value in enumerate(effects.tolist())}
        same_ranking([(row["token"], sign * row["value"]) for row in found], scores, n, where, CLOSE)


def test_logit_effects(one):
    directions = written(one)
    if directions is None:
        assert not one.of("logit_effects")
        return
    assert sorted(one.of("logit_effects")) == list(range(one.d_sae))
    for f, rows in one.of("logit_effects").items():
        ends(rows, directions[f] @ one.built.model.unembedding, 20, (one.name, f))
    if np.linalg.norm(directions[SILENT]) == 0:
        tokens = [(row["sign"], row["token"]) for row in one.of("logit_effects")[SILENT]]
        assert tokens == [(sign, token) for sign in (-1, 1) for token in range(20)], "ties: smaller token"


def test_logit_histogram(one):
    directions = written(one)
    assert len(one.of("logit_histogram")) == (0 if directions is None else one.d_sae)
    for f, (row,) in one.of("logit_histogram").items():
        where, effects = (one.name, f), directions[f] @ one.built.model.unembedding
        same(row["low"], effects.min(), where, rtol=1e-5, atol=CLOSE)
        same(row["high"], effects.max(), where, rtol=1e-5, atol=CLOSE)
        assert len(row["n"]) == 40, where
        assert sum(row["n"]) == D_VOCAB, where
        below = np.cumsum(row["n"])
        for i in range(1, 40):
            edge = effects.min() + (effects.max() - effects.min()) * i / 40
            least, most = (effects < edge - CLOSE).sum(), (effects < edge + CLOSE).sum()
            if effects.max() > effects.min():
                assert least <= below[i - 1] <= most, (where, i)
        if effects.max() == effects.min():
            assert row["n"] == [D_VOCAB] + [0] * 39, where


def test_head_logit_effects(one):
    found = one.of("head_logit_effects")
    if not one.sae.whole_z:
        assert not found
        return
    model = one.built.model
    for f in range(one.d_sae):
        slices = one.sae.W_dec[f].reshape(N_HEADS, D_HEAD)
        norms = np.linalg.norm(slices, axis=1)
        strongest = sorted(sorted(range(N_HEADS), key=lambda h: (-norms[h], h))[:2])
        assert sorted({row["head"] for row in found[f]}) == strongest, (one.name, f)
        for head in strongest:
            effects = slices[head] @ model.W_O(one.sae.site.layer)[head] @ model.unembedding
            rows = [row for row in found[f] if row["head"] == head]
            ends(rows, effects, 5, (one.name, f, head))


# ---------------------------------------------------------------- neighbours


def spaces(one, other, direction, scope):
    """The directions of two SAEs that can be compared, or None."""
    mine, theirs = one.sae, other.sae
    name = {"decoder": "W_dec", "encoder": "W_enc"}[direction]
    own = [sae.W_dec if name == "W_dec" else sae.W_enc.T for sae in (mine, theirs)]
    if scope == "within":
        return own
    if direction == "encoder":
        both_stream = mine.site.kind == theirs.site.kind == "resid_pre"
        return own if mine.site == theirs.site or both_stream else None
    if {mine.site.kind, theirs.site.kind} & {"q", "k"}:
        return own if mine.site == theirs.site else None
    return [written(one), written(other)]


@pytest.mark.parametrize("direction", ["decoder", "encoder"])
@pytest.mark.parametrize("scope", ["within", "across"])
def test_neighbours(one, direction, scope):
    others = [one] if scope == "within" else [e for e in one.built.evidence if e.name != one.name]
    cosines = [{} for _ in range(one.d_sae)]
    for other in others:
        pair = spaces(one, other, direction, scope)
        for f in range(one.d_sae if pair else 0):
            for g in range(other.d_sae):
                a, b = pair[0][f], pair[1][g]
                size = np.linalg.norm(a) * np.linalg.norm(b)
                if size > 0 and (other is not one or f != g):
                    cosines[f][other.name, g] = a @ b / size
    for f in range(one.d_sae):
        rows = [
            row for row in one.of("neighbours")[f] if (row["direction"], row["scope"]) == (direction, scope)
        ]
        found = [((row["other_sae"], row["other"]), row["cosine"]) for row in rows]
        same_ranking(found, cosines[f], 5, (one.name, f, direction, scope), 2e-6)
        assert [row["rank"] for row in rows] == list(range(len(rows)))


# ---------------------------------------------------------------- q and k


def sides(built):
    """Every SAE on q or k with each SAE of the head's other side."""
    found = [e for e in built.evidence if e.sae.site.kind in ("q", "k")]
    return [(a, b) for a in found for b in found if {a.sae.site.kind, b.sae.site.kind} == {"q", "k"}]


def test_qk_partners(built):
    rows = built.rows("qk_partners")
    assert {(row["sae"], row["other_sae"]) for row in rows} == {(a.name, b.name) for a, b in sides(built)}
    for a, b in sides(built):
        products = a.sae.W_dec @ b.sae.W_dec.T
        for f in range(a.d_sae):
            mine = [r for r in rows if (r["sae"], r["other_sae"], r["feature"]) == (a.name, b.name, f)]
            assert [row["rank"] for row in mine] == list(range(min(10, b.d_sae)))
            found = [(row["other"], row["product"]) for row in mine]
            scores = dict(enumerate(products[f].tolist()))
            same_ranking(found, scores, 10, (a.name, b.name, f), CLOSE)


def test_qk_products(built):
    rows = {(row["sae"], row["other_sae"], row["feature"]): row for row in built.rows("qk_products")}
    wanted = {
        (a.name, b.name, f): products
        for a, b in sides(built)
        if a.sae.site.kind == "q"
        for f, products in enumerate(a.sae.W_dec @ b.sae.W_dec.T)
    }
    assert rows.keys() == wanted.keys()
    for key, products in wanted.items():
        same(rows[key]["products"], products, key, atol=CLOSE)


def test_position_products(built):
    rows = {(row["sae"], row["feature"]): row for row in built.rows("position_products")}
    model, seen = built.model, 0
    for one in built.evidence:
        site = one.sae.site
        if site.kind not in ("q", "k"):
            continue
        W_pos = model.W_pos[:CONTEXT]
        for f in range(one.d_sae):
            for name, embedded in (("products", W_pos), ("centred", W_pos - W_pos.mean(0))):
                expected = embedded @ model.W_QK(site.layer, site.kind, site.head) @ one.sae.W_dec[f]
                same(rows[one.name, f][name], expected, (one.name, f, name), atol=CLOSE)
            seen += 1
    assert seen == len(rows)
