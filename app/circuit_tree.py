"""A trace as a tree that unfolds in the page without asking the server again; every text is escaped."""

import html
from collections.abc import Mapping
from typing import Any

from app import navigation

LEAVES = {"embed": "embedding", "pos": "position", "mlp": "MLP", "bias": "constant", "error": "error term",
          "attn": "attention", "head": "head"}  # fmt: skip
NOTES = {
    "bias": "what does not depend on the prompt: biases of the SAE, of values and of the norm",
    "error": "what the SAE does not rebuild",
    "mlp": "an MLP is not linear: the trace ends here",
}


def named(term: Mapping[str, Any]) -> str:
    """What a term is, in words.

    >>> named({"kind": "mlp", "position": 1, "layer": 3})
    'L3 MLP'
    >>> named({"kind": "feature", "position": 1, "layer": 3, "feature": 7})
    'L3 attention feature 7'
    """
    kind, at = term["kind"], term["position"]
    if kind in ("feature", "residual"):
        return (
            f"L{term['layer']} {'attention' if kind == 'feature' else 'residual'} feature {term['feature']}"
        )
    if kind == "source":
        return f"from position {at}"
    if kind == "head":
        return f"L{term['layer']}H{term['head']}"
    if kind == "pos":
        return f"position {at}"
    layer = f"L{term['layer']} " if kind in ("mlp", "attn") else ""
    return layer + LEAVES[kind]


def tree_html(trace: Mapping[str, Any], opened: int = 2, **address: Any) -> str:
    """The root's terms and theirs, as nested details; the first ``opened`` levels are unfolded.

    ``address`` are the parameters of a link that traces a feature from here (release, text or block).
    """
    drawn: set[str] = set()
    root = trace["nodes"][trace["root"]]
    inside = _terms(trace, root, opened, drawn, address)
    return f"<div class='ha-tree'>{inside}</div>"


def _terms(
    trace: Mapping[str, Any],
    node: Mapping[str, Any],
    opened: int,
    drawn: set[str],
    address: Mapping[str, Any],
) -> str:
    largest = max((abs(term["weight"]) for term in node["terms"]), default=0.0) or 1.0
    parts = [_term(trace, node, term, largest, opened, drawn, address) for term in node["terms"]]
    if node["n_rest"]:
        told = f"<span>{node['n_rest']} smaller terms</span>"
        parts.append(f"<div class='ha-leaf'>{_weight(node['rest'], largest)}{told}</div>")
    return "".join(parts)


def _term(
    trace: Mapping[str, Any],
    node: Mapping[str, Any],
    term: Mapping[str, Any],
    largest: float,
    opened: int,
    drawn: set[str],
    address: Mapping[str, Any],
) -> str:
    texts: list[str] = trace["texts"]
    line = _weight(term["weight"], largest) + _share(term["weight"], node["value"])
    line += f"<b>{html.escape(named(term))}</b>"
    if term["kind"] in ("source", "embed") or term["kind"] in ("feature", "residual"):
        line += f"<code>{html.escape(texts[term['position']])}</code>"
    line += _beside(term, address)
    below = trace["nodes"].get(term.get("node"))
    if below is None:
        note = html.escape(NOTES.get(term["kind"], ""), quote=True)
        return f"<div class='ha-leaf' title='{note}'>{line}</div>"
    if below["id"] in drawn:
        return f"<div class='ha-leaf'>{line}<span>unfolded above</span></div>"
    drawn.add(below["id"])
    inside = _terms(trace, below, opened - 1, drawn, address)
    told = f"<span class='ha-sum'>= {below['value']:+.4g}, remainder {below['remainder']:.0e}</span>"
    mark = " open" if opened > 0 else ""
    return f"<details{mark}><summary>{line}{told}</summary><div>{inside}</div></details>"


def _weight(weight: float, largest: float) -> str:
    width, side = 100 * min(1.0, abs(weight) / largest), "more" if weight >= 0 else "less"
    return (
        f"<i class='ha-bar ha-{side}'><i style='width:{width:.0f}%'></i></i>"
        f"<span class='ha-num'>{weight:+.3g}</span>"
    )


def _share(weight: float, value: float) -> str:
    return (
        f"<span class='ha-share'>{weight / value:.0%}</span>" if value else "<span class='ha-share'></span>"
    )


def _beside(term: Mapping[str, Any], address: Mapping[str, Any]) -> str:
    """Heads of a source; activation and links of a feature."""
    if term.get("by_head"):
        order = sorted(enumerate(term["by_head"]), key=lambda part: (-abs(part[1]), part[0]))[:2]
        heads = ", ".join(f"L{term['layer']}H{h} {w:+.2g}" for h, w in order)
        return f"<span>{heads}</span>"
    if term["kind"] not in ("feature", "residual"):
        return ""
    keep = {key: address.get(key) for key in ("release", "model")}
    page = navigation.href("feature", sae=term["sae"], feature=term["feature"], **keep)
    out = f"<span>fires {term['activation']:.3g}</span>"
    out += f"<a href='{html.escape(page, quote=True)}' target='_self'>page</a>"
    if term["kind"] == "feature":
        own = navigation.href(
            "circuit", sae=term["sae"], feature=term["feature"], position=term["position"], **address
        )
        out += f"<a href='{html.escape(own, quote=True)}' target='_self'>trace</a>"
    return out


def term_rows(trace: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every kept term of every node, as rows of a table with exact numbers."""
    return [
        {
            "node": node["id"], "node_value": node["value"], "remainder": node["remainder"],
            "kind": term["kind"], "position": term["position"], "token": trace["texts"][term["position"]],
            "layer": term.get("layer"), "sae": term.get("sae"), "feature": term.get("feature"),
            "weight": term["weight"], "activation": term.get("activation"),
        }
        for node in trace["nodes"].values()
        for term in node["terms"]
    ]  # fmt: skip
