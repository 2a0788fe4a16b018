"""Rows about training, pruning and sweeps for the synthetic release; curves are formulas, counts add up."""

import json
from typing import Any

import numpy as np

from atlas.configs import PruneConfig
from atlas.sites import Site
from atlas.tables import TABLES

Row = dict[str, Any]
MODEL = "synthetic"
STEPS = range(0, 101, 10)
WATCHED = (0, 1, 2)
BINS = 28
STAGES = ("trained", "pruned", "finetuned")


def _share(name: str, salt: str) -> float:
    """A fixed number in [0, 1) for a name, the same on every machine."""
    return sum(ord(c) * (i + 7) for i, c in enumerate(name + salt)) * 0.6180339887 % 1.0


def log_rows(sae: str, l1_coefficient: float | None = None, dead: float = 0.03) -> list[Row]:
    """Loss parts that sum to the loss, and curves that level off."""
    rows = []
    for step in STEPS:
        left = (0.955 + 0.03 * _share(sae, "rate")) ** step
        mse, sparsity = 5 * left + 1, (l1_coefficient or 0.0) * (2 - left)
        aux = 0.0 if l1_coefficient else 0.02 * left
        rows.append({
            "sae": sae, "step": step, "tokens": step * 1000, "loss": mse + sparsity + aux, "mse_loss": mse,
            "sparsity_loss": sparsity, "aux_loss": aux, "objective_loss": 0.0, "l0": 4.0 + 20 * left,
            "variance_explained": 1 - 0.9 * left, "dead_fraction": dead * (1 - left),
            "lr": 1e-3 * min(1.0, (100 - step) / 30),
            "tokens_per_second": None if step == 0 else 20_000.0 + step,
        })  # fmt: skip
    return rows


def density_rows(sae: str, d_sae: int) -> list[Row]:
    """A histogram every second logged step, its counts adding up to d_sae; rarer while training goes on."""
    rows = []
    for step in STEPS[::2]:
        middle = 22 - 8 * step / 100
        weight = np.exp(-(((np.arange(BINS) - middle) / 3) ** 2))
        count = np.floor(weight / weight.sum() * d_sae * 0.95).astype(int)
        for number, n in [(-1, d_sae - int(count.sum())), *enumerate(count.tolist())]:
            if n:
                low = None if number < 0 else -7.0 + 0.25 * number
                rows.append({"sae": sae, "step": step, "low": low, "bin": number, "n": n})
    return rows


def watched_rows(sae: str) -> list[Row]:
    """The strongest activation of the watched features at every logged step; one of them is dead."""
    return [
        {"sae": sae, "step": step, "feature": feature,
         "max_activation": 0.0 if feature == WATCHED[-1] else 1 + feature + 0.02 * step}
        for step in STEPS for feature in WATCHED
    ]  # fmt: skip


def training_tables(sae: str, d_sae: int, **log: Any) -> dict[str, list[Row]]:
    """The three tables of one SAE's training."""
    return {
        "training_log": log_rows(sae, **log),
        "training_density": density_rows(sae, d_sae),
        "training_watched": watched_rows(sae),
    }


def pruned_bits(d_sae: int, fires: np.ndarray) -> np.ndarray:
    """Why each feature was pruned: only features that never fire are, for one of every seven reasons."""
    return np.where(fires, 0, 1 + np.arange(d_sae) % 7)


def pruning_row(sae: str, bits: np.ndarray, n_tokens: int) -> Row:
    """The counts of the criteria and of their overlaps, counted one feature at a time."""
    sets = {
        "weak": 1,
        "short": 2,
        "rare": 4,
        "weak_short": 3,
        "weak_rare": 5,
        "short_rare": 6,
        "all_three": 7,
    }
    limits = PruneConfig()
    return {
        "sae": sae, "n_features": len(bits), "n_pruned": sum(int(b) != 0 for b in bits), "n_tokens": n_tokens,
        **{f"n_{name}": sum((int(b) & mask) == mask for b in bits) for name, mask in sets.items()},
        "max_activation_limit": limits.max_activation, "decoder_norm_limit": limits.decoder_norm,
        "firing_rate_limit": limits.firing_rate,
    }  # fmt: skip


