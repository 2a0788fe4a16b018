"""How a trace grows: each node is split into terms, the largest share of the root first."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from atlas.circuits.nodes import Bounds, Node, Term, Trace
from atlas.circuits.parts import (
    Functional,
    Sparse,
    Wide,
    by_source,
    component_terms,
    feature_terms,
    reading_at_source,
    reading_of_feature,
    through_W_O,
)
from atlas.circuits.passes import token_texts

if TYPE_CHECKING:
    from atlas.circuits.trace import Look


@dataclass(frozen=True)
class Task:
    """A node to be made: which, and how it reads the stream at its position."""

    id: str
    kind: str
    layer: int
    position: int
    depth: int
    wide: Wide | None = None
    feature: int | None = None
    reads: Callable[[], Functional] | None = None


Parts = list[tuple[Term, Task | None]]
"""The terms of a node, each with the node that would split it."""


class Growth:
    """Makes the nodes of one trace."""

    def __init__(self, look: "Look", bounds: Bounds) -> None:
        self.look, self.bounds, self.model = look, bounds, look.tracer.model
        self.nodes: dict[str, Node] = {}

    def grow(self, wide: Wide, feature: int, position: int) -> Trace:
        """Split the root, then whatever has the largest share, until a bound is reached."""
        root = self._feature_task(wide, feature, position, 0)
        order = count()
        waiting: list[tuple[float, int, Task]] = [(-1.0, next(order), root)]
        while waiting and len(self.nodes) < self.bounds.nodes:
            share, _, task = heapq.heappop(waiting)
            if task.id in self.nodes:
                continue
            terms = self._split(task)
            total = sum(abs(term.weight) for term, _ in terms) or 1.0
            for term, child in self._keep(task, terms):
                if child is not None and child.depth < self.bounds.depth:
                    heapq.heappush(waiting, (share * abs(term.weight) / total, next(order), child))
        self._drop_unmade()
        tokens, model = self.look.one.tokens, self.model
        texts = token_texts(model, tokens)
        return Trace(
            model.name, model.processing, "".join(texts[1:]), tokens.tolist(), texts, root.id, self.nodes,
            {**vars(self.bounds), "saes": self._sae_names()},
        )  # fmt: skip

    def _sae_names(self) -> list[str]:
        tracer = self.look.tracer
        known = [*tracer.attention.values(), *(tracer.residual.values() if self.bounds.residual else ())]
        return sorted(wide.sae.info.name for wide in known)

    def _drop_unmade(self) -> None:
        """Terms name only nodes that were made."""
        for node in self.nodes.values():
            node.terms = [t if t.node in self.nodes else replace(t, node=None) for t in node.terms]

    def _keep(self, task: Task, terms: Parts) -> Parts:
        """Write the largest terms into the node, the rest as one number; equal ones keep their order."""
        node = self.nodes[task.id]
        order = sorted(range(len(terms)), key=lambda n: (-abs(terms[n][0].weight), n))
        kept = [terms[n] for n in order[: self.bounds.breadth]]
        rest = [terms[n][0].weight for n in order[self.bounds.breadth :]]
        node.terms = [term if child is None else replace(term, node=child.id) for term, child in kept]
        node.rest, node.n_rest = float(sum(rest)), len(rest)
        node.remainder = node.value - sum(term.weight for term in node.terms) - node.rest
        return kept

    def _split(self, task: Task) -> Parts:
        """Make the node and give all its terms."""
        makers = {
            "feature": self._of_feature, "source": self._of_source, "residual": self._of_residual,
            "attn": self._of_attention,
        }  # fmt: skip
        return makers[task.kind](task)

    def _feature_task(self, wide: Wide, feature: int, position: int, depth: int) -> Task:
        site = wide.sae.info.site
        kind = "residual" if site.kind == "resid_pre" else "feature"
        name = f"{'R' if kind == 'residual' else 'A'}{site.layer}.{feature}@{position}"
        return Task(name, kind, site.layer, position, depth, wide, feature)

    def _of_feature(self, task: Task) -> Parts:
        wide, feature, position, layer = task.wide, task.feature, task.position, task.layer
        if wide is None or feature is None:
            raise ValueError("a feature's task names its SAE")
        sparse, one = self.look.attention(layer), self.look.one
        found = by_source(one, wide, sparse, feature, position)
        totals = found.terms.sum(0)
        node = Node(task.id, "feature", position, layer, float(sparse.pre[position, feature]))
        node.sae, node.feature, node.depth = wide.sae.info.name, feature, task.depth
        node.activation = float(sparse.acts[position, feature])
        node.by_position = totals[: position + 1].tolist()
        self.nodes[task.id] = node
        out: Parts = [(Term("bias", found.bias, position), None)]
        for source in range(position + 1):
            reads = partial(reading_at_source, self.model, one, wide, sparse, feature, position, source)
            child = Task(f"{task.id}<{source}", "source", layer, source, task.depth, reads=reads)
            by_head = tuple(found.terms[:, source].tolist())
            out.append((Term("source", float(totals[source]), source, layer, by_head=by_head), child))
        return out

    def _of_source(self, task: Task) -> Parts:
        """By residual features where there is an SAE, else by component."""
        if task.reads is None:
            raise ValueError("a source's task says how it reads the stream")
        reads, layer, position = task.reads(), task.layer, task.position
        value = float(self.look.one.resid_pre[layer][position] @ reads.direction) + reads.constant
        node = Node(task.id, "source", position, layer, value, depth=task.depth)
        self.nodes[task.id] = node
        if not self.bounds.residual or layer not in self.look.tracer.residual:
            return self._by_component(task, reads)
        wide, sparse = self.look.tracer.residual[layer], self.look.residual(layer)
        return [
            (Term("bias", reads.constant, position), None),
            *self._by_feature(wide, sparse, position, reads.direction, task.depth),
        ]

    def _by_feature(
        self, wide: Wide, sparse: Sparse, position: int, direction: Float[Tensor, " d_in"], depth: int
    ) -> Parts:
        split, site = feature_terms(wide, sparse, position, direction), wide.sae.info.site
        name, layer = wide.sae.info.name, site.layer
        out: Parts = [
            (Term("bias", split.bias, position, layer, sae=name), None),
            (Term("error", split.error, position, layer, sae=name), None),
        ]
        kind = "residual" if site.kind == "resid_pre" else "feature"
        for feature in sparse.acts[position].nonzero()[:, 0].tolist():
            activation = float(sparse.acts[position, feature])
            term = Term(
                kind, float(split.features[feature]), position, layer, None, name, feature, activation
            )
            out.append((term, self._feature_task(wide, feature, position, depth)))
        return out

    def _of_residual(self, task: Task) -> Parts:
        wide, feature, position = task.wide, task.feature, task.position
        if wide is None or feature is None:
            raise ValueError("a feature's task names its SAE")
        sparse = self.look.residual(task.layer)
        node = Node(task.id, "residual", position, task.layer, float(sparse.pre[position, feature]))
        node.sae, node.feature, node.depth = wide.sae.info.name, feature, task.depth
        node.activation = float(sparse.acts[position, feature])
        self.nodes[task.id] = node
        return self._by_component(task, reading_of_feature(wide, sparse, feature, position))

    def _by_component(self, task: Task, reads: Functional) -> Parts:
        out: Parts = [(Term("bias", reads.constant, task.position), None)]
        for kind, layer, weight in component_terms(self.look.one, task.layer, task.position, reads.direction):
            child = None
            if kind == "attn" and layer is not None:
                name = f"{task.id}/attn{layer}"
                child = Task(name, "attn", layer, task.position, task.depth, reads=lambda: reads)
            out.append((Term(kind, weight, task.position, layer), child))
        return out

    def _of_attention(self, task: Task) -> Parts:
        """An attention layer's output along a direction, by its features; one step deeper."""
        if task.reads is None:
            raise ValueError("a layer's task says how it is read")
        layer, position, direction = task.layer, task.position, task.reads().direction
        value = float(self.look.one.attn_out[layer][position] @ direction)
        self.nodes[task.id] = Node(task.id, "attn", position, layer, value, depth=task.depth)
        z_direction, bias = through_W_O(self.model, layer, direction)
        wide = self.look.tracer.attention.get(layer)
        if wide is None:
            by_head = (self.look.one.z[layer][position] * z_direction).reshape(self.model.shape.n_heads, -1)
            heads = [Term("head", w, position, layer, h) for h, w in enumerate(by_head.sum(1).tolist())]
            return [(Term("bias", bias, position, layer), None), *((term, None) for term in heads)]
        sparse = self.look.attention(layer)
        if wide.sae.info.site.kind == "attn_out":
            return self._by_feature(wide, sparse, position, direction, task.depth + 1)
        parts = self._by_feature(wide, sparse, position, z_direction, task.depth + 1)
        return [(Term("bias", bias, position, layer), None), *parts]
