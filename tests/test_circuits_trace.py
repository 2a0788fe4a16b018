"""Recursive DFA against brute force: every step's terms, one by one, in plain loops over a random model."""

import json
from functools import cache

import numpy as np
import pytest
import torch

from atlas.circuits.graph import as_text, circuit_tracer
from atlas.circuits.nodes import read_trace
from atlas.circuits.passes import run_pass
from atlas.circuits.trace import Bounds, Tracer
from atlas.errors import ConfigError, SAEError, StoreError
from tests.tiny import N_HEADS, random_sae, random_tokens, tiny_model

TOKENS = torch.from_numpy(random_tokens(1, 8)[0])
WHOLE = Bounds(breadth=100, depth=5, nodes=10_000)


def saes_of(kinds=("z", "z"), processing="raw", how="none", residual=True):
    more = {"processing": processing, "normalize_activations": how}
    out = [random_sae(f"L0{n}.{kind}", seed=n + 1, **more) for n, kind in enumerate(kinds)]
    if residual:
        out += [random_sae(f"L0{n}.resid_pre", seed=5 + n, k=6, **more) for n in range(2)]
    return out


@cache
def traced(kinds=("z", "z"), processing="raw", how="none", residual=True, bounds=WHOLE):
    model, saes = tiny_model(processing), saes_of(kinds, processing, how, residual)
    tracer = Tracer(model, saes)
    feature = tracer.strongest(TOKENS, saes[1].info.name, 1)[0][0]
    return model, saes, tracer.trace(TOKENS, saes[1].info.name, feature, 6, bounds)


@pytest.mark.parametrize("processing", ["raw", "folded"])
@pytest.mark.parametrize("kinds", [("z", "z"), ("attn_out", "attn_out"), ("attn_out", "z")])
@pytest.mark.parametrize("how", ["none", "layer_norm", "constant_norm_rescale"])
def test_terms_of_every_node_sum_to_its_value(processing, kinds, how):
    for residual in (True, False):
        _, saes, trace = traced(kinds, processing, how, residual, Bounds(100, 5, 90))
        assert trace.largest_remainder < 1e-5
        assert {node.kind for node in trace.nodes.values()} >= {"feature", "source", "attn"}
        for node in trace.nodes.values():
            assert node.n_rest == 0, "nothing was left out"
            assert sum(t.weight for t in node.terms) == pytest.approx(node.value, abs=1e-5)
            for term in node.terms:
                if term.node is not None and term.kind in ("source", "attn"):
                    assert trace.nodes[term.node].value == pytest.approx(term.weight, abs=1e-5)
        levels = {node.depth for node in trace.nodes.values() if node.kind == "feature"}
        assert levels == {0, 1}
        root = trace.nodes[trace.root]
        x = run_pass(tiny_model(processing), TOKENS)
        site = x.z if kinds[1] == "z" else x.attn_out
        pre = saes[1].preactivations(site[1][6:7].float())[0, root.feature]
        assert root.value == pytest.approx(pre.item(), abs=1e-6)


def test_sources_against_loops_over_heads_and_positions():
    model, saes, trace = traced()
    one, root = run_pass(model, TOKENS), trace.nodes[trace.root]
    W = saes[1].W_enc[:, root.feature].double().reshape(N_HEADS, -1)
    for term in root.terms:
        if term.kind != "source":
            continue
        for head in range(N_HEADS):
            weight = float(one.pattern[1][head, 6, term.position])
            expected = weight * float(one.v[1][term.position, head] @ W[head])
            assert term.by_head[head] == pytest.approx(expected, abs=1e-7)
    assert {t.position for t in root.terms if t.kind == "source"} == set(range(7))
    assert np.allclose(root.by_position, [t.weight for t in sorted(
        (t for t in root.terms if t.kind == "source"), key=lambda t: t.position)])  # fmt: skip


