"""Datasets of the Hugging Face hub, streamed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from atlas.corpus.documents import Document, listed, nonblank, row_document
from atlas.errors import CorpusError


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
        return nonblank(self.spec, self._documents())

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
            raise CorpusError(f"{where} has no column {self.field!r}; allowed with ?field=: {listed(row)}")
        return row_document(row, self.field, where, f"{self.name}:{self.split}:{number}")

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
