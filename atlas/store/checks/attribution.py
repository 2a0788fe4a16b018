"""Checks of direct feature attribution: parts sum to the pre-activation, and that is the activation."""

from atlas.store.checks.check import Check, rows

_SLACK = 1e-3
"""How far sums of 32-bit contributions may be off, in parts of the sum of their sizes."""
_SIZE = "(list_sum(list_transform(by_head, lambda x: abs(x))) + abs(bias_term))"
_KEY = ("sae", "feature", "example_group", "rank")
_COLUMNS = ", ".join(_KEY)
_STORED = 0.95
"""Part of the absolute sum that the stored sources reach where there are fewer than the most."""
_MOST = 32
_LINEAR = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu")
"""Architectures whose activation, where a feature fires, is its pre-activation."""


def _pairs(name: str, meaning: str, condition: str, found: str, join: str = "JOIN") -> Check:
    """A check of an SAE's DFA rows (d) beside its examples (e)."""
    query = (
        f"SELECT {_COLUMNS}, {found} AS found "  # noqa: S608
        "FROM (SELECT * FROM examples WHERE sae = $sae) e "
        f"{join} (SELECT * EXCLUDE (sources) FROM dfa WHERE sae = $sae) d USING ({_COLUMNS}) "
        f"JOIN saes s USING (sae) WHERE {condition}"
    )
    return Check(name, meaning, query, _KEY, by_sae=True)


def _stored(name: str, meaning: str, condition: str, found: str) -> Check:
    """A check of the stored sources of top examples; of lists, which cost, the others are left out."""
    query = (
        f"SELECT {_COLUMNS}, {found} AS found FROM ("  # noqa: S608
        f"SELECT {_COLUMNS}, top_head, top_source, by_head, unit, sources, "
        "list_transform(sources, lambda x: x.weight) AS weights "
        f"FROM dfa WHERE example_group = 'top') WHERE {condition}"
    )
    return Check(name, meaning, query, _KEY)


_SIZES = "list_transform(weights, lambda x: abs(x::INT))"
_FIRST = "list_filter(sources, lambda x: x.weight > 0)[1].weight"

CHECKS: tuple[Check, ...] = (
    rows(
        "dfa.sum", "heads' parts and the bias term sum to the pre-activation",
        f"abs(list_sum(by_head) + bias_term - pre_activation) > {_SLACK} * (1e-3 + {_SIZE})",
        "list_sum(by_head) + bias_term || ' for ' || pre_activation",
    ),
    rows(
        "dfa.top", "both or neither of top_head and top_source; a matched prefix only with them",
        "(top_head IS NULL) != (top_source IS NULL) OR matched_prefix < 0 "
        "OR (top_source IS NULL AND matched_prefix > 0)", "matched_prefix",
    ),
    _pairs(
        "dfa.example", "it is about a kept example that fires",
        "e.block IS NULL OR example_group = 'negative'", "example_group", "RIGHT JOIN",
    ),
    _pairs(
        "examples.dfa", "an SAE with DFA has it for every kept example that fires",
        "d.unit IS NULL AND example_group != 'negative' AND sae IN (SELECT DISTINCT sae FROM dfa)",
        "example_group", "LEFT JOIN",
    ),
    _pairs(
        "dfa.activation", "where inputs are not normalised, the pre-activation is the activation",
        f"s.normalize_activations = 'none' AND s.architecture IN {_LINEAR} "
        f"AND abs(d.pre_activation - e.activation) > {_SLACK} * (1e-3 + {_SIZE})",
        "d.pre_activation || ' for ' || e.activation",
    ),
    _pairs(
        "dfa.top_source", "its top source is not after it, and a match ends there",
        "d.top_source > e.position OR (d.matched_prefix > 0 AND d.top_source IN (0, e.position)) "
        "OR d.matched_prefix >= greatest(d.top_source, 1)", "d.top_source",
    ),
    _stored(
        "dfa.sources", f"at most {_MOST} sources, largest first, the largest 2047 units; no pair twice",
        f"len(sources) > {_MOST} OR list_reverse_sort({_SIZES}) != {_SIZES} "
        f"OR {_SIZES}[1] NOT BETWEEN 2046 AND 2048 "
        "OR list_unique(list_transform(sources, lambda x: (x.head, x.source))) != len(sources)",
        "weights::VARCHAR",
    ),
    _stored(
        "dfa.stored", "its top source is the largest positive one stored",
        f"{_FIRST} IS NOT NULL AND NOT coalesce(list_contains(list_transform(list_filter(sources, "
        f"lambda x: x.weight = {_FIRST}), lambda x: (x.head, x.source)), (top_head, top_source)), false)",
        "'L' || top_head || ' ' || top_source",
    ),
    _stored(
        "dfa.left_out", f"what is not stored is at most {1 - _STORED:.0%} of the sizes",
        f"len(sources) < {_MOST} AND abs(list_sum(by_head) - unit * list_sum(weights)) > "
        f"{(1 - _STORED) / _STORED} * unit * list_sum({_SIZES}) + unit * len(sources)",
        "list_sum(by_head) || ' for ' || unit * list_sum(weights)",
    ),
)  # fmt: skip
