"""Annotations as files: CSV, JSON lines and Parquet of every field, and the spreadsheet of seed 001.

One row per head and annotator, or per feature and annotator. The same columns are read again, so that a file
can be filled in elsewhere: :func:`put_rows` saves each row as a new version where it differs, all or nothing.
In CSV, lists are joined by ``; `` and verdicts are ``SAE 17=group`` (or ``=?odd``, ``=?unsure``).
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from atlas.db.annotations import list_features, list_heads
from atlas.db.notes import FeatureAnnotation, HeadAnnotation
from atlas.errors import ConfigError, one_of
from atlas.judging import FeatureVerdict
from atlas.settings import Settings

Note = HeadAnnotation | FeatureAnnotation
KINDS: dict[str, type[HeadAnnotation] | type[FeatureAnnotation]] = {
    "heads": HeadAnnotation,
    "features": FeatureAnnotation,
}
FORMS = ("csv", "jsonl", "parquet", "spreadsheet")
_LISTS = ("groupings", "tags")
_UNSAVED = ("version", "created_at", "updated_at")
SHEET = (
    "Layer", "Head", "Feature groups / possible roles", "Role", "Description", "Notable", "New grouping",
    "Semanticity", "Confidence", "Notes", "Annotator",
)  # fmt: skip
"""Columns of the spreadsheet in which seed 001 kept its 144 heads (mission B4)."""
_RISKY = ("=", "+", "-", "@", "\t", "\r")
"""What makes a spreadsheet program run a cell as a formula."""


def notes_of(settings: Settings, kind: str, of: str, annotator: str | None = None) -> list[Note]:
    """The notes about the heads of a model, or about the features of an SAE; all or one annotator's."""
    one_of("kind", kind, KINDS)
    if kind == "heads":
        return list(list_heads(settings, of, annotator=annotator))
    return list(list_features(settings, of, annotator=annotator))


def _row(note: Note) -> dict[str, Any]:
    values = {name: value for name, value in asdict(note).items() if name not in _UNSAVED}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def encode(notes: Sequence[Note], kind: str, form: str) -> bytes:
    """Notes as a file of one of FORMS."""
    one_of("form", form, FORMS)
    rows = [_row(note) for note in notes]
    if form == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if form == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema(kind)), sink, compression="zstd")
        return sink.getvalue()
    if form == "spreadsheet":
        if kind != "heads":
            raise ConfigError("a spreadsheet holds heads; allowed for features: csv, jsonl, parquet")
        return _csv(SHEET, ([_safe(v) for v in _sheet_row(note)] for note in notes))
    names = [name for name in KINDS[kind].__dataclass_fields__ if name not in _UNSAVED]
    return _csv(names, ([_safe(_cell(row[name])) for name in names] for row in rows))


def _schema(kind: str) -> pa.Schema:
    text, words = pa.string(), pa.list_(pa.string())
    verdict = pa.struct([("sae", text), ("feature", pa.int32()), ("verdict", text), ("group", text)])
    kinds = {
        "layer": pa.int16(), "head": pa.int16(), "feature": pa.int32(), "confidence": pa.int16(),
        "star": pa.bool_(), "novel": pa.bool_(), "seconds_spent": pa.float64(),
        "groupings": words, "tags": words, "verdicts": pa.list_(verdict),
    }  # fmt: skip
    names = [name for name in KINDS[kind].__dataclass_fields__ if name not in _UNSAVED]
    return pa.schema([(name, kinds.get(name, text)) for name in names])


def _csv(names: Sequence[str], rows: Iterable[Sequence[str]]) -> bytes:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return sink.getvalue().encode("utf-8-sig")


def _safe(cell: str) -> str:
    """A cell that no spreadsheet program runs as a formula: an apostrophe in front, taken off again later.

    >>> _safe("=1+1"), _safe("-"), _safe("of"), _plain(_safe("'quoted")), _plain(_safe("=x"))
    ("'=1+1", "'-", 'of', "'quoted", '=x')
    """
    return f"'{cell}" if cell.startswith((*_RISKY, "'")) else cell


def _plain(cell: str) -> str:
    return cell.removeprefix("'")


def _joined(words: Iterable[str]) -> str:
    return "; ".join(word.replace("\\", "\\\\").replace(";", "\\;") for word in words)


