"""Measurements of heads as rows of the declared tables."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from atlas.configs import TaskConfig
from atlas.heads import spectra
from atlas.heads.ablation import KINDS, Ablations
from atlas.heads.prefixes import THRESHOLD, THRESHOLDS, Corruption, PrefixCurve
from atlas.heads.prompts import Prompts
from atlas.heads.scores import HeadScore
from atlas.lm.load import LanguageModel

Row = dict[str, Any]


def _heads(model: LanguageModel) -> list[tuple[int, int]]:
    shape = model.shape
    return [(layer, head) for layer in range(shape.n_layers) for head in range(shape.n_heads)]


def _score(model: LanguageModel, at: tuple[int, int], score: str, value: float, n: int, how: str) -> Row:
    return {
        "model": model.name, "layer": at[0], "head": at[1], "score": score, "value": value, "n": n, "how": how
    }  # fmt: skip


def score_rows(model: LanguageModel, scores: Sequence[HeadScore]) -> list[Row]:
    """Scores of attention."""
    return [{"model": model.name, **row._asdict()} for row in scores]


def weight_rows(model: LanguageModel, bos: int, tokenizer: Any) -> dict[str, list[Row]]:
    """Spectra, and scores of weights, of every head."""
    d_vocab, layers = model.shape.d_vocab, range(model.shape.n_layers)
    tokens = spectra.sampled_tokens(d_vocab, {bos})
    streams = spectra.token_streams(model, tokens, bos, layers)
    sequences = spectra.known_sequences(tokenizer)
    found: dict[str, list[Row]] = {"head_spectra": [], "head_scores": []}
    lengths = [len(sequence) for sequence in sequences]
    flat = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    ordered = spectra.token_streams(model, flat, bos, layers) if sequences else {}
    for layer in layers:
        circuits = spectra.spectra(model, layer)
        copied = spectra.copying(model, layer, tokens, streams[layer])
        of_sequences = list(torch.split(ordered[layer], lengths)) if sequences else []
        right, pairs = spectra.successors(model, layer, sequences, of_sequences)
        for head, circuit in enumerate(circuits):
            at = (layer, head)
            found["head_spectra"] += [_spectrum(model, at, name, one) for name, one in circuit.items()]
            found["head_scores"] += _weight_scores(model, at, circuit, copied)
            if pairs:
                value = int(right[head]) / pairs
                how = "weights: share of pairs of known sequences"
                found["head_scores"].append(_score(model, at, "successor", value, pairs, how))
    return found


def _weight_scores(
    model: LanguageModel, at: tuple[int, int], circuit: dict[str, spectra.Spectrum], copied: spectra.Copying
) -> list[Row]:
    d_head, how = model.shape.d_head, "weights: share of the eigenvalues"
    sampled = "weights: share of sampled tokens"
    return [
        _score(model, at, "copying", circuit["OV"].share, d_head, how),
        _score(model, at, "matching", circuit["QK"].share, d_head, how),
        _score(model, at, "copying_top10", int(copied.top[at[1]]) / copied.n, copied.n, sampled),
        _score(model, at, "copy_suppression", int(copied.bottom[at[1]]) / copied.n, copied.n, sampled),
        _score(model, at, "ov_rank", spectra.effective_rank(circuit["OV"].singular_values), d_head,
               "weights: effective rank"),
        _score(model, at, "qk_rank", spectra.effective_rank(circuit["QK"].singular_values), d_head,
               "weights: effective rank"),
    ]  # fmt: skip


def _spectrum(model: LanguageModel, at: tuple[int, int], circuit: str, one: spectra.Spectrum) -> Row:
    s = one.singular_values
    return {
        "model": model.name, "layer": at[0], "head": at[1], "circuit": circuit,
        "singular_values": s.tolist(), "frobenius": float(s.square().sum().sqrt()),
        "spectral": float(s.max()), "effective_rank": spectra.effective_rank(s),
        "eigenvalues_real": one.eigenvalues.real.tolist(),
        "eigenvalues_imag": one.eigenvalues.imag.tolist(), "eigenvalue_share": one.share,
    }  # fmt: skip


def prefix_rows(model: LanguageModel, curve: PrefixCurve) -> list[Row]:
    """Rows of ``head_prefixes``."""
    return [
        {
            "model": model.name, "layer": layer, "head": head, "prefix": k + 1,
            "attention": float(curve.attention[layer, head, k]), "dla": float(curve.dla[layer, head, k]),
            "n": curve.n,
        }
        for layer, head in _heads(model) for k in range(curve.attention.shape[2])
    ]  # fmt: skip


def text_rows(model: LanguageModel, matches: Int[Tensor, "layer head threshold prefix"]) -> list[Row]:
    """Rows of ``head_text_prefixes``."""
    totals = matches.sum(3)
    return [
        {
            "model": model.name, "layer": layer, "head": head, "threshold": threshold, "prefix": k,
            "n": int(matches[layer, head, t, k]), "n_attended": int(totals[layer, head, t]),
        }
        for layer, head in _heads(model) for t, threshold in enumerate(THRESHOLDS)
        for k in range(matches.shape[3])
    ]  # fmt: skip


def corruption_rows(model: LanguageModel, cut: Corruption) -> list[Row]:
    """Rows of ``head_corruption``; means over no pair are None."""
    found = []
    for layer, head in _heads(model):
        before, after = cut.before[layer, head], cut.after[layer, head]
        attended = before > THRESHOLD
        found.append(
            {
                "model": model.name, "layer": layer, "head": head, "n": len(before),
                "before": _mean(before), "after": _mean(after), "n_attended": int(attended.sum()),
                "attended_before": _mean(before[attended]), "attended_after": _mean(after[attended]),
            }
        )  # fmt: skip
    return found


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def ablation_rows(model: LanguageModel, found: Ablations) -> list[Row]:
    """Scores ``ablation_zero`` and ``ablation_mean``: the rise of the loss on text without a head."""
    effect, n = found.effect(), int(found.n.sum())
    how = {"zero": "loss on text: the head's output set to zero", "mean": "loss on text: set to its mean"}
    return [
        _score(model, at, f"ablation_{kind}", float(effect[i, at[0], at[1]]), n, how[kind])
        for i, kind in enumerate(KINDS)
        for at in _heads(model)
    ]


def task_row(model: LanguageModel, task: TaskConfig, prompts: Prompts, found: Ablations) -> Row:
    """Row of ``tasks``."""
    n = int(found.n.sum())
    return {
        "model": model.name, "task": task.name, "template": task.template, "example": prompts.texts[0],
        "n_prompts": len(prompts.texts), "n": n, "loss": float(found.clean.sum()) / n,
    }  # fmt: skip


def task_effect_rows(model: LanguageModel, task: str, layers: Iterable[int], found: Ablations) -> list[Row]:
    """Rows of ``head_task_effects``."""
    effect, error = found.effect(), found.standard_error()
    return [
        {
            "model": model.name, "layer": layer, "head": head, "task": task, "ablation": kind,
            "effect": float(effect[k, i, head]), "standard_error": _finite(float(error[k, i, head])),
        }
        for k, kind in enumerate(KINDS) for i, layer in enumerate(layers)
        for head in range(model.shape.n_heads)
    ]  # fmt: skip


def _finite(value: float) -> float | None:
    return None if value != value else value
