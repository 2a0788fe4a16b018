"""A trace as text, and as a graph in the form that circuit-tracer and Neuronpedia's graph viewer read.

That form knows feature, error, embedding and logit nodes and weighted links between them. Sources and
attention layers are steps and not nodes there: a feature is linked to the features, embeddings, MLPs and
errors that it is a sum of. Each layer becomes two: 2 * layer for residual features and 2 * layer + 1 for
attention features. The traced feature stands where the target logit does. Constants have no node.
"""

from typing import Any

from atlas.circuits.nodes import Node, Term, Trace

CUT = 400


def named(term: Term | Node, texts: list[str]) -> str:
    """What a term or node is called.

    >>> named(Term("attn", 1.0, 1, 3), ["a", "b"]), named(Term("embed", 1.0, 1), ["a", "b"])
    ('L3 attention', 'embedding of b')
    """
    token = texts[term.position]
    if term.kind in ("feature", "residual"):
        return f"{'A' if term.kind == 'feature' else 'R'}{term.layer}.{term.feature}"
    return {
        "source": f"from {term.position} {token}", "attn": f"L{term.layer} attention",
        "mlp": f"L{term.layer} MLP", "embed": f"embedding of {token}", "pos": f"position {term.position}",
        "head": f"L{term.layer}H{getattr(term, 'head', None)}", "bias": "bias", "error": "error term",
    }[term.kind]  # fmt: skip


def as_text(trace: Trace, width: int = 3) -> str:
    """The tree as indented lines: each term with its weight and its share of the node's value."""
    root = trace.nodes[trace.root]
    lines = [
        f"{named(root, trace.texts)} at {root.position} {trace.texts[root.position]}: "
        f"pre-activation {root.value:.4g}, activation {root.activation or 0.0:.4g}"
    ]
    _lines(trace, root, 1, width, lines, {root.id})
    more = [f"largest remainder {trace.largest_remainder:.1e}, {len(trace.nodes)} nodes"]
    return "\n".join([*lines[:CUT], *more])


def _lines(trace: Trace, node: Node, level: int, width: int, out: list[str], said: set[str]) -> None:
    """Terms below a node; what stands above already is not unfolded a second time."""
    for term in node.terms[:width]:
        share = f" ({term.weight / node.value:.0%})" if node.value else ""
        beside = ""
        if term.by_head is not None:
            order = sorted(enumerate(term.by_head), key=lambda part: (-abs(part[1]), part[0]))[:2]
            beside = "  by " + ", ".join(f"L{term.layer}H{h} {weight:+.3g}" for h, weight in order)
        elif term.activation is not None:
            beside = f"  fires {term.activation:.3g}"
        below = term.node
        beside += "  (see above)" if below in said else ""
        out.append(f"{'  ' * level}{named(term, trace.texts)} {term.weight:+.4g}{share}{beside}")
        if below is not None and below not in said:
            said.add(below)
            _lines(trace, trace.nodes[below], level + 1, width, out, said)


def circuit_tracer(trace: Trace, slug: str = "trace") -> dict[str, Any]:
    """The trace as a graph file of circuit-tracer (schema version 1).

    Weights of links are terms of the downstream feature's pre-activation; ``activation`` is the feature's.
    """
    graph = _Graph(trace)
    for node in trace.nodes.values():
        if node.kind in ("feature", "residual"):
            graph.add(node, _own_id(node, trace))
            graph.inputs(node, _own_id(node, trace))
    links = [{"source": s, "target": t, "weight": w} for (s, t), w in graph.links.items()]
    saes = list(trace.settings.get("saes", ()))
    return {
        "metadata": {
            "slug": slug, "scan": trace.model, "transcoder_list": saes, "prompt_tokens": trace.texts,
            "prompt": trace.prompt, "node_threshold": None, "schema_version": 1,
            "info": {"creator_name": "Head Atlas", "generator": {"name": "head-atlas"}},
        },
        "qParams": {"pinnedIds": [_own_id(trace.nodes[trace.root], trace)], "supernodes": [],
                    "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": list(graph.nodes.values()),
        "links": links,
    }  # fmt: skip


def _level(part: Term | Node) -> int:
    return 2 * (part.layer or 0) + (0 if part.kind == "residual" else 1)


def _own_id(part: Term | Node, trace: Trace) -> str:
    """The viewer's id of a term or node; None for a constant."""
    if part.kind in ("feature", "residual"):
        return f"{_level(part)}_{part.feature}_{part.position}"
    if part.kind == "embed":
        return f"E_{trace.tokens[part.position]}_{part.position}"
    where = {"pos": "P", "mlp": f"M{part.layer}", "attn": f"T{part.layer}", "source": f"S{part.layer}"}
    where |= {"error": f"X{part.sae}", "head": f"H{part.layer}.{getattr(part, 'head', None)}"}
    return f"{where[part.kind]}_-1_{part.position}"


class _Graph:
    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.nodes: dict[str, dict[str, Any]] = {}
        self.links: dict[tuple[str, str], float] = {}

    def add(self, part: Term | Node, name: str) -> None:
        is_root = part.kind == "feature" and name == _own_id(self.trace.nodes[self.trace.root], self.trace)
        kinds = {"feature": "cross layer transcoder", "residual": "cross layer transcoder"}
        kinds |= {"embed": "embedding", "pos": "embedding"}
        told = named(part, self.trace.texts)
        self.nodes.setdefault(name, {
            "node_id": name, "feature": -1 if part.feature is None else part.feature,
            "layer": "E" if part.kind in ("embed", "pos") else str(_level(part)), "ctx_idx": part.position,
            "feature_type": "logit" if is_root else kinds.get(part.kind, "mlp reconstruction error"),
            "token_prob": 0.0, "is_target_logit": is_root, "run_idx": 0, "reverse_ctx_idx": 0,
            "jsNodeId": f"{name}-0", "clerp": f"{told} ({part.sae})" if part.sae else told,
            "influence": None, "activation": getattr(part, "activation", None),
        })  # fmt: skip

    def inputs(self, node: Node, target: str) -> None:
        """Links to ``target`` of everything that ``node`` is a sum of, through sources and layers."""
        for term in node.terms:
            below = None if term.node is None else self.trace.nodes[term.node]
            if term.kind == "bias":
                continue
            if term.kind in ("source", "attn") and below is not None:
                self.inputs(below, target)
                continue
            name = _own_id(term, self.trace)
            self.add(term, name)
            self.links[name, target] = self.links.get((name, target), 0.0) + term.weight
