"""Checks of what is measured of heads by themselves: ranges, sums, and that nothing is missing."""

from atlas.store.checks.check import Check, grouped, rows

_CLOSE = 1e-4
_ATTENTION = ("previous_token", "duplicate", "induction", "duplicate_text", "induction_text", "first_token",
              "self_attention", "copying_top10", "copy_suppression", "successor")  # fmt: skip
"""Scores that are shares."""
_SQUARES = "list_sum(list_transform(singular_values, lambda s: s::DOUBLE * s))"

CHECKS: tuple[Check, ...] = (
    rows(
        "head_scores.range", "shares of attention, tokens and pairs lie between 0 and 1",
        f"score IN {_ATTENTION} AND (value < -{_CLOSE} OR value > 1 + {_CLOSE})", "value",
    ),
    rows(
        "head_scores.eigenvalues", "shares of eigenvalues lie between -1 and 1",
        f"score IN ('copying', 'matching') AND abs(value) > 1 + {_CLOSE}", "value",
    ),
    rows(
        "head_spectra.values", "singular values descend, the first is the spectral norm, their squares sum "
        "to the Frobenius norm's, and the effective rank lies between 1 and their number",
        "list_reverse_sort(singular_values) != singular_values "
        f"OR abs(singular_values[1] - spectral) > {_CLOSE} * spectral "
        f"OR abs({_SQUARES} - frobenius ** 2) > {_CLOSE} * frobenius ** 2 "
        f"OR (spectral > 0 AND effective_rank < 1 - {_CLOSE}) "
        f"OR effective_rank > len(singular_values) + {_CLOSE}",
        "effective_rank",
    ),
    rows(
        "head_spectra.eigenvalues", "as many real as imaginary parts, and the share is made from them",
        "len(eigenvalues_real) != len(eigenvalues_imag) OR abs(eigenvalue_share) > 1 + 1e-4",
        "eigenvalue_share",
    ),
    rows(
        "head_prefixes.attention", "attention lies between 0 and 1",
        f"attention < -{_CLOSE} OR attention > 1 + {_CLOSE}", "attention",
    ),
    grouped(
        "head_text_prefixes.n", "matches of each length sum to the pairs above the threshold", "sum(n)",
        "sum(n) != min(n_attended) OR min(n_attended) != max(n_attended) OR min(n) < 0",
        ("model", "layer", "head", "threshold"),
    ),
    rows(
        "head_corruption.range", "attention lies between 0 and 1, and above 0.3 where it counts as attended",
        "n_attended > n OR (n_attended > 0) = (attended_before IS NULL) OR attended_before <= 0.3 "
        + "".join(
            f"OR {c} < -{_CLOSE} OR {c} > 1 + {_CLOSE} "
            for c in ("before", "after", "attended_before", "attended_after")
        ), "concat_ws(' ', before, after, attended_before, attended_after)",
    ),
    grouped(
        "tasks.heads", "a task has an effect for every head and both kinds of ablation", "count(e.effect)",
        "count(e.effect) != 2 * max(m.n_layers) * max(m.n_heads)", ("model", "task"),
        "tasks JOIN models m USING (model) LEFT JOIN head_task_effects e USING (model, task)",
    ),
    rows(
        "head_task_effects.task", "its task exists, and the ablation is zero or mean",
        "ablation NOT IN ('zero', 'mean') OR (model, task) NOT IN (SELECT (model, task) FROM tasks)",
        "task || ' ' || ablation",
    ),
)  # fmt: skip