def test_residual_features_against_values_run_again():
    """A residual feature's term is what taking it out changes, the norm's scale held."""
    model, saes, trace = traced()
    one, root = run_pass(model, TOKENS), trace.nodes[trace.root]
    W = saes[1].W_enc[:, root.feature].double().reshape(N_HEADS, -1)
    ln, attn = model.bridge.blocks[1].ln1, model.bridge.blocks[1].attn
    resid = saes[3]

    def contribution(x, source):
        normed = (x - x.mean()) / one.ln_scale[1][source] * ln.weight.double() + ln.bias.double()
        total = 0.0
        for head in range(N_HEADS):
            v = normed @ attn.W_V[head].double() + attn.b_V[head].double()
            total += float(one.pattern[1][head, 6, source]) * float(v @ W[head])
        return total

    checked = 0
    for term in root.terms:
        if term.kind != "source":
            continue
        x, source = one.resid_pre[1][term.position], term.position
        assert contribution(x, source) == pytest.approx(term.weight, abs=1e-6)
        acts = resid.encode(x[None].float())[0].double()
        for part in trace.nodes[term.node].terms:
            if part.kind != "residual":
                continue
            without = x - acts[part.feature] * resid.W_dec[part.feature].double()
            change = contribution(x, source) - contribution(without, source)
            assert part.weight == pytest.approx(change, abs=1e-6)
            checked += 1
    assert checked > 20


def test_upstream_components_and_features_against_hand():
    model, saes, trace = traced()
    one = run_pass(model, TOKENS)
    resid, first = saes[3], saes[0]
    checked = 0
    for node in trace.nodes.values():
        if node.kind != "residual" or node.layer != 1:
            continue
        w, p = resid.W_enc[:, node.feature].double(), node.position
        by_kind = {t.kind: t for t in node.terms}
        assert by_kind["embed"].weight == pytest.approx(float(one.embed[p] @ w), abs=1e-9)
        assert by_kind["pos"].weight == pytest.approx(float(one.pos_embed[p] @ w), abs=1e-9)
        assert by_kind["mlp"].weight == pytest.approx(float(one.mlp_out[0][p] @ w), abs=1e-9)
        assert by_kind["bias"].weight == pytest.approx(float(resid.bias_term[node.feature]), abs=1e-6)
        z = one.z[0][p]
        acts = first.encode(z[None].float())[0].double()
        W_O = model.W_O(0).flatten(0, 1).double()
        for part in trace.nodes[by_kind["attn"].node].terms:
            if part.kind == "feature":
                write = acts[part.feature] * first.W_dec[part.feature].double() @ W_O
                assert part.weight == pytest.approx(float(write @ w), abs=1e-5)
                checked += 1
    assert checked > 20


def test_without_attention_sae_a_layer_is_split_by_heads():
    model, saes = tiny_model(), saes_of()
    tracer = Tracer(model, [saes[1]])
    trace = tracer.trace(TOKENS, saes[1].info.name, 3, 6, WHOLE)
    heads = [t for n in trace.nodes.values() if n.kind == "attn" for t in n.terms if t.kind == "head"]
    assert len(heads) == 7 * N_HEADS
    assert trace.largest_remainder < 1e-5


def test_bounds_hold_and_the_rest_is_counted():
    _, _, trace = traced(bounds=Bounds(breadth=3, depth=2, nodes=12))
    assert len(trace.nodes) == 12
    assert trace.largest_remainder < 1e-5
    for node in trace.nodes.values():
        assert len(node.terms) <= 3
        weights = [abs(t.weight) for t in node.terms]
        assert weights == sorted(weights, reverse=True)
        assert all(t.node is None or t.node in trace.nodes for t in node.terms)
    again = traced.__wrapped__(bounds=Bounds(breadth=3, depth=2, nodes=12))[2]
    assert again.to_plain() == trace.to_plain()
    shallow = traced(bounds=Bounds(breadth=100, depth=1, nodes=10_000))[2]
    assert {n.depth for n in shallow.nodes.values()} == {0}


