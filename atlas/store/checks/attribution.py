"""Checks of direct feature attribution: parts sum to the pre-activation, and that is the activation."""

from atlas.store.checks.check import Check, rows

_SLACK = 1e-3
"""How far sums of 32-bit contributions may be off, in parts of the sum of their sizes."""
_SIZE = "(list_sum(list_transform(by_head, lambda x: abs(x))) + abs(bias_term))"


def _far(one: str, other: str) -> str:
    """Whether two sums of contributions differ; the sizes of all terms are only looked at where needed."""
    apart = f"abs({one} - ({other}))"
    near = f"{apart} <= {_SLACK} * (1e-3 + abs({other}))"
    return f"CASE WHEN {near} THEN false ELSE {apart} > {_SLACK} * (1e-3 + {_SIZE}) END"


_KEY = ("sae", "feature", "example_group", "rank")
_COLUMNS = ", ".join(_KEY)
_STORED = 0.95
"""Part of the absolute sum that the stored sources reach where there are fewer than the most."""
_MOST = 32
_LINEAR = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu")
"""Architectures whose activation, where a feature fires, is its pre-activation."""


_SAME = " AND ".join(
    f"{one} IS NOT DISTINCT FROM {two}"
    for one, two in (("feature", "f"), ("example_group", "g"), ("rank", "r"))
)


def _pairs(name: str, meaning: str, offends: str, found: str) -> Check:
    """A check of an SAE's DFA rows beside its examples that fire, both in the order of their key.

    Row beside row costs a tenth of a join. A row too many shifts all that follow, which ``dfa.examples``
    then names; the other checks look at pairs that belong together.
    """
    query = (
        f"SELECT sae, coalesce(f, feature) AS feature, coalesce(g, example_group) AS example_group, "  # noqa: S608
        f"coalesce(r, rank) AS rank, {found} AS found FROM ("
        "SELECT feature, example_group, rank, position, activation FROM examples "
        "WHERE sae = $sae AND example_group != 'negative' AND $sae IN (SELECT sae FROM dfa)) e "
        "POSITIONAL JOIN (SELECT feature AS f, example_group AS g, rank AS r, top_source, matched_prefix, "
        "pre_activation, bias_term, by_head FROM dfa WHERE sae = $sae) d, "
        f"(SELECT * FROM saes WHERE sae = $sae) s WHERE {offends}"
    )
    return Check(name, meaning, query, _KEY, by_sae=True)


def _stored(name: str, meaning: str, offends: str, found: str) -> Check:
    """A check of the stored sources of a feature's two strongest examples; all would take minutes."""
    query = (
        f"SELECT {_COLUMNS}, {found} AS found FROM (SELECT *, "  # noqa: S608
        "list_transform(weights, lambda x: abs(x::INT)) AS sizes, list_max(weights) AS largest FROM ("
        f"SELECT {_COLUMNS}, top_head, top_source, by_head, unit, sources, "
        "list_transform(sources, lambda x: x.weight) AS weights, "
        "list_transform(sources, lambda x: x.source::INT * 1000 + x.head) AS pairs "
        f"FROM dfa WHERE example_group = 'top' AND rank < 2)) WHERE {offends}"
    )
    return Check(name, f"{meaning} (of the two strongest examples)", query, _KEY)


CHECKS: tuple[Check, ...] = (
    rows(
        "dfa.sum", "heads' parts and the bias term sum to the pre-activation",
        _far("list_sum(by_head) + bias_term", "pre_activation"),
        "list_sum(by_head) + bias_term || ' for ' || pre_activation",
    ),
    rows(
        "dfa.top", "both or neither of top_head and top_source; a matched prefix only with them",
        "(top_head IS NULL) != (top_source IS NULL) OR matched_prefix < 0 "
        "OR (top_source IS NULL AND matched_prefix > 0)", "matched_prefix",
    ),
    _pairs(
        "dfa.examples", "an SAE with DFA has it for exactly its kept examples that fire",
        f"NOT ({_SAME})", "coalesce('no example, ' || r, 'no DFA, ' || rank)",
    ),
    _pairs(
        "dfa.activation", "where inputs are not normalised, the pre-activation is the activation",
        f"{_SAME} AND s.normalize_activations = 'none' AND s.architecture IN {_LINEAR} "
        f"AND {_far('pre_activation', 'activation')}", "pre_activation || ' for ' || activation",
    ),
    _pairs(
        "dfa.top_source", "its top source is not after it, and a match ends there",
        f"{_SAME} AND (top_source > position OR (matched_prefix > 0 AND top_source IN (0, position)) "
        "OR matched_prefix >= greatest(top_source, 1))", "top_source",
    ),
    _stored(
        "dfa.sources", f"at most {_MOST} sources, largest first, the largest 2047 units; no pair twice",
        f"len(sources) > {_MOST} OR list_reverse_sort(sizes) != sizes OR sizes[1] NOT BETWEEN 2046 AND 2048 "
        "OR list_unique(pairs) != len(pairs)", "weights::VARCHAR",
    ),
    _stored(
        "dfa.stored", "its top source is the largest positive one stored",
        "largest > 0 "
        "AND coalesce(weights[list_position(pairs, top_source::INT * 1000 + top_head)], 0) != largest",
        "'head ' || top_head || ' source ' || top_source",
    ),
    _stored(
        "dfa.left_out", f"what is not stored is at most {1 - _STORED:.0%} of the sizes",
        f"len(sources) < {_MOST} AND abs(list_sum(by_head) - unit * list_sum(weights)) > "
        f"{(1 - _STORED) / _STORED} * unit * list_sum(sizes) + unit * len(sources)",
        "list_sum(by_head) || ' for ' || unit * list_sum(weights)",
    ),
)  # fmt: skip
