"""Where text comes from: every corpus behind one interface.

A *spec* is the short string that a user writes and that the tables record; :func:`open_source` turns it
into a source, and a source yields :class:`Document` after :class:`Document`, always in the same order.

====================================  ===================================================================
spec                                  text
====================================  ===================================================================
``stdlib``                            documentation and sources of the running Python's standard library
``packages``                          docstrings of the installed packages (differs between environments)
``notes.txt``, ``text:PATH``          one text file (``text:`` allows any name), or
``folder``                            a folder: every ``.txt`` in it, in order of their names
``rows.jsonl`` (``.gz .bz2 .xz        one JSON object per line, its text in ``text`` or in the field that
.zst``), ``rows.parquet``             ``?field=NAME`` names; a ``source`` field is kept
``hf:NAME[:split]``                   a streamed Hugging Face dataset; ``?field=`` ``?config=`` ``?revision=``
====================================  ===================================================================

Files are streamed: no more than a document, or one row group of a Parquet file, is in memory. Blank
documents are skipped. A source that holds no text at all raises, as does everything else that cannot be
read: :class:`~atlas.errors.CorpusError`, in one line, with the value and what is allowed.

Two strings name a source. ``spec`` opens it again from anywhere (paths are absolute). ``identity()``
says *which text* will be read, for digests: it is taken from the content (SHA-256, about a gigabyte per
second, far cheaper than tokenising), so that a moved or touched file is still the same corpus and an
edited one is not.
"""

from pathlib import Path
from urllib.parse import parse_qsl

from atlas.corpus.documents import CorpusSource, Document
from atlas.corpus.hub_dataset import HubDataset
from atlas.corpus.python_text import InstalledPackages, StandardLibrary
from atlas.corpus.text_files import JsonLines, ParquetFile, TextFiles
from atlas.errors import CorpusError

__all__ = ["CorpusSource", "Document", "open_source"]

ALLOWED_SPECS = (
    "stdlib, packages, a .txt file, a folder of .txt files, text:PATH, "
    ".jsonl (.gz .bz2 .xz .zst), .parquet, hf:NAME[:split]"
)


def open_source(spec: str) -> CorpusSource:
    """Return the source that a spec names, without reading its text yet.

    >>> open_source("stdlib").spec
    'stdlib'
    >>> open_source("hf:NeelNanda/pile-10k").spec
    'hf:NeelNanda/pile-10k:train'
    >>> open_source("notes.docx")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    atlas.errors.CorpusError: corpus 'notes.docx' is not known; allowed: stdlib, packages, ...
    """
    try:
        return _open(spec)
    except (OSError, RuntimeError) as error:
        raise CorpusError(f"corpus {spec[:80]!r} cannot be looked up: {error}") from None


def _open(spec: str) -> CorpusSource:
    if spec == "stdlib":
        return StandardLibrary()
    if spec == "packages":
        return InstalledPackages()
    if spec.startswith("text:"):
        return TextFiles(_existing(spec.removeprefix("text:"), spec))
    if spec.startswith("hf:"):
        return _open_hub(spec)
    return _open_file(spec)


def _open_hub(spec: str) -> HubDataset:
    place, options = _options(spec, ("field", "config", "revision"))
    name, _, split = place.removeprefix("hf:").partition(":")
    if not name:
        raise CorpusError(f"corpus {spec!r} names no dataset; allowed: hf:NAME[:split]")
    return HubDataset(name, split or "train", **options)


def _open_file(spec: str) -> CorpusSource:
    # A name that really holds a question mark is still found.
    place, options = (spec, {}) if spec and Path(spec).exists() else _options(spec, ("field",))
    names = Path(place).name.lower()
    if names.endswith((".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst")):
        return JsonLines(_existing(place, spec, a_file=True), **options)
    if names.endswith(".parquet"):
        return ParquetFile(_existing(place, spec, a_file=True), **options)
    if place and (names.endswith(".txt") or Path(place).expanduser().is_dir()):
        if options:
            raise CorpusError(f"corpus {spec!r} has the option field; allowed for text files: none")
        return TextFiles(_existing(place, spec))
    if place and not Path(place).suffix and "/" in place:
        raise CorpusError(f"corpus {spec!r}: there is no such file or folder; allowed: {ALLOWED_SPECS}")
    raise CorpusError(f"corpus {spec!r} is not known; allowed: {ALLOWED_SPECS}")


def _options(spec: str, allowed: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """Split ``place?key=value&...`` and check the keys."""
    place, _, query = spec.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    choice = ", ".join(f"?{key}=VALUE" for key in allowed)
    for key, value in options.items():
        if key not in allowed or not value:
            raise CorpusError(f"corpus {spec!r} has the option {key}={value!r}; allowed: {choice}")
    if query and not options:
        raise CorpusError(f"corpus {spec!r} has the option {query!r}; allowed: {choice}")
    return place, options


def _existing(place: str, spec: str, *, a_file: bool = False) -> Path:
    path = Path(place).expanduser()
    if not place or not path.exists():
        raise CorpusError(f"corpus {spec!r}: there is no file or folder '{place}'; allowed: {ALLOWED_SPECS}")
    if a_file and not path.is_file():
        raise CorpusError(f"corpus {spec!r}: '{place}' is a folder; allowed: a file")
    return path.resolve()
