"""Exports in SAEDashboard's and Neuronpedia's formats, ours or others', read back as rows of tables.

Each function gives Arrow tables by name, with the columns that the format holds under the names that they
have in a release: features, activation_histogram, logit_effects, logit_histogram, coactivation,
head_attribution, examples, dfa, and for Neuronpedia neighbours and feature_annotations. What a format says
otherwise than the tables: tokens are texts (columns ``text`` and ``tokens``), DFA is summed over heads
(``by_source``), the features of coactivation come by Pearson correlation.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from atlas.errors import StoreError
from atlas.interop.dashboards.grouping import places
from atlas.interop.dashboards.saedashboard import SETTINGS
from atlas.tables import F32, F64, I8, I16, I32, I64, STR

_KEY = [("sae", STR), ("feature", I32)]
_EXAMPLE = [*_KEY, ("example_group", STR), ("rank", I16)]
SCHEMAS = {
    "features": pa.schema([*_KEY, ("n_active", I64), ("density", F64), ("max_activation", F32)]),
    "activation_histogram": pa.schema(
        [*_KEY, ("scale", STR), ("bin", I16), ("low", F32), ("high", F32), ("n", I32)]
    ),
    "logit_effects": pa.schema([*_KEY, ("sign", I8), ("rank", I16), ("text", STR), ("value", F32)]),
    "logit_histogram": pa.schema([*_KEY, ("low", F32), ("high", F32), ("n", pa.list_(I32))]),
    "coactivation": pa.schema([*_KEY, ("other", I32), ("pearson", F32)]),
    "head_attribution": pa.schema([*_KEY, ("head", I16), ("decoder_share", F32)]),
    "examples": pa.schema([
        *_EXAMPLE, ("block", I32), ("position", I16), ("activation", F32),
        ("active_positions", pa.list_(I16)), ("active_values", pa.list_(F32)), ("tokens", pa.list_(STR)),
    ]),
    "dfa": pa.schema([*_EXAMPLE, ("by_source", pa.list_(F32))]),
    "neighbours": pa.schema([*_KEY, ("rank", I16), ("other", I32), ("cosine", F32)]),
    "feature_annotations": pa.schema([*_KEY, ("label", STR), ("notes", STR)]),
}  # fmt: skip
"""What is read, by table."""
SEQUENCES = pa.schema([
    ("layer", I16), ("head", I16), ("sequence_id", I32), ("interval", I16), ("max_activation", F32),
    ("seq_len", I32), ("tokens", pa.list_(STR)), ("attention_indices", pa.list_(I32)),
    ("attention_values", pa.list_(F32)),
])  # fmt: skip
"""A pattern of a head; an index is destination * seq_len + source."""
Rows = dict[str, list[dict[str, Any]]]
Tables = dict[str, pa.Table]


def read_saedashboard(folder: Path) -> Tables:
    """All ``batch-N.json`` of a folder; StoreError if there is none or one cannot be read.

    ``block`` of the examples is NULL, for the format does not name it.
    """
    return _joined(saedashboard_batches(folder))


def saedashboard_batches(folder: Path) -> Iterator[Tables]:
    """The same, a file at a time."""
    settings = folder / SETTINGS
    about = _parse(settings) if settings.is_file() else {}
    for path in _numbered(folder, "batch-*.json"):
        batch = _parse(path)
        rows: Rows = defaultdict(list)
        try:
            sae = about.get("sae") or f"{batch['model_id']}/{batch['layer']}-{batch['sae_set']}"
            for entry in batch["features"]:
                key = {"sae": sae, "feature": int(entry["feature_index"])}
                _add_feature(rows, key, entry, entry["activations"])
                _add_examples(rows, key, entry["activations"], _n_active(entry))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise StoreError(f"{path} is no batch of SAEDashboard: {error!r}") from None
        yield _tables(rows)


def read_neuronpedia(folder: Path) -> Tables:
    """One source of a bulk import (``MODEL/LAYER-SET``); StoreError if it is none or cannot be read."""
    return _joined(neuronpedia_batches(folder))


def neuronpedia_batches(folder: Path) -> Iterator[Tables]:
    """The same, a batch of features with their activations and explanations at a time."""
    path = folder / "source.jsonl"
    if not path.is_file():
        raise StoreError(f"{folder} holds no source.jsonl, so it is no source of Neuronpedia")
    source = _parse(path)
    for path in _numbered(folder / "features", "batch-*.jsonl.gz"):
        rows: Rows = defaultdict(list)
        try:
            sae = source.get("saelensSaeId") or f"{source['modelId']}/{source['id']}"
            activations = defaultdict(list)
            for line in _lines(folder / "activations" / path.name):
                activations[line["index"]].append(line)
            for entry in _lines(path):
                key = {"sae": sae, "feature": int(entry["index"])}
                found = [_as_dashboard(line) for line in activations[entry["index"]]]
                _add_feature(rows, key, entry, found)
                near = zip(entry["topkCosSimIndices"], entry["topkCosSimValues"], strict=True)
                rows["neighbours"] += [
                    key | {"rank": rank, "other": other, "cosine": cosine}
                    for rank, (other, cosine) in enumerate(near)
                ]
                _add_examples(rows, key, found, _n_active(entry))
            for line in _lines(folder / "explanations" / path.name):
                label = {"label": line["description"], "notes": line.get("notes")}
                rows["feature_annotations"].append({"sae": sae, "feature": int(line["index"])} | label)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise StoreError(f"{path} is no batch of Neuronpedia: {error!r}") from None
        yield _tables(rows)


def read_headvis(folder: Path) -> Tables:
    """A HeadVis tree: ``scatter`` with a row per head, ``sequences`` with one per pattern that is shown.

    Raises:
        StoreError: the folder is no such tree, or a file in it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise StoreError(f"{folder} holds no config.json, so it is no tree of HeadVis")
    config = _parse(path)
    path = folder / "scatter_data.json"
    try:
        scatter = pa.Table.from_pylist(_parse(path))
        rows = []
        for layer, head in config["heads"]:
            name = config["head_data_pattern"].format(layer=layer, head=head)
            path = folder / "heads" / name
            rows += [
                {"layer": layer, "head": head} | {n: one[n] for n in SEQUENCES.names[2:]}
                for one in _parse(path)["sequences"]
            ]
        return {"scatter": scatter, "sequences": pa.Table.from_pylist(rows, schema=SEQUENCES)}
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise StoreError(f"cannot read {path} of a HeadVis tree: {error!r}") from None


