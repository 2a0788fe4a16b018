"""Neuronpedia's folder for bulk import: ``MODEL/LAYER-SET/`` with JSON lines, those of features gzipped.

Nothing in it depends on the clock: dates are the release's, ids are hashes of what they name.
"""

import gzip
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc

from atlas.interop.dashboards.examples import Example
from atlas.interop.dashboards.pages import Page, Pages
from atlas.interop.dashboards.saedashboard import BATCH, describe, dumps
from atlas.interop.dashboards.selection import Part, plain_name
from atlas.progress import Progress

CREATOR = "clkht01d40000jv08hvalcvly"
"""The user that a fresh Neuronpedia has."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """What every row of an export says: who made it and when, and what the release is."""

    release: str
    created: str
    """ISO 8601, UTC."""
    creator: str = CREATOR
    creator_name: str = "Head Atlas"
    made_from: Mapping[str, str] = field(default_factory=dict)
    labels: pa.Table | None = None
    """``feature_annotations``: those with a label become explanations."""


def write_neuronpedia(
    pages: Pages, parts: Sequence[Part], folder: Path, source: Source, progress: Progress, size: int = BATCH
) -> None:
    """Write the wanted features of some SAEs, ``size`` to a file, into ``folder``."""
    total = sum(part.d_sae for part in parts)
    before = 0
    for part in parts:
        place = folder / part.model_id / part.source_id
        for name in ("features", "activations", "explanations"):
            (place / name).mkdir(parents=True)
        seen = _Seen()
        written = 0
        for number, batch in enumerate(pages.of(part, size)):
            _write_batch(place, number, part, batch, source, seen)
            written += len(batch)
            progress.update(before + written, total, part.sae)
        for name, row in _about(pages, part, source, seen).items():
            (place / f"{name}.jsonl").write_text(dumps(row) + "\n", encoding="utf8")
        before += part.d_sae
        progress.update(before, total, part.sae)


@dataclass
class _Seen:
    """What the source set says it has to show."""

    dfa: bool = False
    heads: bool = False
    correlated: bool = False


def _write_batch(
    place: Path, number: int, part: Part, batch: Sequence[Page], source: Source, seen: _Seen
) -> None:
    name = f"batch-{number}.jsonl.gz"
    with gzipped(place / "features" / name) as features, gzipped(place / "activations" / name) as activations:
        for page in batch:
            features.write(dumps(feature_row(part, page, source)) + "\n")
            for example in page.examples:
                activations.write(dumps(activation_row(part, page, example, source)) + "\n")
                seen.dfa |= "dfa_values" in example.activation
            seen.heads |= bool(page.fields["decoder_weights_dist"])
            seen.correlated |= bool(page.fields["correlated_features_indices"])
    explained = explanation_rows(part, [page.feature for page in batch], source)
    if explained:
        with gzipped(place / "explanations" / name) as sink:
            sink.writelines(dumps(row) + "\n" for row in explained)


@contextmanager
def gzipped(path: Path) -> Iterator[TextIO]:
    """A gzipped text file without its name and time in it, so that equal content gives equal files."""
    import io

    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=5, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf8") as text,
    ):
        yield text


def date(created: str) -> str:
    """The release's date as Prisma reads it.

    >>> date("2026-11-21T09:43:47.123456+00:00")
    '2026-11-21T09:43:47.123Z'
    """
    when = datetime.fromisoformat(created)
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def row_id(*names: object) -> str:
    """25 characters that stand for what is named, in the form of a cuid.

    >>> row_id("m", "5-z", 3), len(row_id("a"))
    ('c4e33c4198eb398dc372fe45f', 25)
    """
    return "c" + hashlib.sha256("\0".join(map(str, names)).encode("utf8")).hexdigest()[:24]


def feature_row(part: Part, page: Page, source: Source) -> Row:
    """A row of ``features``: Neuronpedia's table Neuron."""
    fields = dict(page.fields)
    for name in ("feature_index", "n_prompts_total", "n_tokens_in_prompt", "dataset"):
        del fields[name]
    vector = fields.pop("vector")
    return {
        "modelId": part.model_id,
        "layer": part.source_id,
        "index": str(page.feature),
        "sourceSetName": part.source_set,
        "creatorId": source.creator,
        "createdAt": date(source.created),
        "maxActApprox": page.max_activation,
        "hasVector": bool(vector),
        "vector": vector,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": page.max_activation if vector else None,
        "hookName": part.site.hook_name,
        "topkCosSimIndices": page.near,
        "topkCosSimValues": page.near_cosines,
    } | fields


