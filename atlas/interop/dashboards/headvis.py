"""HeadVis's tree: ``config.json``, ``scatter_data.json`` with a row per head, ``heads/L{l}H{h}.json``.

It lies in ``MODEL/headvis/CORPUS``, where Neuronpedia's loaders look for it. A release holds no attention
patterns, so the model is run over its text, once for all heads.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import numpy.typing as npt

from atlas.errors import ModelError, StoreError
from atlas.interop.dashboards.headvis_heads import N_INTERVALS, head_object, scatter_rows
from atlas.interop.dashboards.headvis_metrics import DESCRIPTIONS, PATTERN_METRICS, other_metrics
from atlas.interop.dashboards.rows import token_strings
from atlas.interop.dashboards.saedashboard import dumps
from atlas.interop.dashboards.selection import Part, plain_name
from atlas.progress import Progress
from atlas.settings import Settings

if TYPE_CHECKING:
    from atlas.heads.samples import HeadSamples, PatternPass
    from atlas.lm.load import LanguageModel

BLOCKS = 2048
_ENTRIES = 2**24
"""Entries of one layer's patterns that are held at a time."""


def write_headvis(
    con: duckdb.DuckDBPyConnection,
    parts: Sequence[Part],
    layers: Sequence[int],
    folder: Path,
    made_from: Mapping[str, str],
    settings: Settings,
    progress: Progress,
    n_blocks: int = BLOCKS,
    model_name: str | None = None,
) -> None:
    """Write the tree of one model's heads (of some layers, all by default) into ``folder``.

    Memory holds one layer's patterns of a few blocks, and of each head the patterns that are kept.

    Raises:
        StoreError: the release holds several models, of which ``parts`` name no single one, or no text.
        ModelError: the model is not here, or is another one than the release describes.
    """
    model = _one_model([part.model for part in parts])
    loaded = _load(con, model, model_name, settings)
    shown = sorted(set(layers)) or list(range(loaded.shape.n_layers))
    work, n_done, length = _run(con, loaded, n_blocks, progress)
    dataset = str(con.execute("SELECT corpus FROM docs ORDER BY block LIMIT 1").fetchall()[0][0])
    place = folder / plain_name(model).lower() / "headvis" / plain_name(dataset)
    (place / "heads").mkdir(parents=True)
    (place / "attributions").mkdir()
    others = other_metrics(con, model, parts)
    words = token_strings(con, model)
    heads = [(layer, head) for layer in shown for head in range(loaded.shape.n_heads)]
    for layer, head in heads:
        blocks = _texts(con, work.heads[layer][head])
        payload = head_object(work, layer, head, blocks, words)
        (place / "heads" / f"L{layer}H{head}.json").write_text(dumps(payload) + "\n", encoding="utf8")
    (place / "scatter_data.json").write_text(dumps(scatter_rows(work, heads, others)) + "\n", encoding="utf8")
    config = _config(model, dataset, loaded, heads, list(others), work)
    config["pipeline_config"] |= {"n_sequences": n_done, "seq_len": length, **made_from}
    (place / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf8")
    for name in ("server_config.json", "attributions/manifest.json"):  # empty: nothing but these files
        (place / name).write_text("{}\n", encoding="utf8")


def _one_model(models: Sequence[str]) -> str:
    names = sorted(set(models))
    if len(names) != 1:
        raise StoreError(f"this release holds the models {', '.join(names)}; name an SAE of one with --sae")
    return names[0]


def _load(
    con: duckdb.DuckDBPyConnection, model: str, model_name: str | None, settings: Settings
) -> "LanguageModel":
    """The model that the release describes: as the release's build named it, unless a name is given."""
    from atlas.configs import ModelConfig
    from atlas.lm.load import load_model
    from atlas.lm.runtime import prepare_torch

    (digest,) = con.execute("SELECT digest FROM models WHERE model = ?", [model]).fetchall()[0]
    # Folding changes no attention pattern, so that the model is taken as it is.
    name = model_name or _built_from(con, model)
    loaded = load_model(ModelConfig(name, "raw"), prepare_torch(settings))
    if loaded.files.digest != digest:
        raise ModelError(
            f"model {name!r} has the digest {loaded.files.digest[:12]}, the release's model {model!r} has "
            f"{digest[:12]}; name the right one with --model"
        )
    return loaded


def _built_from(con: duckdb.DuckDBPyConnection, model: str) -> str:
    """The name under which the build found the model; its short name where the release does not say."""
    rows = con.execute("SELECT value FROM provenance WHERE key = 'config'").fetchall()
    try:
        name = json.loads(rows[0][0])["model"]["name"]
    except (IndexError, ValueError, KeyError, TypeError):
        return model
    return name if isinstance(name, str) and Path(name).name == model else model


def _run(
    con: duckdb.DuckDBPyConnection, model: "LanguageModel", n_blocks: int, progress: Progress
) -> tuple["PatternPass", int, int]:
    """One pass of the model over the first blocks of the text; with the number of blocks and their length."""
    import torch

    from atlas.heads.samples import PatternPass

    shape = model.shape
    rows = con.execute("SELECT len(tokens), count(*) FROM docs GROUP BY 1").fetchall()
    if len(rows) != 1:
        raise StoreError(f"the release's text has blocks of {len(rows)} lengths; allowed: one")
    length, there = rows[0]
    total = min(n_blocks, there)
    work = PatternPass(shape.n_layers, shape.n_heads)

    def take(layer: int) -> Any:
        def hook(value: torch.Tensor, hook: Any) -> None:  # noqa: ARG001 - the hook protocol passes both
            work.update(layer, value.float())

        return hook

    hooks = [(f"blocks.{layer}.attn.hook_pattern", take(layer)) for layer in range(shape.n_layers)]
    size = max(1, min(16, _ENTRIES // (shape.n_heads * length * length)))
    done = 0
    for blocks, tokens in _batches(con, total, size):
        batch = torch.from_numpy(tokens).to(model.device)
        work.begin(batch, blocks)
        with torch.no_grad():
            model.bridge.run_with_hooks(batch, return_type=None, fwd_hooks=hooks)
        done += len(blocks)
        progress.update(done, total, "attention patterns")
    return work, done, length


def _batches(
    con: duckdb.DuckDBPyConnection, total: int, size: int
) -> Iterator[tuple[list[int], npt.NDArray[np.int64]]]:
    for start in range(0, total, size):
        sql = "SELECT block, tokens FROM docs ORDER BY block LIMIT ? OFFSET ?"
        rows = con.execute(sql, [min(size, total - start), start]).fetchall()
        yield [block for block, _ in rows], np.array([tokens for _, tokens in rows], np.int64)


def _texts(con: duckdb.DuckDBPyConnection, samples: "HeadSamples") -> dict[int, list[int]]:
    blocks = sorted({kept.block for _, kept in [*samples.top, *samples.drawn]})
    sql = "SELECT block, tokens FROM docs WHERE block IN (SELECT unnest($1::INTEGER[]))"
    return dict(con.execute(sql, [blocks]).fetchall())


def _config(
    model: str,
    dataset: str,
    loaded: "LanguageModel",
    heads: Sequence[tuple[int, int]],
    others: list[str],
    work: "PatternPass",
) -> dict[str, Any]:
    """What the frontend shows and how, and how the tree was made."""
    descriptions = DESCRIPTIONS | {name: DESCRIPTIONS.get(name, name) for name in others}
    metrics = [*PATTERN_METRICS, *others]
    return {
        "model_name": model, "np_model_id": plain_name(model).lower(), "dataset_name": dataset,
        "heads": [list(pair) for pair in heads],
        "n_layers": loaded.shape.n_layers, "n_heads": loaded.shape.n_heads, "n_intervals": N_INTERVALS,
        "metrics": metrics, "metric_descriptions": {name: descriptions[name] for name in metrics},
        "head_data_pattern": "L{layer}H{head}.json", "has_umap": False, "umap_heads": [],
        "custom_plots": [
            {"key": "qk_distance_histogram", "label": "Q-K distance"},
            {"key": "histogram", "label": "Activation distribution"},
        ],
        "custom_tables": [
            {"key": "top_query_tokens", "label": "Top query tokens"},
            {"key": "top_key_tokens", "label": "Top key tokens"},
        ],
        "statistics_display": {
            "n_samples": {"label": "Samples kept", "format": "default"},
            "mean_max_activation": {"label": "Mean max activation", "format": "default"},
        },
        "pipeline_config": {
            "model_name": model, "np_model_id": plain_name(model).lower(), "dataset_name": dataset,
            "dtype": "float32", "attn_implementation": "eager", "model_digest": loaded.files.digest,
            **{f"sampling_{name}": value for name, value in work.sampling._asdict().items()},
        },
    }  # fmt: skip
