"""Checks that counts and shares add up."""

from atlas.store.checks.check import Check, grouped, rows

_SUM = 1e-3
"""How far sums of stored 32-bit shares may be from 1."""
_ROUNDED = 1e-4
"""How far a share may be from itself that is stored in 4 decimals."""
_RELATIVE = 1e-3
"""How far a number may be from the one that other columns give, in parts of it."""


def _one_over_heads(column: str) -> Check:
    """Shares of heads sum to 1; terms of both signs may be large, so the slack grows with them."""
    offends = (
        f"count({column}) NOT IN (0, count(*)) "
        f"OR abs(sum({column}) - 1) > {_SUM} * greatest(1, sum(abs({column})))"
    )
    meaning = f"{column} sums to 1 over the heads, or is NULL in all of them"
    return grouped(f"head_attribution.{column}", meaning, f"sum({column})", offends)


def _per_feature(name: str, meaning: str, total: str, wanted: str, extra: str = "") -> Check:
    """An aggregate over a feature's rows against a column of ``features``."""
    table, group = name.partition(".")[0], ", ".join(["sae", "feature", *([extra] if extra else [])])
    query = (
        f"SELECT {group}, r.total || ' where ' || {wanted} || ' is due' AS found "  # noqa: S608
        f"FROM (SELECT {group}, {total} AS total FROM {table} GROUP BY {group}) r "
        f"JOIN features f USING (sae, feature) WHERE r.total != {wanted}"
    )
    return Check(name, meaning, query, tuple(group.split(", ")))


_DISTANCES = """
(SELECT s.sae, s.feature, s.bos, s.current, s.previous, s.local, s.long_range,
  coalesce(sum(d.share) FILTER (d.low = -1), 0) AS d_bos,
  coalesce(sum(d.share) FILTER (d.low = 0), 0) AS d_current,
  coalesce(sum(d.share) FILTER (d.low = 1), 0) AS d_previous,
  coalesce(sum(d.share) FILTER (d.low BETWEEN 1 AND 8), 0) AS d_local,
  coalesce(sum(d.share) FILTER (d.low > 32), 0) AS d_long_range
FROM dfa_summary s JOIN dfa_distances d USING (sae, feature) GROUP BY ALL)"""
_PARTS = ("bos", "current", "previous", "local", "long_range")

