"""Checks of direct feature attribution: parts sum to the pre-activation, and that is the activation."""

from atlas.store.checks.check import Check, rows
from atlas.tables import FULL_WEIGHT, TABLES

_SLACK = 1e-3
"""How far sums of 32-bit contributions may be off, in parts of the sum of their sizes."""
_BITS = TABLES["dfa"].column("by_head").bits
_ROUNDED = f"len(by_head) * pow(2, -{_BITS})"
"""How far rounded parts of heads may be off together, in parts of the largest."""
_SIZE = "(list_sum(list_transform(by_head, lambda x: abs(x))) + abs(bias_term))"


def _far(one: str, other: str) -> str:
    """Whether two sums of contributions differ; the sizes of all terms are only looked at where needed."""
    apart = f"abs({one} - ({other}))"
    near = f"{apart} <= {_SLACK} * (1e-3 + abs({other}))"
    return f"CASE WHEN {near} THEN false ELSE {apart} > ({_SLACK} + {_ROUNDED}) * (1e-3 + {_SIZE}) END"


_KEY = ("sae", "feature", "example_group", "rank")
_COLUMNS = ", ".join(_KEY)
_STORED = 0.95
"""Part of the absolute sum that the stored sources reach where there are fewer than the most."""
_MOST = 32
_FULL = FULL_WEIGHT // 1.01
"""Units of the largest source: their size is rounded up to three digits. Older releases have more of them."""
_LINEAR = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu")
"""Architectures whose activation, where a feature fires, is its pre-activation."""


_FIRING = f"""(SELECT {_COLUMNS}, position, activation FROM examples
WHERE sae = $sae AND example_group != 'negative')"""  # noqa: S608
_ATTRIBUTED = f"""(SELECT {_COLUMNS}, top_source, matched_prefix, pre_activation, bias_term
FROM dfa WHERE sae = $sae)"""  # noqa: S608


def _examples() -> Check:
    """DFA rows and examples that fire belong together one to one, and where they look lies before."""
    query = f"""
    SELECT {_COLUMNS}, CASE WHEN d.bias_term IS NULL THEN 'no DFA'
      WHEN e.position IS NULL THEN 'no example that fires'
      ELSE 'source ' || top_source || ' of position ' || position END AS found
    FROM (FROM {_FIRING} WHERE $sae IN (SELECT sae FROM dfa)) e FULL JOIN {_ATTRIBUTED} d USING ({_COLUMNS})
    WHERE d.bias_term IS NULL OR e.position IS NULL OR top_source > position
      OR (matched_prefix > 0 AND top_source IN (0, position))"""  # noqa: S608
    meaning = "an SAE with DFA has it for exactly its examples that fire, with the top source not after them"
    return Check("dfa.examples", meaning, query, _KEY, by_sae=True)


def _activation() -> Check:
    """The pre-activation is the activation; the sizes of all terms are only looked at where they differ."""
    query = f"""
    WITH far AS (
      SELECT {_COLUMNS}, d.pre_activation, e.activation, abs(d.pre_activation - e.activation) AS apart
      FROM {_FIRING} e JOIN {_ATTRIBUTED} d USING ({_COLUMNS})
      WHERE apart > {_SLACK} * (1e-3 + abs(e.activation)) AND $sae IN (
        SELECT sae FROM saes WHERE normalize_activations = 'none' AND architecture IN {_LINEAR}))
    SELECT {_COLUMNS}, far.pre_activation || ' for ' || activation AS found
    FROM far JOIN (SELECT {_COLUMNS}, by_head, bias_term FROM dfa WHERE sae = $sae) USING ({_COLUMNS})
    WHERE apart > {_SLACK} * (1e-3 + {_SIZE})"""  # noqa: S608
    meaning = "where inputs are not normalised, the pre-activation is the activation"
    return Check("dfa.activation", meaning, query, _KEY, by_sae=True)


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
        "dfa.top", "both or neither of top_head and top_source; a matched prefix ends before the source",
        "(top_head IS NULL) != (top_source IS NULL) OR matched_prefix < 0 "
        "OR matched_prefix >= greatest(coalesce(top_source, 0), 1)", "matched_prefix",
    ),
    _examples(),
    _activation(),
    _stored(
        "dfa.sources",
        f"at most {_MOST} sources, largest first, the largest at least {_FULL:.0f} units; no pair twice",
        f"len(sources) > {_MOST} OR list_reverse_sort(sizes) != sizes "
        f"OR sizes[1] < {_FULL} OR list_unique(pairs) != len(pairs)", "weights::VARCHAR",
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
