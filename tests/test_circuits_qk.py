"""QK paths through features: entries against single parts, their sum against the heads' own numbers."""

import pytest
import torch

from atlas.circuits.ioi_features import at_s2
from atlas.circuits.qk import BIAS, ERROR, Route, explained_row, pair_rows, scores
from atlas.errors import ConfigError
from atlas.lm.hooks import capture, logits_with
from atlas.sites import Site
from tests import circuit_world as world

ROUTE = Route((1, 2), (2, 0))


def norm(runs, layer, x, scale):
    ln = runs.model.bridge.blocks[layer].ln1
    return (x - x.mean()) / scale * ln.weight.double(), ln.bias.double()


def query_of(runs, x, row):
    """What a vector at S2 adds to the mover's query, step by step for one prompt."""
    at, blocks = runs.batch.at, runs.model.bridge.blocks
    scale = runs.raw["blocks.1.ln1.hook_scale"][row, at["S2"][row]].double()
    moved = norm(runs, 1, x, scale)[0] @ blocks[1].attn.W_V[2].double() @ blocks[1].attn.W_O[2].double()
    moved = moved * runs.raw["blocks.1.attn.hook_pattern"][row, 2, at["end"][row], at["S2"][row]].double()
    scale = runs.raw["blocks.2.ln1.hook_scale"][row, at["end"][row]].double()
    return norm(runs, 2, moved, scale)[0] @ blocks[2].attn.W_Q[0].double()


@pytest.mark.parametrize("processing", ["raw", "folded"])
@pytest.mark.parametrize("how", ["none", "layer_norm"])
def test_entries_against_single_parts_and_their_sum_against_the_model(processing, how):
    runs = world.runs(8, processing)
    more = {"processing": processing, "normalize_activations": how}
    attention = world.random_sae("L00.z", seed=1, **more)
    residual = world.random_sae("L02.resid_pre", seed=9, k=6, **more)
    found = scores(runs, attention, residual, ROUTE)
    assert found.query[-2:] == found.key[-2:] == [ERROR, BIAS]
    at, d_head = runs.batch.at, runs.model.shape.d_head
    W_O = runs.model.W_O(0).flatten(0, 1).double()
    seen = at_s2(runs, attention)
    for row in (0, 5):
        # The sum: the whole attention output's path to the query, times the key that the model has.
        q = query_of(runs, runs.take(Site("attn_out", 0), "S2")[row].double(), row)
        k = runs.raw["blocks.2.attn.hook_k"][row, at["name2"][row], 0].double()
        assert found.entries[row].sum().item() == pytest.approx(float(q @ k) / d_head**0.5, abs=1e-6)
        # One entry: one feature on either side.
        x = runs.take(Site("resid_pre", 2), "name2")[row]
        acts = residual.encode(x[None])[0].double()
        i = next(n for n, f in enumerate(found.query[:-2]) if seen.acts[row, f] > 0)
        j = next(n for n, f in enumerate(found.key[:-2]) if acts[f] > 0)
        part = seen.part(found.query[i])[row].double() @ W_O
        back = 1.0 if how == "none" else residual.scale(x[None]).back.item()
        scale = runs.raw["blocks.2.ln1.hook_scale"][row, at["name2"][row]].double()
        key = acts[found.key[j]] * back * residual.W_dec[found.key[j]].double()
        key = norm(runs, 2, key, scale)[0] @ runs.model.bridge.blocks[2].attn.W_K[0].double()
        expected = float(query_of(runs, part, row) @ key) / d_head**0.5
        assert found.entries[row, i, j].item() == pytest.approx(expected, abs=1e-6)


def test_the_path_is_what_the_score_loses_with_frozen_scales():
    """Nudging what the via head moves from S2 changes q by the path's q, the norm's scale aside."""
    runs = world.runs(8)
    z, resid = world.saes()
    found = scores(runs, z[0], resid[2], ROUTE)
    at, row = runs.batch.at, torch.arange(8)
    q = torch.stack([query_of(runs, runs.take(Site("attn_out", 0), "S2")[i].double(), i) for i in range(8)])
    blocks = runs.model.bridge.blocks
    scale = runs.raw["blocks.1.ln1.hook_scale"][row, at["S2"]].double()
    x = runs.take(Site("attn_out", 0), "S2").double()
    moved = (x - x.mean(1, keepdim=True)) / scale * blocks[1].ln1.weight.double()
    moved = moved @ blocks[1].attn.W_V[2].double() @ blocks[1].attn.W_O[2].double()
    moved = moved * runs.raw["blocks.1.attn.hook_pattern"][row, 2, at["end"], at["S2"]].double()[:, None]
    nudge = 1e-3

    def edit(stream):
        stream = stream.clone()
        stream[row, at["end"]] += (nudge * (moved - moved.mean(1, keepdim=True))).float()
        return stream

    kept = {}

    def keep(values):
        kept["q"] = values
        return values

    logits_with(runs.model, runs.batch.tokens, {Site("resid_pre", 2): edit, Site("q", 2, 0): keep})
    before = capture(runs.model, runs.batch.tokens, [Site("q", 2, 0)])[0][Site("q", 2, 0)]
    change = (kept["q"] - before)[row, at["end"]].double() / nudge
    # The scale moves with the stream: its share is along the normalised stream's own query.
    stream = runs.take(Site("resid_pre", 2), "end").double()
    centred, delta = stream - stream.mean(1, keepdim=True), moved - moved.mean(1, keepdim=True)
    size = runs.raw["blocks.2.ln1.hook_scale"][row, at["end"]].double()
    shrink = (centred * delta).mean(1, keepdim=True) / size**2
    own = centred / size * blocks[2].ln1.weight.double() @ blocks[2].attn.W_Q[0].double()
    torch.testing.assert_close(change, q - shrink * own, rtol=2e-2, atol=2e-3)
    assert found.entries.sum((1, 2)).abs().max() > 1e-3


def test_pairs_and_shares_of_variance_by_hand():
    from atlas.circuits.qk import Scores

    entries = torch.zeros(4, 3, 3, dtype=torch.float64)
    entries[:, 0, 0] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    entries[:, 1, 0] = torch.tensor([0.5, 0.5, -0.5, -0.5])  # the error term of the query side
    entries[:, 2, 2] = 7.0  # constants
    found = Scores(entries, [11, ERROR, BIAS], [5, ERROR, BIAS])
    rows = pair_rows(found, torch.arange(4), 3)
    assert [(r["feature"], r["key_feature"], r["mean"], r["mean_abs"]) for r in rows] == [
        (BIAS, BIAS, 7.0, 7.0), (11, 5, 0.0, 1.5), (ERROR, 5, 0.0, 0.5),
    ]  # fmt: skip
    told = explained_row(found, torch.arange(4))
    assert told["score"] == pytest.approx(7.0)
    assert told["score_features"] == pytest.approx(0.0)
    total = torch.tensor([1.5, -0.5, 1.5, -2.5])
    variance = total.var(correction=0).item()
    assert told["pairs_explain"] == pytest.approx(1 - 0.25 / variance)
    assert told["errors_explain"] == pytest.approx(1 - 2.5 / variance)


def test_paths_that_are_none_are_refused():
    runs = world.runs(8)
    z, resid = world.saes()
    for attention, residual, route in [
        (z[1], resid[2], ROUTE), (z[0], resid[1], ROUTE), (z[0], resid[2], Route((2, 0), (2, 1))),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match="is not a path"):
            scores(runs, attention, residual, route)
