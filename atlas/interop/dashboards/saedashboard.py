"""SAEDashboard's files: ``MODEL/LAYER-SET/batch-N.json``, some features in each.

Beside them ``run_settings.json`` says what they were made from; SAEDashboard itself has a file of that name.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from atlas.interop.dashboards.pages import Page, Pages
from atlas.interop.dashboards.selection import Part
from atlas.progress import Progress

SETTINGS = "run_settings.json"
BATCH = 128


def write_saedashboard(
    pages: Pages,
    parts: Sequence[Part],
    folder: Path,
    made_from: Mapping[str, str],
    progress: Progress,
    size: int = BATCH,
) -> None:
    """Write the wanted features of some SAEs, ``size`` to a file, into ``folder``."""
    total = sum(part.d_sae for part in parts)
    before = 0
    for part in parts:
        place = folder / part.model_id / part.source_id
        place.mkdir(parents=True)
        written = 0
        for number, batch in enumerate(pages.of(part, size)):
            with (place / f"batch-{number}.json").open("w", encoding="utf8") as sink:
                _write_batch(sink, part, batch)
            written += len(batch)
            progress.update(before + written, total, part.sae)
        about = describe(part, made_from) | {"n_features": written, "batch": size}
        (place / SETTINGS).write_text(json.dumps(about, indent=1) + "\n", encoding="utf8")
        before += part.d_sae
        progress.update(before, total, part.sae)


def describe(part: Part, made_from: Mapping[str, str]) -> dict[str, Any]:
    """What an exported SAE is and where it comes from."""
    return {
        "sae": part.sae,
        "model": part.model,
        "site": part.site.name,
        "hook_name": part.site.hook_name,
        "hook_head_index": part.site.head,
        "d_sae": part.d_sae,
        "sae_digest": part.digest,
        "n_tokens": part.n_tokens,
        **made_from,
    }


def dumps(value: Any) -> str:
    """JSON on one line, in UTF-8 and without NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def feature_object(page: Page) -> dict[str, Any]:
    """A feature as an entry of ``features``."""
    fields = dict(page.fields)
    vector = fields.pop("vector")
    return fields | {"activations": [example.activation for example in page.examples], "vector": vector}


def _write_batch(sink: TextIO, part: Part, batch: Sequence[Page]) -> None:
    """One feature after another, so that never a whole file is in memory."""
    head = {
        "model_id": part.model_id,
        "layer": part.site.layer,
        "sae_set": part.source_set,
        "sae_id_suffix": part.suffix,
    }
    sink.write(dumps(head)[:-1] + ',"features":[')
    sink.writelines(
        ("," if index else "") + "\n" + dumps(feature_object(page)) for index, page in enumerate(batch)
    )
    sink.write("\n]}\n")
