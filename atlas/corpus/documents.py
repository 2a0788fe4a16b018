"""A document, what every corpus source offers, and the small pieces that the sources share."""

import hashlib
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyarrow as pa

from atlas.errors import CorpusError


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


def nonblank(spec: str, documents: Iterator[Document]) -> Iterator[Document]:
    """Pass on the documents that hold more than white space; raise if there was none."""
    found = False
    for document in documents:
        if document.text and not document.text.isspace():
            found = True
            yield Document(without_lone_surrogates(document.source), without_lone_surrogates(document.text))
    if not found:
        raise CorpusError(f"corpus {spec!r} holds no text; allowed: at least one document that is not blank")


def without_lone_surrogates(text: str) -> str:
    """Replace unpaired surrogates (JSON can carry them), which no tokenizer or table accepts.

    >>> without_lone_surrogates("a\\ud800b")
    'a?b'
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf8", "replace").decode()
    return text


def row_document(row: dict[str, Any], field: str, where: str, default_source: str) -> Document:
    """Return a row's document; a null is blank, anything else that is no text is refused."""
    text = row[field]
    if not isinstance(text, str | None):
        raise CorpusError(f"{where}: field {field!r} is {type(text).__name__} {text!r:.40}; allowed: text")
    source = row.get("source") if field != "source" else None
    return Document(source if isinstance(source, str) and source else default_source, text or "")


def listed(names: Iterable[object]) -> str:
    """Names for an error message."""
    return ", ".join(map(str, names)) or "nothing"


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file; CorpusError if it cannot be read."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Digest(Protocol):
    def update(self, data: bytes, /) -> object: ...


def add_content(digest: _Digest, name: str, content: bytes) -> None:
    """Add a named content so that no two different lists of them give the same bytes."""
    for part in (name.encode(), content):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


class reading:  # noqa: N801 - a context manager, used like a function
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
