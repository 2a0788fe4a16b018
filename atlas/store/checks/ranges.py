"""Checks of values that follow from the definition of a column: ranges, extremes, what NULL means."""

from atlas.store.checks.check import Check, grouped, rows
from atlas.tables import F32, F64, TABLES

_CLOSE = 1e-4
"""How far, in parts of it, a stored 32-bit number may be from one that it has to equal."""

_ROUNDED = 1.01 * 2.0 ** -(TABLES["examples"].column("active_values").bits or 0)


def _unit(name: str, columns: tuple[str, ...], low: int = 0) -> Check:
    """Columns that lie in [low, 1], but for rounding, or are NULL."""
    outside = " OR ".join(f"{c} < {low} - {_CLOSE} OR {c} > 1 + {_CLOSE}" for c in columns)
    shown = " || ' ' || ".join(f"coalesce({c}::VARCHAR, 'NULL')" for c in columns)
    return rows(name, f"{', '.join(columns)} lie between {low} and 1", outside, shown)


def _numbers() -> list[Check]:
    """No column of any table holds NaN or infinity: what has no value is NULL."""
    found = []
    for name, declared in TABLES.items():
        columns = [c.name for c in declared.columns if c.type in (F32, F64)]
        if columns:
            offends = " OR ".join(f'isnan("{c}") OR isinf("{c}")' for c in columns)
            shown = "concat_ws(' ', " + ", ".join(f"'{c}', \"{c}\"" for c in columns) + ")"
            found.append(rows(f"{name}.numbers", "no NaN and no infinity", offends, shown))
    return found


_SHARES = ("bos", "current", "previous", "same_token", "after_match")

CHECKS: tuple[Check, ...] = (
    *_numbers(),
    _unit("head_attribution.range", ("decoder_share", *(f"dfa_{name}" for name in _SHARES))),
    _unit("dfa_summary.range", (*_SHARES, "local", "long_range", "matched")),
    _unit(
        "features.range", ("top_position_share", "top_token_share", "top_previous_share", "top_pair_share")
    ),
    _unit("features.cosine", ("encoder_decoder_cosine",), -1),
    _unit("neighbours.cosine", ("cosine",), -1),
    _unit("coactivation.range", ("jaccard",)),
    _unit("coactivation.pearson", ("pearson",), -1),
    rows(
        "features.alive", "exactly the features that fire are alive and have activations",
        "alive != (n_active > 0) OR alive != (max_activation > 0) OR alive = (quantiles IS NULL) "
        "OR alive = (mean_activation IS NULL)", "alive || ' ' || n_active",
    ),
    rows(
        "features.quantiles", "11 of them, ascending to max_activation, the mean between the ends",
        "len(quantiles) != 11 OR list_sort(quantiles) != quantiles "
        f"OR abs(quantiles[11] - max_activation) > {_CLOSE} * max_activation "
        f"OR mean_activation > max_activation * (1 + {_CLOSE}) "
        f"OR mean_activation < quantiles[1] * (1 - {_CLOSE})", "quantiles::VARCHAR",
    ),
    rows(
        "features.top_pair_share", "a pair of tokens is at most as common as the commonest of either",
        "top_pair_share > least(top_token_share, top_previous_share)", "top_pair_share",
    ),
    Check(
        "features.top_share", "its top head has the largest decoder share",
        "SELECT sae, feature, coalesce(f.top_head::VARCHAR, 'none') || ', largest in ' || a.best AS found "
        "FROM features f JOIN ("
        "SELECT sae, feature, max(decoder_share) AS most, arg_max(head, decoder_share) AS best, "
        "map(list(head), list(decoder_share)) AS shares FROM head_attribution GROUP BY sae, feature"
        ") a USING (sae, feature) WHERE shares[f.top_head] IS DISTINCT FROM a.most",
    ),
    Check(
        "features.strongest", "the first top example is max_activation",
        "SELECT sae, feature, f.max_activation || ', first top example ' || coalesce(e.activation, 0) "
        "AS found FROM features f LEFT JOIN (SELECT sae, feature, activation FROM examples "
        "WHERE example_group = 'top' AND rank = 0) e USING (sae, feature) "
        "WHERE sae IN (SELECT DISTINCT sae FROM examples) AND coalesce(e.activation, 0) != f.max_activation",
    ),
    rows(
        "activation_counts.edges", "the last edge is not below the first, and no bin below 0",
        "high < low OR list_min(n) < 0", "low || ' to ' || high",
    ),
    rows(
        "examples.fires", "it fires; a near miss does not, and has a pre-activation instead",
        "(example_group = 'negative') != (near_miss IS NOT NULL) "
        "OR (example_group = 'negative') != (activation <= 0)", "activation",
    ),
    rows(
        "examples.active", "the block's activations hold the example's own, and none of a near miss",
        "len(active_positions) != len(active_values) OR CASE WHEN example_group = 'negative' "
        "THEN list_contains(active_positions, position) "
        "ELSE coalesce(abs(active_values[list_position(active_positions, position)] - activation), 1e9) "
        f"> {_ROUNDED} * list_max(active_values) END",
        "activation",
    ),
    grouped(
        "examples.blocks", "at most one top example per block", "max(block)",
        "count(DISTINCT block) < count(*)",
        source="(SELECT sae, feature, block FROM examples WHERE example_group = 'top')",
    ),
    Check(
        "logit_histogram.range", "its ends are the strongest logit effects",
        "SELECT sae, feature, h.low || ' to ' || h.high AS found FROM logit_histogram h JOIN ("  # noqa: S608
        "SELECT sae, feature, min(value) AS low, max(value) AS high FROM logit_effects "
        "WHERE rank = 0 GROUP BY sae, feature) e USING (sae, feature) "
        f"WHERE greatest(abs(e.low - h.low), abs(e.high - h.high)) > {_CLOSE} * (h.high - h.low)",
    ),
    rows(
        "position_products.centred", "one product per position, and those centred have mean 0",
        "len(products) != len(centred) "
        f"OR abs(list_sum(centred)) > {_CLOSE} * len(centred) * (1 + list_max(centred))", "list_sum(centred)",
    ),
)  # fmt: skip