CHECKS: tuple[Check, ...] = (
    grouped(
        "head_attribution.decoder_share",
        "decoder_share sums to 1 over the heads (0 of an empty decoder row)",
        "sum(decoder_share)",
        f"abs(sum(decoder_share) - (CASE WHEN any_value(decoder_norm) = 0 THEN 0 ELSE 1 END)) > {_SUM}",
        source="head_attribution JOIN features USING (sae, feature)",
    ),
    _one_over_heads("fve"),
    _one_over_heads("fve_active"),
    _one_over_heads("dfa_share"),
    _one_over_heads("logit_share"),
    grouped(
        "head_attribution.heads", "a feature has a row in every head of its model", "count(*)",
        "count(*) != any_value(m.n_heads)",
        source="head_attribution JOIN saes s USING (sae) JOIN models m USING (model)",
    ),
    rows(
        "features.density", "density is n_active over the SAE's evaluated tokens, at most 1",
        "density < 0 OR density > 1 OR abs(density * s.n_tokens - n_active) > 1e-6 * greatest(n_active, 1)",
        "density", "features JOIN saes s USING (sae)",
    ),
    _per_feature(
        "activation_counts.n", "the bins of each scale hold every active token", "sum(list_sum(n))",
        "f.n_active", "scale",
    ),
    rows(
        "activation_counts.bins", "50 linear bins, 30 on the log scale",
        "len(n) != CASE scale WHEN 'linear' THEN 50 WHEN 'log' THEN 30 ELSE -1 END", "scale || ' ' || len(n)",
    ),
    rows(
        "position_counts.lists", "its lists are of one length, by position",
        "len(position) = 0 OR position != list_sort(list_distinct(position)) OR len(n_top) != len(position) "
        "OR len(n_active) != len(position) OR len(sum_activation) != len(position)", "position",
    ),
    _per_feature(
        "position_counts.n_active", "active tokens at all positions are all active tokens",
        "sum(list_sum(n_active))", "f.n_active",
    ),
    _per_feature(
        "position_counts.n_top", "the strongest tokens are 2000, or all", "sum(list_sum(n_top))",
        "least(f.n_active, 2000)",
    ),
    Check(
        "position_counts.sum_activation", "summed over the positions it is mean_activation times n_active",
        f"SELECT sae, feature, r.total AS found FROM "  # noqa: S608
        "(SELECT sae, feature, list_sum(sum_activation) AS total FROM position_counts) r "
        "JOIN features f USING (sae, feature) "
        f"WHERE abs(r.total - f.mean_activation * f.n_active) > {_RELATIVE} * abs(r.total)",
    ),
    rows(
        "token_stats.precision", "precision is n_active over the feature's (role at), recall at most 1",
        "recall < 0 OR recall > 1 OR precision < 0 OR precision > 1 "
        f"OR (role = 'at' AND abs(precision * of_all - n_active) > {_ROUNDED} * of_all)",
        "precision",
        "(SELECT t.*, f.n_active AS of_all FROM token_stats t JOIN features f USING (sae, feature))",
    ),
    grouped(
        "token_stats.share", "precisions of a role sum to at most 1", "sum(precision)",
        f"sum(precision) > 1 + {_ROUNDED} * count(*)", ("sae", "feature", "role"),
    ),
    grouped(
        "dfa_distances.share", "shares of the distances sum to 1", "sum(share)",
        f"abs(sum(share) - 1) > {_SUM} OR min(share) < 0 OR min(negative) < 0",
    ),
    rows(
        "dfa_summary.distances", "its shares are those of dfa_distances",
        " OR ".join(f"abs({part} - d_{part}) > {_SUM}" for part in _PARTS),
        " || ' '  || ".join(f"'{part} ' || {part}" for part in _PARTS), _DISTANCES,
    ),
    grouped(
        "dfa_tokens.share", "shares of source tokens are positive and sum to at most 1", "sum(share)",
        f"sum(share) > 1 + {_SUM} OR min(share) <= 0",
    ),
    Check(
        "dfa_summary.n", "it counts the feature's top examples that have DFA, and how many matched",
        "SELECT sae, feature, n || ' examples, matched ' || matched AS found FROM dfa_summary s LEFT JOIN ("  # noqa: S608
        "SELECT sae, feature, count(*) AS k, avg((matched_prefix > 0)::INT) AS share FROM dfa "
        "WHERE example_group = 'top' GROUP BY sae, feature) d USING (sae, feature) "
        f"WHERE n != coalesce(k, 0) OR abs(matched - share) > {_SUM}",
    ),
    rows(
        "logit_histogram.n", "40 bins hold the whole vocabulary",
        "len(n) != 40 OR list_sum(n) != m.d_vocab", "list_sum(n)",
        "logit_histogram JOIN saes USING (sae) JOIN models m USING (model)",
    ),
    rows(
        "sae_metrics.alive", "alive and dead features are all d_sae", "alive + dead != s.d_sae",
        "alive + dead", "sae_metrics JOIN saes s USING (sae)",
    ),
    rows(
        "pruning.n_pruned", "the overlaps of the three reasons add up to the pruned",
        "n_weak + n_short + n_rare - n_weak_short - n_weak_rare - n_short_rare + n_all_three != n_pruned",
        "n_pruned",
    ),
    grouped(
        "training_density.n", "the bins of a step hold all d_sae features", "sum(n)",
        "sum(n) != any_value(s.d_sae)", ("sae", "step"), "training_density JOIN saes s USING (sae)",
    ),
    Check(
        "head_summary.n_top", "it counts the features that fire, and those whose top head it is",
        "SELECT model, layer, h.head, sae, n_features || ' and ' || n_top AS found FROM head_summary h "
        "JOIN (SELECT sae, count(*) FILTER (alive) AS k FROM features GROUP BY sae) f USING (sae) "
        "LEFT JOIN (SELECT sae, top_head AS head, count(*) AS top FROM features WHERE alive "
        "GROUP BY ALL) t USING (sae, head) WHERE n_features != k OR n_top != coalesce(top, 0)",
        ("model", "layer", "head", "sae"),
    ),
)  # fmt: skip