def stage_rows(last: Row) -> list[Row]:
    """A row per stage; the last is the row of sae_metrics itself, the ones before are a little worse."""
    names = {field.name for field in TABLES["sae_stages"].schema}
    rows = []
    for stage, less in zip(STAGES, (0.05, 0.06, 0.0), strict=True):
        row = {key: value for key, value in last.items() if key in names} | {"stage": stage}
        row["variance_explained"] -= less
        row["l2_ratio"] *= 1 - 2 * less
        row["ce_spliced"] += less * 0.3
        zero, mean = row["ce_zero"], row["ce_mean"]
        row["ce_recovered"] = (zero - row["ce_spliced"]) / (zero - row["ce_clean"])
        row["ce_recovered_mean"] = (mean - row["ce_spliced"]) / (mean - row["ce_clean"])
        rows.append(row)
    return rows


def _engine_sae(site: Site, d_in: int, d_sae: int, l1: float, label: str, n_tokens: int) -> Row:
    suffix = f"-{label}" if label else ""
    return {
        "sae": f"{MODEL}/{site.name}.relu-{d_sae}{suffix}", "model": MODEL, "site": site.kind,
        "layer": site.layer, "head": site.head, "d_in": d_in, "d_sae": d_sae, "architecture": "relu",
        "k": None, "l1_coefficient": l1, "normalize_activations": "none", "processing": "raw",
        "include_bos": False, "tokens_trained": 100_000, "corpus": "synthetic", "n_tokens": n_tokens,
        "seed": 0, "origin": "trained", "settings": json.dumps({"l1_coefficient": l1}), "digest": "0" * 64,
        "code_version": "0.1.0",
    }  # fmt: skip


def _engine_metrics(sae: Row, split: str, n_tokens: int, partner: str | None) -> Row:
    name, l1 = sae["sae"], sae["l1_coefficient"]
    explained = 0.95 - 0.25 * min(1.0, l1 / 10) - 0.05 * _share(name, "explained")
    clean, zero, mean = 3.0, 3.4 + 0.05 * sae["layer"], 3.3 + 0.05 * sae["layer"]
    spliced = clean + 0.2 * (1 - explained)
    dead = int(sae["d_sae"] * min(0.9, 0.05 + l1 / 20 + sae["d_sae"] / 2000))
    row = {
        "sae": name, "split": split, "l0": 30 / (1 + l1) * (1 + _share(name, "l0")), "mse": 1 - explained,
        "variance_explained": explained, "cosine": explained**0.5, "l2_ratio": explained,
        "ce_clean": clean, "ce_spliced": spliced, "ce_zero": zero, "ce_mean": mean,
        "ce_recovered": (zero - spliced) / (zero - clean),
        "ce_recovered_mean": (mean - spliced) / (mean - clean), "kl": 0.8 * (spliced - clean),
        "alive": sae["d_sae"] - dead, "dead": dead, "n_tokens": n_tokens,
    }  # fmt: skip
    if sae["site"] in ("q", "k"):
        row |= {
            "partner": partner, "pattern_kl": 0.02 + 0.1 * (1 - explained), "pattern_top1": explained,
            "score_correlation": explained**0.5, "ce_pattern": clean + 0.1 * (1 - explained),
            "ce_pattern_recovered": 1 - 0.1 * (1 - explained) / (zero - clean),
        }  # fmt: skip
    return row


def engine_tables(n_layers: int, d_in: int, d_head: int, n_tokens: int) -> dict[str, list[Row]]:
    """SAEs that are described but not analysed: streams of every layer, q and k of a head, a sweep of 12."""
    found: list[tuple[Row, str | None]] = []
    for layer in range(n_layers):
        for kind in ("attn_out", "mlp_out"):
            found.append((_engine_sae(Site(kind, layer), d_in, 64, 1.0, "", n_tokens), None))
    pair = [_engine_sae(Site(kind, 0, 1), d_head, 32, 0.5, "", n_tokens) for kind in ("q", "k")]
    found += [(pair[0], pair[1]["sae"]), (pair[1], pair[0]["sae"])]
    for d_sae in (64, 128, 256):
        for l1 in (0.1, 0.3, 1.0, 10.0):
            sae = _engine_sae(Site("q", 0, 0), d_head, d_sae, l1, f"l1_coefficient-{l1:g}", n_tokens)
            found.append((sae, None))
    rows: dict[str, list[Row]] = {"saes": [], "sae_metrics": []}
    for sae, partner in found:
        rows["saes"].append(sae)
        splits = [_engine_metrics(sae, split, n_tokens, partner) for split in ("eval", "eval_with_bos")]
        rows["sae_metrics"] += splits
        dead = splits[0]["dead"] / sae["d_sae"]
        made = training_tables(sae["sae"], sae["d_sae"], l1_coefficient=sae["l1_coefficient"], dead=dead)
        for table, more in made.items():
            rows.setdefault(table, []).extend(more)
    return rows
