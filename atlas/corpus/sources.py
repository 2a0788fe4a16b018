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

import ast
import bz2
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import lzma
import os
import platform
import pydoc_data.topics
import random
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, cast, runtime_checkable
from urllib.parse import parse_qsl, urlencode

import pyarrow as pa
import pyarrow.parquet as pq

from atlas.errors import CorpusError

ALLOWED_SPECS = (
    "stdlib, packages, a .txt file, a folder of .txt files, text:PATH, "
    ".jsonl (.gz .bz2 .xz .zst), .parquet, hf:NAME[:split]"
)
PART_CHARS = 1_000_000  # a longer text file is handed out in parts of about this size
MIN_DOCSTRING = 80  # shorter ones are mostly stubs, alike in every module
MIN_SOURCE = 200
SHUFFLE_SEED = 0
MODULE_PART_CHARS = 16_384  # a longer module is cut here ...
MODULES_MIXED = 32  # ... and the parts of this many modules are dealt out at random

# Left out of the standard library: what distributions package separately or build per machine (so that the
# text depends on the version of Python and on little else), tests, the topics' own module, and the tables
# of code pages, a megabyte of hexadecimal.
_NOT_STDLIB = frozenset(
    {
        *("__pycache__", "site-packages", "dist-packages", "lib-dynload", "ensurepip", "lib2to3"),
        *("tkinter", "turtledemo", "idlelib", "idle_test", "test", "tests", "pydoc_data", "encodings"),
    }
)
_BUILT_PER_MACHINE = ("config-", "_sysconfigdata")
_NOT_PACKAGES = frozenset({"__pycache__", "test", "tests"})
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Document(NamedTuple):
    """A piece of text that belongs together, and the name of where it came from."""

    source: str
    text: str


@runtime_checkable
class CorpusSource(Protocol):
    """What every corpus offers."""

    @property
    def spec(self) -> str:
        """Return the canonical spec: ``open_source(s.spec)`` opens the same source from any folder."""
        ...

    def identity(self) -> str:
        """Return a string that is equal exactly when the same text will be read."""
        ...

    def documents(self) -> Iterator[Document]:
        """Yield the documents, in the same order every time; raise CorpusError where that fails."""
        ...


# --------------------------------------------------------------------------- what Python itself carries


@dataclass(frozen=True)
class StandardLibrary:
    """The running Python's standard library: each module's docstrings, its code without them, pydoc's topics.

    Docstrings are taken out of the code, so no text comes twice and a held-out part is really held out.
    Modules are shuffled with a fixed seed and long ones dealt out in parts: any prefix is a mix of prose
    and code, and no single large module fills it.
    """

    spec: str = "stdlib"

    def identity(self) -> str:
        """Return the Python version and a digest of every file and topic read."""
        digest = hashlib.sha256()
        root = _stdlib_root()
        for path in _python_files(root, _NOT_STDLIB):
            _add(digest, path.relative_to(root).as_posix(), path.read_bytes())
        for name, text in sorted(pydoc_data.topics.topics.items()):
            _add(digest, name, text.encode())
        return f"stdlib python-{platform.python_version()} sha256:{digest.hexdigest()}"

    def documents(self) -> Iterator[Document]:
        """Yield the documents in the seeded order."""
        return _nonblank(self.spec, _dealt(self._modules()))

    def _modules(self) -> Iterator[Document]:
        root = _stdlib_root()
        names = [path.relative_to(root).as_posix() for path in _python_files(root, _NOT_STDLIB)]
        topics = pydoc_data.topics.topics
        order = [(kind, name) for name in names for kind in ("docs", "source")]
        order += [("topics", name) for name in sorted(topics)]
        random.Random(SHUFFLE_SEED).shuffle(order)  # noqa: S311 - an order, not a secret
        for kind, name in order:
            text = topics[name] if kind == "topics" else _module_text(root / name, kind)
            yield Document(f"{kind}/{name}", text)


