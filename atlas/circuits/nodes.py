"""What a trace consists of: nodes whose value is split into terms, and the terms."""

from dataclasses import dataclass, field
from typing import Any

from atlas.errors import ConfigError, StoreError

FORMAT = "head-atlas-trace-1"


@dataclass(frozen=True)
class Bounds:
    """How far a trace goes."""

    breadth: int = 5
    """Terms of a node that are kept and may be split further."""
    depth: int = 3
    """Attention features on a path, the root included."""
    nodes: int = 200
    """Most nodes; those with the largest share of the root come first."""
    residual: bool = True
    """Whether sources are split by residual features where a layer has an SAE for them."""

    def __post_init__(self) -> None:
        for name, most in (("breadth", 100), ("depth", 50), ("nodes", 10_000)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} {getattr(self, name)} is not allowed; allowed: 1 to {most}")


@dataclass(frozen=True)
class Term:
    """One part of a node's value; ``node`` names the node that splits it further, if there is one."""

    kind: str
    weight: float
    """What it adds to the value of the node that it is a part of."""
    position: int
    layer: int | None = None
    head: int | None = None
    sae: str | None = None
    feature: int | None = None
    activation: float | None = None
    by_head: tuple[float, ...] | None = None
    """A source's weight by head."""
    node: str | None = None


@dataclass
class Node:
    """A value and its terms: value = sum of terms + rest + remainder, the remainder 0 up to rounding."""

    id: str
    kind: str
    """feature (of an attention SAE; split by source position), source (by residual features, or by component
    in a layer without residual SAE), residual (by component), attn (a layer; by features, else heads)."""
    position: int
    layer: int
    value: float
    """What is split: a feature's pre-activation, or what a source or layer adds to the node above."""
    sae: str | None = None
    feature: int | None = None
    activation: float | None = None
    terms: list[Term] = field(default_factory=list)
    rest: float = 0.0
    """Sum of the terms that were not kept."""
    n_rest: int = 0
    remainder: float = 0.0
    by_position: list[float] | None = None
    """Of a feature: every source's weight, all heads together."""
    depth: int = 0
    """Attention features between this node and the root."""


@dataclass
class Trace:
    """A prompt and the nodes found on it, by id; the root is the feature that was asked about."""

    model: str
    processing: str
    prompt: str
    tokens: list[int]
    texts: list[str]
    root: str
    nodes: dict[str, Node]
    settings: dict[str, Any]

    @property
    def largest_remainder(self) -> float:
        """The largest |value - sum of terms| over all nodes."""
        return max(abs(node.remainder) for node in self.nodes.values())

    def to_plain(self) -> dict[str, Any]:
        """As dicts and lists, for JSON; floats with 7 digits."""
        nodes = {name: _plain(node) for name, node in self.nodes.items()}
        return {
            "format": FORMAT, "model": self.model, "processing": self.processing, "prompt": self.prompt,
            "tokens": self.tokens, "texts": self.texts, "root": self.root, "settings": self.settings,
            "largest_remainder": _short(self.largest_remainder), "nodes": nodes,
        }  # fmt: skip


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}")
    return [_short(v) for v in value] if isinstance(value, list | tuple) else value


def _plain(node: Node) -> dict[str, Any]:
    own = {k: _short(v) for k, v in vars(node).items() if k != "terms" and v is not None}
    terms = [{k: _short(v) for k, v in vars(term).items() if v is not None} for term in node.terms]
    return own | {"terms": terms}


def _term(plain: dict[str, Any]) -> Term:
    by_head = plain.get("by_head")
    return Term(**(plain | {"by_head": None if by_head is None else tuple(by_head)}))


def read_trace(plain: Any) -> Trace:
    """A trace as ``to_plain`` wrote it; StoreError for anything else."""
    try:
        if plain["format"] != FORMAT:
            raise StoreError(f"format {plain['format']!r} is not known; allowed: {FORMAT}")
        nodes = {}
        for name, given in plain["nodes"].items():
            terms = [
                Term(**(t | {"by_head": tuple(t["by_head"])} if "by_head" in t else t))
                for t in given["terms"]
            ]
            nodes[name] = Node(**(given | {"terms": terms}))
        names = ("model", "processing", "prompt", "tokens", "texts", "root", "settings")
        trace = Trace(**{key: plain[key] for key in names}, nodes=nodes)
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"this is not a trace of Head Atlas ({error!r})") from None
    if trace.root not in nodes:
        raise StoreError(f"root {trace.root!r} is not among the trace's {len(nodes)} nodes")
    return trace
