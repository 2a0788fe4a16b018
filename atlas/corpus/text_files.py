"""Text in files: plain, JSON lines (also compressed), Parquet; streamed, never read whole."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import urlencode

import pyarrow as pa
import pyarrow.parquet as pq

from atlas.corpus.documents import Document, add_content, listed, nonblank, reading, row_document, sha256_of
from atlas.errors import CorpusError

PART_CHARS = 1_000_000  # a longer text file is handed out in parts of about this size


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
            add_content(digest, self._name(path), sha256_of(path).encode())
        return f"text {self.path.name} sha256:{digest.hexdigest()}"

    def documents(self) -> Iterator[Document]:
        """Yield a document per file; a long file comes in parts of about a million characters."""
        return nonblank(self.spec, self._documents())

    def _documents(self) -> Iterator[Document]:
        for path in self._files():
            with reading(path), path.open("rb") as raw, io.TextIOWrapper(raw, "utf-8-sig") as lines:
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
        return f"jsonl {self.path.name} field:{self.field} sha256:{sha256_of(self.path)}"

    def documents(self) -> Iterator[Document]:
        """Yield a document per row."""
        return nonblank(self.spec, self._documents())

    def _documents(self) -> Iterator[Document]:
        opener = _COMPRESSIONS[self.path.suffix]
        with reading(self.path), opener(self.path) as raw:
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
            raise CorpusError(f"{where} has no field {self.field!r}; allowed with ?field=: {listed(row)}")
        return row_document(row, self.field, where, f"{self.path.name}:{number}")


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
        return f"parquet {self.path.name} field:{self.field} sha256:{sha256_of(self.path)}"

    def documents(self) -> Iterator[Document]:
        """Yield a document per row."""
        return nonblank(self.spec, self._documents())

    def _documents(self) -> Iterator[Document]:
        with reading(self.path), pq.ParquetFile(self.path) as file:
            columns = file.schema_arrow.names
            if self.field not in columns:
                raise CorpusError(
                    f"'{self.path}' has no column {self.field!r}; allowed with ?field=: {listed(columns)}"
                )
            read = [self.field, *(["source"] if "source" in columns and self.field != "source" else [])]
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=read):
                for row in batch.to_pylist():
                    number += 1
                    where = f"'{self.path}' row {number}"
                    yield row_document(row, self.field, where, f"{self.path.name}:{number}")


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


def _file_spec(path: Path, field: str) -> str:
    return path.as_posix() + (f"?{urlencode({'field': field})}" if field != "text" else "")