@dataclass(frozen=True)
class InstalledPackages:
    """Docstrings of the packages installed beside this one, each text once, in order of the files' names."""

    spec: str = "packages"

    def identity(self) -> str:
        """Return a digest of the installed distributions and their versions (which fix the text)."""
        found = {(d.metadata["Name"] or "", d.version) for d in importlib.metadata.distributions()}
        digest = hashlib.sha256(repr(sorted(found)).encode()).hexdigest()
        return f"packages python-{platform.python_version()} sha256:{digest}"

    def documents(self) -> Iterator[Document]:
        """Yield one document per module that has docstrings not seen in an earlier module."""
        return _nonblank(self.spec, self._documents())

    def _documents(self) -> Iterator[Document]:
        root = Path(sysconfig.get_paths()["purelib"])
        seen: set[bytes] = set()
        for path in _python_files(root, _NOT_PACKAGES):
            fresh = []
            for text in _docstrings(_parse(path)[1]):
                key = hashlib.blake2b(text.encode("utf8", "replace"), digest_size=12).digest()
                if len(text) > MIN_DOCSTRING and key not in seen:
                    seen.add(key)
                    fresh.append(text)
            yield Document(f"packages/{path.relative_to(root).as_posix()}", "\n\n".join(fresh))


def _dealt(documents: Iterator[Document]) -> Iterator[Document]:
    """Cut documents into parts and yield the next part of a random one among MODULES_MIXED, each in order."""
    rng = random.Random(SHUFFLE_SEED)  # noqa: S311 - an order, not a secret
    hands = [_cut(document) for document in itertools.islice(documents, MODULES_MIXED)]
    while hands:
        place = rng.randrange(len(hands))
        part = next(hands[place], None)
        if part is not None:
            yield part
        elif (following := next(documents, None)) is not None:
            hands[place] = _cut(following)
        else:
            hands.pop(place)


def _cut(document: Document) -> Iterator[Document]:
    """Yield a document's parts of MODULE_PART_CHARS characters.

    >>> [len(part.text) for part in _cut(Document("a.py", "x" * 40_000))]
    [16384, 16384, 7232]
    """
    for start in range(0, len(document.text), MODULE_PART_CHARS):
        yield Document(document.source, document.text[start : start + MODULE_PART_CHARS])


def _stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _python_files(root: Path, skip: frozenset[str]) -> list[Path]:
    """Return the Python files below ``root`` without the skipped folders, ordered by relative name."""

    def wanted(name: str) -> bool:
        return name not in skip and not name.startswith(_BUILT_PER_MACHINE)

    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = filter(wanted, folders)  # os.walk does not enter what is taken out here
        found += (Path(folder, name) for name in names if name.endswith(".py") and wanted(name))
    return sorted(found, key=Path.as_posix)


def _parse(path: Path) -> tuple[str, ast.Module]:
    """Return a module's text and syntax tree; both empty if it is not the running Python's syntax."""
    try:
        text = path.read_text(encoding="utf8")
        return text, ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, OSError):
        return "", ast.Module(body=[], type_ignores=[])


def _docstrings(tree: ast.Module) -> list[str]:
    nodes = (node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _without_docstrings(text: str, tree: ast.Module) -> str:
    """Return the code without the lines of its docstrings (those that share a line with code stay)."""
    gone: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node):
            first = node.body[0]
            if first.lineno > getattr(node, "lineno", 0):
                gone.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    # Not splitlines(): it also cuts at form feeds, which do not count as lines in the tree.
    return "\n".join(line for i, line in enumerate(text.split("\n"), 1) if i not in gone)


def _module_text(path: Path, kind: str) -> str:
    """Return a module's docstrings or its code, or nothing if it has hardly any."""
    text, tree = _parse(path)
    if kind == "source":
        code = _without_docstrings(text, tree)
        return code if len(code) > MIN_SOURCE else ""
    docs = _docstrings(tree)
    return "\n\n".join(docs) if sum(map(len, docs)) > MIN_DOCSTRING else ""


# --------------------------------------------------------------------------- files


@dataclass(frozen=True)
class TextFiles:
    """A text file, or every ``.txt`` below a folder in order of their names."""

    path: Path

    @property
    def spec(self) -> str:
        """Return ``text:`` and the absolute path."""
        return f"text:{self.path.as_posix()}"

    def identity(self) -> str:
        """Return a digest of the files' names and contents."""
        digest = hashlib.sha256()
        for path in self._files():
            _add(digest, self._name(path), _sha256(path).encode())
        return f"text {self.path.name} sha256:{digest.hexdigest()}"

    def documents(self) -> Iterator[Document]:
        """Yield a document per file; a long file comes in parts of about a million characters."""
        return _nonblank(self.spec, self._documents())

    def _documents(self) -> Iterator[Document]:
        for path in self._files():
            with _reading(path), path.open("rb") as raw, io.TextIOWrapper(raw, "utf-8-sig") as lines:
                for part in _parts(lines):
                    yield Document(self._name(path), part)

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        files = sorted(self.path.rglob("*.txt"), key=self._name)
        if not files:
            raise CorpusError(f"folder '{self.path}' holds no .txt file; allowed: a folder with at least one")
        return files

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix() if path != self.path else path.name


