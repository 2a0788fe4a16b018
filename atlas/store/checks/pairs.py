"""Checks of what was tried with heads that have SAEs on their queries and their keys."""

from atlas.store.checks.check import Check, rows
from atlas.tables import TABLES

_CLOSE = 1e-3
"""Attention is stored in four digits."""
_TABLES = tuple(name for name, table in TABLES.items() if {"q_sae", "k_sae"} <= set(table.schema.names))


def _saes() -> list[Check]:
    """The two SAEs of every row are on the q and the k of one head."""
    found = []
    for name in _TABLES:
        source = f"{name} LEFT JOIN saes q ON q.sae = q_sae LEFT JOIN saes k ON k.sae = k_sae"
        offends = (
            "NOT coalesce(q.site = 'q' AND k.site = 'k' AND q.model = k.model AND q.layer = k.layer "
            "AND q.head = k.head, false)"
        )
        key = ", ".join(f'{name}."{column}"' for column in TABLES[name].key)
        query = f"SELECT {key}, q_sae || ' ' || k_sae AS found FROM {source} WHERE {offends}"  # noqa: S608
        found.append(Check(f"{name}.saes", "its SAEs are on q and k of one head", query, TABLES[name].key))
    return found


def _feature(table: str, column: str, side: str) -> Check:
    """A feature that the row names exists."""
    source = f"{table} JOIN saes s ON s.sae = {side}"
    key = ", ".join(f'{table}."{c}"' for c in TABLES[table].key)
    mine = f"side = '{side[0]}'" if table == "qk_scans" else f"{column} IS NOT NULL"
    offends = f"{mine} AND NOT {column} BETWEEN 0 AND s.d_sae - 1"
    query = f"SELECT {key}, {column} AS found FROM {source} WHERE {offends}"  # noqa: S608
    return Check(f"{table}.{side[0]}_feature", "the feature exists", query, TABLES[table].key)


CHECKS: tuple[Check, ...] = (
    *_saes(),
    _feature("qk_targets", "k_feature", "k_sae"), _feature("qk_targets", "q_feature", "q_sae"),
    _feature("qk_prompts", "k_feature", "k_sae"), _feature("qk_scans", "feature", "q_sae"),
    _feature("qk_scans", "feature", "k_sae"), _feature("qk_feature_pairs", "q_feature", "q_sae"),
    _feature("qk_feature_pairs", "k_feature", "k_sae"),
    rows(
        "qk_heads.counts", "no more positions are covered, and no more features paired, than are positional",
        "q_covered > q_positional OR k_covered > k_positional OR n_diagonal > q_positional",
        "concat_ws(' ', q_covered, k_covered, n_diagonal)",
    ),
    rows(
        "qk_curves.range", "log-probabilities are not above 0, probabilities and attention in [0, 1]",
        f"log_prob > {_CLOSE} OR NOT probability BETWEEN -{_CLOSE} AND 1 + {_CLOSE} "
        f"OR (attention IS NOT NULL AND NOT attention BETWEEN -{_CLOSE} AND 1 + {_CLOSE})",
        "concat_ws(' ', log_prob, probability, attention)",
    ),
    rows(
        "qk_prompts.pattern", "both patterns have a row for each token, which sums to 1",
        "len(pattern) != len(tokens) ** 2 OR len(rebuilt) != len(tokens) ** 2 "
        f"OR abs(list_sum(pattern) - len(tokens)) > {_CLOSE} * len(tokens) "
        f"OR abs(list_sum(rebuilt) - len(tokens)) > {_CLOSE} * len(tokens)",
        "concat_ws(' ', len(tokens), list_sum(pattern), list_sum(rebuilt))",
    ),
    rows(
        "qk_prompts.places", "query and source are in the prompt, the source not after the query",
        "NOT (source BETWEEN 1 AND query AND query = len(tokens) - 1)", "query || ' ' || source",
    ),
    rows(
        "qk_outcomes.range", "attention lies in [0, 1], log-probabilities are not above 0",
        f"log_prob > {_CLOSE} OR NOT attention BETWEEN -{_CLOSE} AND 1 + {_CLOSE}",
        "log_prob || ' ' || attention",
    ),
)  # fmt: skip
