"""Checks of order: ranks without gaps, strongest first, quantile groups one above the other.

A table lies in the file in the order of its key (its content is checked for that), so the row before a row
of rank above 0 is the one that it must not surpass, and one streaming look back is enough.
"""

from atlas.store.checks.check import Check, grouped
from atlas.tables import TABLES


def _ranks() -> list[Check]:
    """Ranks of each group are 0, 1, 2, ... without a gap."""
    found = []
    for name, declared in TABLES.items():
        # The ranks of dfa are those of examples (dfa.examples).
        if declared.key[-1] == "rank" and name != "dfa":
            group = declared.key[:-1]
            found.append(
                grouped(f"{name}.rank", "ranks count from 0 without a gap", "max(rank)",
                        "min(rank) != 0 OR max(rank) != count(*) - 1", group)
            )  # fmt: skip
    return found


def _descending(table: str, value: str, meaning: str) -> Check:
    key = ", ".join(f'"{column}"' for column in TABLES[table].key)
    query = (
        f"SELECT {key}, value || ' after ' || before AS found FROM (SELECT {key}, {value} AS value, "  # noqa: S608
        f"lag({value}) OVER () AS before FROM {table}) WHERE rank > 0 AND value > before"
    )
    return Check(f"{table}.strongest_first", meaning, query, TABLES[table].key)


_QUANTILES = ", ".join(
    f"min(activation) FILTER (example_group = 'q{q}') AS low{q}, "
    f"max(activation) FILTER (example_group = 'q{q}') AS high{q}"
    for q in range(10)
)
# Groups may be empty where a feature fires on fewer than ten tokens: compare with the highest below.
_BELOW = " OR ".join(f"greatest({', '.join(f'high{p}' for p in range(q))}) > low{q}" for q in range(1, 10))

CHECKS: tuple[Check, ...] = (
    *_ranks(),
    _descending(
        "examples", "CASE WHEN example_group = 'negative' THEN near_miss ELSE activation END",
        "examples of a group come strongest first",
    ),
    _descending("token_stats", "sum_activation", "tokens come by summed activation"),
    _descending("logit_effects", "sign * value", "the strongest effect comes first"),
    _descending("head_logit_effects", "sign * value", "the strongest effect comes first"),
    _descending("neighbours", "cosine", "the nearest direction comes first"),
    _descending("coactivation", "jaccard", "the largest Jaccard index comes first"),
    _descending("qk_partners", "product", "the largest product comes first"),
    _descending("qk_feature_pairs", "contribution", "the largest contribution comes first"),
    _descending("dfa_tokens", "share", "the largest share comes first"),
    Check(
        "examples.quantiles", "no example of a quantile group is weaker than one of a lower group",
        f"SELECT sae, feature, 'q0 from ' || low0 || ', q9 to ' || high9 AS found FROM ("  # noqa: S608
        f"SELECT sae, feature, {_QUANTILES} FROM examples GROUP BY sae, feature) WHERE {_BELOW}",
    ),
)  # fmt: skip