@dataclass(frozen=True)
class JsonLines:
    """A file with one JSON object per line, plain or compressed."""

    path: Path
    field: str = "text"

    @property
    def spec(self) -> str:
        """Return the absolute path and, if it is not ``text``, the field."""
        return _file_spec(self.path, self.field)

    def identity(self) -> str:
        """Return a digest of the file as it lies there, and the field."""
        return f"jsonl {self.path.name} field:{self.field} sha256:{_sha256(self.path)}"

    def documents(self) -> Iterator[Document]:
        """Yield a document per row."""
        return _nonblank(self.spec, self._documents())

    def _documents(self) -> Iterator[Document]:
        opener = _COMPRESSIONS[self.path.suffix]
        with _reading(self.path), opener(self.path) as raw:
            for number, line in enumerate(raw, 1):
                if line.strip():
                    yield self._document(number, line)

    def _document(self, number: int, line: bytes) -> Document:
        where = f"'{self.path}' line {number}"
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise CorpusError(f"{where} is not UTF-8 at byte {error.start}; allowed: UTF-8 text") from None
        except ValueError as error:
            raise CorpusError(f"{where} is not JSON ({error}); allowed: one object per line") from None
        if not isinstance(row, dict):
            raise CorpusError(f"{where} is a JSON {type(row).__name__}; allowed: one object per line")
        if self.field not in row:
            raise CorpusError(f"{where} has no field {self.field!r}; allowed with ?field=: {_listed(row)}")
        return _row_document(row, self.field, where, f"{self.path.name}:{number}")


@dataclass(frozen=True)
class ParquetFile:
    """A Parquet file with a column of text, read one row group at a time."""

    path: Path
    field: str = "text"

    @property
    def spec(self) -> str:
        """Return the absolute path and, if it is not ``text``, the column."""
        return _file_spec(self.path, self.field)

    def identity(self) -> str:
        """Return a digest of the file as it lies there, and the column."""
        return f"parquet {self.path.name} field:{self.field} sha256:{_sha256(self.path)}"

    def documents(self) -> Iterator[Document]:
        """Yield a document per row."""
        return _nonblank(self.spec, self._documents())

    def _documents(self) -> Iterator[Document]:
        with _reading(self.path), pq.ParquetFile(self.path) as file:
            columns = file.schema_arrow.names
            if self.field not in columns:
                raise CorpusError(
                    f"'{self.path}' has no column {self.field!r}; allowed with ?field=: {_listed(columns)}"
                )
            read = [self.field, *(["source"] if "source" in columns and self.field != "source" else [])]
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=read):
                for row in batch.to_pylist():
                    number += 1
                    where = f"'{self.path}' row {number}"
                    yield _row_document(row, self.field, where, f"{self.path.name}:{number}")


def _open_zstd(path: Path) -> IO[bytes]:
    return cast(IO[bytes], io.BufferedReader(cast(Any, pa.input_stream(str(path), compression="zstd"))))


# Each opens a file for reading bytes; the caller closes it.
_COMPRESSIONS: dict[str, Callable[[Path], IO[bytes]]] = {
    ".jsonl": lambda path: path.open("rb"),
    ".gz": cast(Callable[[Path], IO[bytes]], gzip.open),
    ".bz2": cast(Callable[[Path], IO[bytes]], bz2.open),
    ".xz": cast(Callable[[Path], IO[bytes]], lzma.open),
    ".zst": _open_zstd,
}