def activation_row(part: Part, page: Page, example: Example, source: Source) -> Row:
    """A row of ``activations``. dataIndex is block:position:group:rank, dataSource the block's document."""
    shown = example.activation
    values = shown["values"]
    strongest = max(values)
    index = f"{example.block}:{example.position}:{example.group}:{example.rank}"
    return {
        "id": row_id(part.model_id, part.source_id, part.digest, page.feature, index),
        "tokens": shown["tokens"],
        "index": str(page.feature),
        "layer": part.source_id,
        "modelId": part.model_id,
        "maxValue": strongest,
        "maxValueTokenIndex": values.index(strongest),
        "minValue": min(values),
        "values": values,
        "creatorId": source.creator,
        "createdAt": date(source.created),
        "dataSource": example.source,
        "dataIndex": index,
        "dfaValues": shown.get("dfa_values", []),
        "dfaTargetIndex": shown.get("dfa_targetIndex"),
        "dfaMaxValue": shown.get("dfa_maxValue"),
        "binMin": shown["bin_min"],
        "binMax": shown["bin_max"],
        "binContains": shown["bin_contains"],
        "qualifyingTokenIndex": shown["qualifying_token_index"],
    }


def explanation_rows(part: Part, features: Sequence[int], source: Source) -> list[Row]:
    """People's labels of some features, by feature and annotator."""
    if source.labels is None or source.labels.num_rows == 0:
        return []
    notes = source.labels
    here = pc.and_(
        pc.equal(notes["sae"], part.sae), pc.is_in(notes["feature"], pa.array(features, pa.int32()))
    )
    rows = []
    for note in notes.filter(pc.and_(here, pc.not_equal(notes["label"], ""))).to_pylist():
        index = str(note["feature"])
        about = [note["annotator"], note["interpretability"], ", ".join(note["tags"]), note["notes"]]
        rows.append({
            "id": row_id(part.model_id, part.source_id, index, note["annotator"]),
            "modelId": part.model_id, "layer": part.source_id, "index": index,
            "authorId": source.creator, "description": note["label"], "typeName": None,
            "explanationModelName": None, "notes": "; ".join(word for word in about if word),
            "createdAt": date(note["created_at"].isoformat()),
        })  # fmt: skip
    return rows


def _about(pages: Pages, part: Part, source: Source, seen: _Seen) -> dict[str, Row]:
    """The rows of release.jsonl, model.jsonl, sourceset.jsonl and source.jsonl."""
    made = {"creatorId": source.creator, "createdAt": date(source.created)}
    release, title = plain_name(source.release), f"Head Atlas release {source.release}"
    shape = pages.shape(part.model)
    return {
        "release": made | {
            "name": release, "visibility": "PUBLIC", "isNewUi": False, "featured": False,
            "description": title, "descriptionShort": title, "urls": [], "creatorEmail": None,
            "creatorName": source.creator_name, "creatorNameShort": source.creator_name,
            "defaultSourceSetName": None, "defaultSourceId": None, "defaultUmapSourceIds": [],
        },
        "model": made | {
            "id": part.model_id, "instruct": False, "displayNameShort": part.model,
            "displayName": part.model, "tlensId": None, "dimension": shape["d_model"],
            "visibility": "PUBLIC", "inferenceEnabled": False, "layers": shape["n_layers"],
            "neuronsPerLayer": 0, "owner": source.creator_name, "updatedAt": date(source.created),
            "website": None,
        },
        "sourceset": made | {
            "modelId": part.model_id, "name": part.source_set, "hasDashboards": True,
            "visibility": "PUBLIC", "description": f"{part.site.kind}, {part.d_sae} features", "type": "",
            "creatorName": source.creator_name, "urls": [], "creatorEmail": None, "releaseName": release,
            "defaultRange": 1, "defaultShowBreaks": True, "showDfa": seen.dfa,
            "showCorrelated": seen.correlated, "showHeadAttribution": seen.heads, "showUmap": False,
        },
        "source": made | {
            "id": part.source_id, "modelId": part.model_id, "setName": part.source_set,
            "hasDashboards": True, "inferenceEnabled": False, "inferenceHosts": [], "saelensConfig": None,
            "saelensRelease": None, "saelensSaeId": part.sae, "hfRepoId": None, "hfFolderId": None,
            "visibility": "PUBLIC", "hasUmap": False, "hasUmapLogSparsity": False,
            "hasUmapClusters": False, "num_prompts": pages.n_blocks,
            "num_tokens_in_prompt": pages.context, "dataset": pages.dataset,
            "notes": dumps(describe(part, source.made_from)),
        },
    }  # fmt: skip