def test_json_comes_back_and_foreign_json_is_refused():
    _, _, trace = traced(bounds=Bounds(4, 3, 60))
    plain = json.loads(json.dumps(trace.to_plain()))
    assert read_trace(plain).to_plain() == trace.to_plain()
    with pytest.raises(StoreError, match="'other' is not known"):
        read_trace(plain | {"format": "other"})
    with pytest.raises(StoreError, match="not a trace"):
        read_trace([1])
    with pytest.raises(StoreError, match="root 'X' is not among"):
        read_trace(plain | {"root": "X"})


def test_circuit_tracer_form():
    """Every link joins nodes that exist, and a feature's links sum to it but for its constants."""
    _, _, trace = traced()
    graph = circuit_tracer(trace)
    names = {node["node_id"] for node in graph["nodes"]}
    assert len(names) == len(graph["nodes"])
    assert all(link["source"] in names and link["target"] in names for link in graph["links"])
    targets = [node for node in graph["nodes"] if node["is_target_logit"]]
    root = trace.nodes[trace.root]
    assert [t["node_id"] for t in targets] == [f"3_{root.feature}_6"]
    assert {n["feature_type"] for n in graph["nodes"]} == {
        "cross layer transcoder", "mlp reconstruction error", "embedding", "logit",
    }  # fmt: skip
    into = sum(link["weight"] for link in graph["links"] if link["target"] == targets[0]["node_id"])
    constants = [t.weight for t in root.terms if t.kind == "bias"]
    for source in (t for t in root.terms if t.kind == "source"):
        constants += [t.weight for t in trace.nodes[source.node].terms if t.kind == "bias"]
    assert into + sum(constants) == pytest.approx(root.value, abs=1e-5)
    assert graph["metadata"]["prompt_tokens"] == trace.texts
    required = {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"}
    assert all(required <= set(node) for node in graph["nodes"])


def test_text_names_the_sources():
    _, _, trace = traced(bounds=Bounds(4, 3, 60))
    text = as_text(trace)
    root = trace.nodes[trace.root]
    assert text.startswith(f"A1.{root.feature} at 6 {trace.texts[6]}: pre-activation")
    assert "  from " in text
    assert "by L1H" in text
    assert "largest remainder" in text


def test_strongest_lists_features_by_activation():
    model, saes = tiny_model(), saes_of()
    found = Tracer(model, saes).strongest(TOKENS, saes[1].info.name, 5)
    acts = saes[1].encode(run_pass(model, TOKENS).z[1].float())[1:]
    assert [round(v, 5) for _, _, v in found] == [
        round(float(v), 5) for v in acts.max(0).values.sort(descending=True).values[:5]
    ]
    assert all(float(acts[p - 1, f]) == pytest.approx(v) for f, p, v in found)


def test_what_is_not_allowed_is_named():
    model, saes = tiny_model(), saes_of()
    tracer = Tracer(model, saes)
    name = saes[1].info.name
    with pytest.raises(ConfigError, match=r"position 8 does not exist.* 0 to 7"):
        tracer.trace(TOKENS, name, 3, 8)
    with pytest.raises(SAEError, match=r"feature 20 does not exist.* 0 to 19"):
        tracer.trace(TOKENS, name, 20, 3)
    with pytest.raises(SAEError, match=f"'nobody' is not among.*{name}"):
        tracer.trace(TOKENS, "nobody", 2, 3)
    with pytest.raises(SAEError, match="needs an SAE on z or attn_out"):
        Tracer(model, [random_sae("L00.mlp_out")])
    with pytest.raises(SAEError, match="both for layer 1"):
        Tracer(model, [*saes, random_sae("L01.attn_out")])
    with pytest.raises(ConfigError, match="breadth 0 is not allowed"):
        Bounds(breadth=0)
    with pytest.raises(ConfigError, match="holds no token"):
        tracer.trace("", name, 3, 0)