class _reading:  # noqa: N801 - a context manager, used like a function
    """Turn whatever goes wrong while a file is read into one CorpusError line."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, UnicodeDecodeError):
            raise CorpusError(f"'{self.path}' is not UTF-8 ({error.reason}); allowed: UTF-8 text") from error
        if isinstance(error, (EOFError, lzma.LZMAError, zlib.error, pa.ArrowException, OSError)):
            reason = " ".join(str(error).split())
            raise CorpusError(f"'{self.path}' cannot be read or is damaged: {reason}") from error


def _parts(lines: Iterable[str]) -> Iterator[str]:
    """Cut a text at the first blank line after each PART_CHARS characters (or in any case after twice that).

    >>> list(_parts(["a\\n", "\\n", "b\\n"]))
    ['a\\n\\nb\\n']
    """
    part: list[str] = []
    size = 0
    for line in lines:
        part.append(line)
        size += len(line)
        if size >= 2 * PART_CHARS or (size >= PART_CHARS and not line.strip()):
            yield "".join(part)
            part, size = [], 0
    yield "".join(part)


# --------------------------------------------------------------------------- datasets of the hub


@dataclass(frozen=True)
class HubDataset:
    """A Hugging Face dataset, streamed through the ``datasets`` library (an optional dependency)."""

    name: str
    split: str = "train"
    field: str = "text"
    config: str | None = None
    revision: str | None = None

    @property
    def spec(self) -> str:
        """Return ``hf:NAME:split`` and the options that were given."""
        options = {"field": self.field if self.field != "text" else None}
        options |= {"config": self.config, "revision": self.revision}
        given = urlencode({key: value for key, value in options.items() if value is not None})
        return f"hf:{self.name}:{self.split}" + (f"?{given}" if given else "")

    def identity(self) -> str:
        """Return the spec with the dataset's content hash (asks the hub)."""
        try:
            builder = self._library().load_dataset_builder(self.name, self.config, revision=self.revision)
        except Exception as error:
            raise self._failed(error) from error
        return f"{self.spec} hash:{builder.hash}"

    def documents(self) -> Iterator[Document]:
        """Yield a document per row of the split."""
        return _nonblank(self.spec, self._documents())

    def _documents(self) -> Iterator[Document]:
        load = self._library().load_dataset
        try:
            rows = load(self.name, self.config, split=self.split, revision=self.revision, streaming=True)
            for number, row in enumerate(rows, 1):
                yield self._document(number, row)
        except (CorpusError, GeneratorExit):
            raise
        except Exception as error:
            raise self._failed(error) from error

    def _document(self, number: int, row: dict[str, Any]) -> Document:
        where = f"'{self.spec}' row {number}"
        if self.field not in row:
            raise CorpusError(f"{where} has no column {self.field!r}; allowed with ?field=: {_listed(row)}")
        return _row_document(row, self.field, where, f"{self.name}:{self.split}:{number}")

    def _library(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise CorpusError(
                f"'{self.spec}' needs the datasets library: pip install 'head-atlas[hub]'; "
                "without it: stdlib, or a .txt, .jsonl or .parquet file"
            ) from None
        return datasets

    def _failed(self, error: Exception) -> CorpusError:
        # The libraries underneath raise dozens of types, from socket errors to bare ValueError.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return CorpusError(
            f"'{self.spec}' cannot be streamed (is it spelt right, the hub in reach?): {reason}"
        )


# --------------------------------------------------------------------------- from a spec to a source


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


# --------------------------------------------------------------------------- small shared pieces


def _nonblank(spec: str, documents: Iterator[Document]) -> Iterator[Document]:
    """Pass on the documents that hold more than white space; raise if there was none."""
    found = False
    for document in documents:
        if document.text and not document.text.isspace():
            found = True
            yield Document(_unpaired(document.source), _unpaired(document.text))
    if not found:
        raise CorpusError(f"corpus {spec!r} holds no text; allowed: at least one document that is not blank")


def _unpaired(text: str) -> str:
    """Replace unpaired surrogates (JSON can carry them), which no tokenizer or table accepts.

    >>> _unpaired("a\\ud800b")
    'a?b'
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf8", "replace").decode()
    return text


def _row_document(row: dict[str, Any], field: str, where: str, default_source: str) -> Document:
    """Return a row's document; a null is blank, anything else that is no text is refused."""
    text = row[field]
    if not isinstance(text, str | None):
        raise CorpusError(f"{where}: field {field!r} is {type(text).__name__} {text!r:.40}; allowed: text")
    source = row.get("source") if field != "source" else None
    return Document(source if isinstance(source, str) and source else default_source, text or "")


def _file_spec(path: Path, field: str) -> str:
    return path.as_posix() + (f"?{urlencode({'field': field})}" if field != "text" else "")


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "nothing"


def _sha256(path: Path) -> str:
    with _reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Digest(Protocol):
    def update(self, data: bytes, /) -> object: ...


def _add(digest: _Digest, name: str, content: bytes) -> None:
    """Add a named content so that no two different lists of them give the same bytes."""
    for part in (name.encode(), content):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