def _split(text: str) -> list[str]:
    r"""The words of a joined cell.

    >>> _split(_joined(["a;b", "c\\d", "e"]))
    ['a;b', 'c\\d', 'e']
    """
    words, word, escaped = [], "", False
    for letter in text:
        if escaped or letter not in "\\;":
            word, escaped = word + letter, False
        elif letter == "\\":
            escaped = True
        else:
            words.append(word)
            word = ""
    return [w for one in [*words, word] if (w := one.strip())]


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return _joined(map(_verdict_cell, value) if value and isinstance(value[0], Mapping) else value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _verdict_cell(one: Mapping[str, Any]) -> str:
    group = one["group"]
    said = f"?{group}" if group.startswith("?") else group or f"?{one['verdict']}"
    return f"{one['sae']} {one['feature']}={said}"


def _verdict(text: str) -> dict[str, Any]:
    place, found, said = text.partition("=")
    sae, _, feature = place.rpartition(" ")
    if not found or not feature.isdigit():
        raise ConfigError(f"verdict {text!r} cannot be read; write it like SAE 17=group, =?odd or =?unsure")
    if said.startswith("?") and not said.startswith("??"):
        return {"sae": sae, "feature": int(feature), "verdict": said[1:], "group": ""}
    return {"sae": sae, "feature": int(feature), "verdict": "group", "group": said.removeprefix("?")}


def _sheet_row(note: Note) -> list[str]:
    if not isinstance(note, HeadAnnotation):
        raise ConfigError("a spreadsheet holds heads")
    return [
        str(note.layer), str(note.head), _joined(note.groupings), note.role, note.label,
        "*" if note.star else "", "yes" if note.novel else "", (note.semanticity or "").replace("_", " "),
        "" if note.confidence is None else str(note.confidence), note.notes, note.annotator,
    ]  # fmt: skip


def _from_sheet(row: Mapping[str, str], model: str) -> dict[str, Any]:
    names = ("layer", "head", "groupings", "role", "label", "star", "novel", "semanticity", "confidence")
    found: dict[str, Any] = dict(
        zip((*names, "notes", "annotator"), (row[name] for name in SHEET), strict=True)
    )
    found |= {"model": model, "star": "yes" if found["star"].strip() else "", "status": "done"}
    found["semanticity"] = found["semanticity"].strip().replace(" ", "_")
    return found


_READ: dict[str, Callable[[str], Any]] = {
    "layer": int, "head": int, "feature": int, "seconds_spent": float,
    "confidence": lambda text: int(text) if text else None,
    "star": lambda text: text.strip().lower() in ("yes", "true", "1", "*"),
    "novel": lambda text: text.strip().lower() in ("yes", "true", "1", "*"),
    "semanticity": lambda text: text or None, "interpretability": lambda text: text or None,
    "groupings": _split, "tags": _split, "verdicts": lambda text: [_verdict(one) for one in _split(text)],
}  # fmt: skip


def decode(data: bytes, kind: str, form: str, *, model: str = "", annotator: str = "") -> list[Note]:
    """The notes in a file that :func:`encode` wrote, or that has the same columns.

    Columns that are missing keep their default; ``model`` and ``annotator`` stand for those columns where the
    file has none. ConfigError names the row and what is wrong with it.
    """
    one_of("kind", kind, KINDS)
    one_of("form", form, FORMS)
    try:
        rows = _rows(data, form, model)
    except (ValueError, KeyError, TypeError, csv.Error, pa.ArrowException) as error:
        raise ConfigError(f"the file is no {form} of {kind}: {' '.join(str(error).split())}") from None
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            defaults = {"annotator": annotator} | ({"model": model} if kind == "heads" else {})
            found.append(_note({**{k: v for k, v in defaults.items() if v}, **row}, kind))
        except (ConfigError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"row {number}: {error}") from None
    return found


def _rows(data: bytes, form: str, model: str) -> list[dict[str, Any]]:
    if form == "jsonl":
        # Not splitlines: JSON may hold U+0085, U+2028 and U+2029 as they are.
        return [json.loads(line) for line in data.decode().split("\n") if line.strip()]
    if form == "parquet":
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
        return rows
    reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig")))
    cells = [{name: _plain(value or "") for name, value in row.items() if name} for row in reader]
    if form == "spreadsheet":
        lacking = [name for name in SHEET if name not in (reader.fieldnames or ())]
        if lacking:
            raise ValueError(f"column {lacking[0]!r} is missing")
        cells = [_from_sheet(row, model) for row in cells]
    return [{name: _READ.get(name, str)(value) for name, value in row.items()} for row in cells]


def _note(row: Mapping[str, Any], kind: str) -> Note:
    made = KINDS[kind]
    known = [name for name in made.__dataclass_fields__ if name not in _UNSAVED]
    for name in row:
        if name not in _UNSAVED:
            one_of("column", name, known)
    values = {name: row[name] for name in known if name in row}
    for name in _LISTS:
        if name in values:
            values[name] = tuple(values[name] or ())
    if "verdicts" in values:
        values["verdicts"] = tuple(FeatureVerdict(**one) for one in values["verdicts"] or ())
    lacking = [name for name in (*_KEYS[kind], "annotator") if values.get(name) in (None, "")]
    if lacking:
        raise ConfigError(f"{lacking[0]} is not given")
    return made(**values)


_KEYS = {"heads": ("model", "layer", "head"), "features": ("sae", "feature")}
