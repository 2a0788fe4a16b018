"""The scan against traces of the same features, and its sums by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from atlas.analysis.text import ArrayBlocks
from atlas.circuits.nodes import Bounds
from atlas.circuits.scan import PathScan, Scanned, scan
from atlas.circuits.trace import Tracer
from atlas.errors import ConfigError
from tests import circuit_world as world
from tests.builds import Quiet
from tests.tiny import random_tokens

TEXT = random_tokens(3, 9, seed=2)
EVERY = Scanned(positions=8, features=20, least_share=1e-6)
SOME = Scanned(positions=3, features=5, least_share=1e-6)


def tracer(kind="z", how="none"):
    more = {"normalize_activations": how}
    return Tracer(world.model(), [world.random_sae(f"L0{n}.{kind}", seed=n + 1, **more) for n in range(3)])


def shares_of(one, tokens, name, feature, position):
    """Shares of upstream attention features from a full trace: (source, SAE, feature) -> share."""
    bounds = Bounds(breadth=100, depth=1, nodes=10_000, residual=False)
    trace = one.trace(tokens, name, feature, position, bounds)
    root, out = trace.nodes[trace.root], {}
    for node in trace.nodes.values():
        if node.kind == "attn":
            for term in node.terms:
                if term.kind == "feature":
                    out[node.position, term.sae, term.feature] = term.weight / root.value
    return out


@pytest.mark.parametrize(("kind", "how"), [("z", "none"), ("attn_out", "constant_norm_rescale")])
def test_paths_are_the_terms_of_traces(kind, how):
    one = tracer(kind, how)
    work = PathScan(one, EVERY)
    work.block(torch.from_numpy(TEXT[0]), 0)
    rows = {(r["sae"], r["feature"], r["up_sae"], r["up_feature"]): r for r in work.rows()}
    name, tokens = one.attention[2].sae.info.name, torch.from_numpy(TEXT[0])
    feature, position, _ = one.strongest(tokens, name, 1)[0]
    sums: dict = {}
    acts = one.look(tokens).attention(2).acts
    for at in range(1, 9):
        if acts[at, feature] > 0:
            for (_, up, number), share in shares_of(one, tokens, name, feature, at).items():
                if share >= EVERY.least_share:
                    sums.setdefault((name, feature, up, number), []).append(share)
    assert len(sums) > 10
    for key, found in sums.items():
        assert rows[key]["n"] == len(found)
        assert rows[key]["mean_share"] == pytest.approx(np.mean(found), rel=1e-3, abs=1e-6)
        assert rows[key]["max_share"] == pytest.approx(max(found), rel=1e-3, abs=1e-6)
        assert rows[key]["n_seen"] == int((acts[1:, feature] > 0).sum())
    best = max(sums, key=lambda key: max(sums[key]))
    where = rows[best]
    told = shares_of(one, tokens, name, feature, where["position"])
    assert told[where["source"], best[2], best[3]] == pytest.approx(where["max_share"], rel=1e-3)
    assert {key for key in rows if key[:2] == (name, feature)} == set(sums)
    assert position in range(9)


def test_blocks_add_up_and_the_order_is_stated():
    one = tracer()
    together = scan(one, ArrayBlocks(TEXT), 3, SOME, Quiet())
    parts = []
    for number in range(3):
        work = PathScan(one, SOME)
        work.block(torch.from_numpy(TEXT[number]), number)
        parts.append({(r["sae"], r["feature"], r["up_sae"], r["up_feature"]): r for r in work.rows()})
    for row in together:
        key = (row["sae"], row["feature"], row["up_sae"], row["up_feature"])
        own = [part[key] for part in parts if key in part]
        assert row["n"] == sum(o["n"] for o in own)
        assert row["max_share"] == max(o["max_share"] for o in own)
        assert row["mean_share"] * row["n"] == pytest.approx(sum(o["mean_share"] * o["n"] for o in own))
    totals = [row["mean_share"] * row["n"] for row in together]
    assert all(a >= b - 1e-9 for a, b in pairwise(totals))
    assert scan(one, ArrayBlocks(TEXT), 3, SOME, Quiet()) == together


def test_what_is_looked_at_is_bounded_and_seeded():
    one = tracer()
    few = PathScan(one, Scanned(positions=2, features=1, least_share=1e-6))
    few.block(torch.from_numpy(TEXT[0]), 0)
    assert sum(few.seen.values()) <= 2 * 2
    strong = scan(one, ArrayBlocks(TEXT), 1, Scanned(positions=8, features=20, least_share=0.2), Quiet())
    assert strong
    assert min(row["mean_share"] for row in strong) >= 0.2
    assert len(few.rows(most=1)) == 1
    with pytest.raises(ConfigError, match=r"least_share 0\.0 is not allowed"):
        Scanned(least_share=0.0)