def _as_dashboard(line: Mapping[str, Any]) -> dict[str, Any]:
    """A row of ``activations`` under SAEDashboard's names, with its place in the release where it says so."""
    found = {
        "bin_min": line["binMin"], "bin_max": line["binMax"], "bin_contains": line["binContains"],
        "tokens": line["tokens"], "values": line["values"],
        "qualifying_token_index": line["qualifyingTokenIndex"],
    }  # fmt: skip
    if line.get("dfaTargetIndex") is not None:
        found["dfa_values"] = line["dfaValues"]
    place = str(line.get("dataIndex") or "").split(":")
    if len(place) == 4:
        found["place"] = int(place[0]), place[2], int(place[3])
    return found


def _n_active(entry: Mapping[str, Any]) -> int:
    return sum(map(int, entry["freq_hist_data_bar_heights"]))


def _add_feature(
    rows: Rows, key: dict[str, Any], entry: Mapping[str, Any], activations: list[dict[str, Any]]
) -> None:
    """Everything about a feature but its examples."""
    middles, heights = entry["freq_hist_data_bar_values"], entry["freq_hist_data_bar_heights"]
    edges = _edges(middles)
    rows["activation_histogram"] += [
        key | {"scale": "linear", "bin": i, "low": edges[i], "high": edges[i + 1], "n": int(n)}
        for i, n in enumerate(heights)
    ]
    highest = max((max(shown["values"]) for shown in activations), default=0.0)
    rows["features"].append(
        key | {"n_active": _n_active(entry), "density": entry["frac_nonzero"], "max_activation": highest}
    )
    for name, sign in (("neg", -1), ("pos", 1)):
        effects = zip(entry[f"{name}_str"], entry[f"{name}_values"], strict=True)
        rows["logit_effects"] += [
            key | {"sign": sign, "rank": rank, "text": text, "value": value}
            for rank, (text, value) in enumerate(effects)
        ]
    edges = _edges(entry["logits_hist_data_bar_values"])
    if len(edges):
        counts = [int(n) for n in entry["logits_hist_data_bar_heights"]]
        rows["logit_histogram"].append(key | {"low": edges[0], "high": edges[-1], "n": counts})
    together = zip(entry["correlated_features_indices"], entry["correlated_features_pearson"], strict=True)
    rows["coactivation"] += [key | {"other": other, "pearson": pearson} for other, pearson in together]
    rows["head_attribution"] += [
        key | {"head": head, "decoder_share": share}
        for head, share in enumerate(entry["decoder_weights_dist"])
    ]


def _edges(middles: list[float]) -> np.ndarray:
    """The edges of equal bins of which the middles are given (of one bin alone: a width of 0)."""
    if not middles:
        return np.empty(0)
    half = (middles[-1] - middles[0]) / (2 * max(len(middles) - 1, 1))
    return np.linspace(middles[0] - half, middles[-1] + half, len(middles) + 1)


def _add_examples(rows: Rows, key: dict[str, Any], activations: list[dict[str, Any]], n_active: int) -> None:
    for shown, (block, group, rank) in zip(activations, places(activations, n_active), strict=True):
        values, position = shown["values"], shown["qualifying_token_index"]
        active = [i for i, value in enumerate(values) if value]
        example = key | {"example_group": group, "rank": rank}
        rows["examples"].append(example | {
            "block": block, "position": position, "activation": values[position],
            "active_positions": active, "active_values": [values[i] for i in active],
            "tokens": shown["tokens"],
        })  # fmt: skip
        if shown.get("dfa_values"):
            rows["dfa"].append(example | {"by_source": shown["dfa_values"]})


def _tables(rows: Rows) -> Tables:
    return {name: pa.Table.from_pylist(rows[name], schema=schema) for name, schema in SCHEMAS.items()}


def _joined(batches: Iterable[Tables]) -> Tables:
    held = list(batches)
    return {name: pa.concat_tables([batch[name] for batch in held]) for name in SCHEMAS}


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder by their number; StoreError if there is none."""
    paths = [path for path in folder.glob(pattern) if path.name.split("-")[1].split(".")[0].isdigit()]
    if not paths:
        raise StoreError(f"{folder} holds no {pattern}")
    return sorted(paths, key=lambda path: int(path.name.split("-")[1].split(".")[0]))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a gzipped file of JSON lines; none where the file is not there."""
    if not path.is_file():
        return
    try:
        with gzip.open(path, "rt", encoding="utf8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, EOFError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None
