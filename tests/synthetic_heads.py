"""Rows of the synthetic release about heads alone: made-up numbers that keep every definition."""

from typing import Any

import numpy as np

Row = dict[str, Any]
THRESHOLDS = (0.1, 0.3, 0.5, 0.7)
TASKS = {
    "digit-copy": "{noun} {digit}, {filler} {noun}[[ {digit}]]",
    "url": "See https://t.co/[[{resource}]]",
}


def head_rows(model: str, n_layers: int, n_heads: int, d_head: int, seed: int = 0) -> dict[str, list[Row]]:
    """Rows of all tables about heads but head_scores; head 1 of the last layer wants long prefixes.

    Its neighbour, head 0, wants one token; all others look elsewhere.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[Row]] = {name: [] for name in (
        "head_spectra", "head_prefixes", "head_text_prefixes", "head_corruption", "tasks",
        "head_task_effects",
    )}  # fmt: skip
    for layer in range(n_layers):
        for head in range(n_heads):
            at = {"model": model, "layer": layer, "head": head}
            kind = {0: "short", 1: "long"}.get(head, "") if layer == n_layers - 1 else ""
            found["head_spectra"] += [_spectrum(rng, at, circuit, d_head) for circuit in ("OV", "QK")]
            found["head_prefixes"] += _prefixes(rng, at, kind)
            found["head_text_prefixes"] += _text(rng, at, kind)
            found["head_corruption"].append(_corruption(rng, at, kind))
            found["head_task_effects"] += [
                {**at, "task": task, "ablation": ablation, "standard_error": 0.01,
                 "effect": float(rng.normal(0.0, 0.02)) + (head == 1) * (0.5 + 0.1 * layer)}
                for task in TASKS for ablation in ("zero", "mean")
            ]  # fmt: skip
    found["tasks"] = [
        {"model": model, "task": task, "template": template, "example": f"an example of {task}",
         "n_prompts": 12, "n": 12, "loss": 2.5}
        for task, template in TASKS.items()
    ]  # fmt: skip
    return found


def _spectrum(rng: np.random.Generator, at: Row, circuit: str, d_head: int) -> Row:
    s = np.sort(rng.random(d_head).astype(np.float32))[::-1].astype(np.float64)
    p = s / s.sum()
    values = rng.normal(size=d_head)
    values = values[np.argsort(-np.abs(values))]
    return {
        **at, "circuit": circuit, "singular_values": s.tolist(), "frobenius": float(np.sqrt((s**2).sum())),
        "spectral": float(s[0]), "effective_rank": float(np.exp(-(p * np.log(p)).sum())),
        "eigenvalues_real": values.tolist(), "eigenvalues_imag": [0.0] * d_head,
        "eigenvalue_share": float(values.sum() / np.abs(values).sum()),
    }  # fmt: skip


def _prefixes(rng: np.random.Generator, at: Row, kind: str) -> list[Row]:
    rows = []
    for prefix in range(1, 10):
        attention = {"short": 0.6, "long": 0.8 if prefix > 1 else 0.1}.get(kind, 0.01)
        attention += float(rng.uniform(0, 0.005))
        dla = 3 * attention + float(rng.normal(0, 0.01))
        rows.append({**at, "prefix": prefix, "attention": attention, "dla": dla, "n": 32})
    return rows


def _text(rng: np.random.Generator, at: Row, kind: str) -> list[Row]:
    weights = np.ones(11)
    if kind:
        weights[1 if kind == "short" else 4] = 30
    rows, n = [], np.sort(rng.poisson(40 * weights, size=(len(THRESHOLDS), 11)), axis=0)[::-1]
    for threshold, counts in zip(THRESHOLDS, n, strict=True):
        rows += [
            {**at, "threshold": threshold, "prefix": prefix, "n": int(count), "n_attended": int(counts.sum())}
            for prefix, count in enumerate(counts)
        ]
    return rows


def _corruption(rng: np.random.Generator, at: Row, kind: str) -> Row:
    before = 0.55 if kind else 0.02
    after = {"short": 0.45, "long": 0.05}.get(kind, 0.02)
    noise = float(rng.uniform(0, 0.01))
    attended = 12 if kind else 0
    return {
        **at, "n": 16, "before": before + noise, "after": after + noise, "n_attended": attended,
        "attended_before": before + 0.1 if kind else None, "attended_after": after + noise if kind else None,
    }  # fmt: skip
