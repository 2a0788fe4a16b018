"""The token store: blocks of equal length, each beginning with BOS, memory-mapped from one file.

Documents are joined by BOS, the stream is cut into runs of ``context - 1`` tokens, and BOS is put before
each run. The blocks are then put in a seeded random order, so that any prefix of the store (the held-out
blocks, the analysed blocks) is a fair sample of the text that was read.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from atlas.errors import CorpusError, ModelError
from atlas.progress import Progress

TOKENS, META, SOURCES = "tokens.bin", "meta.json", "sources.json"
_BATCH_CHARS = 1 << 20
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class _Document(Protocol):
    @property
    def source(self) -> str: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class TokenStoreMeta:
    """What a token store holds and how its bytes are laid out."""

    corpus: str
    context: int
    n_blocks: int
    bos: int
    dtype: str
    documents: int
    characters: int


class TokenStore:
    """Read-only token blocks on disk.

    Raises:
        CorpusError: the folder is not a token store or its file has another size than it says.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.meta = TokenStoreMeta(**json.loads((folder / META).read_text(encoding="utf8")))
            path = folder / TOKENS
            dtype = np.dtype(self.meta.dtype)
            expected = self.meta.n_blocks * self.meta.context * dtype.itemsize
            if path.stat().st_size != expected:
                raise CorpusError(
                    f"token store {str(path)!r} has {path.stat().st_size} bytes, not {expected}"
                )
            self._tokens = np.memmap(path, dtype, "r", shape=(self.meta.n_blocks, self.meta.context))
            self._sources = json.loads((folder / SOURCES).read_text(encoding="utf8"))
        except (OSError, ValueError, TypeError) as error:
            raise CorpusError(f"token store {str(folder)!r} cannot be read: {error}") from None

    def __len__(self) -> int:
        return self.meta.n_blocks

    def blocks(self, index: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Token ids [len(index), context] of the blocks asked for."""
        return np.asarray(self._tokens[np.asarray(index)], dtype=np.int64)

    def source(self, block: int) -> str:
        """The document in which the block begins."""
        return str(self._sources["names"][self._sources["block_document"][block]])


def load_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer of a model folder.

    Raises:
        ModelError: there is none, or it has no BOS (and no EOS to stand in for it).
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - tokenizers raises Exception itself for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"tokenizer in {str(folder)!r} cannot be read: {reason}") from None
    if bos_id(tokenizer) is None:
        raise ModelError(f"tokenizer in {str(folder)!r} has neither a BOS nor an EOS token")
    return tokenizer


def bos_id(tokenizer: Any) -> int | None:
    """BOS, or EOS where a tokenizer has no BOS."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _encoded(documents: Iterable[_Document], tokenizer: Any) -> Iterator[tuple[str, int, list[int]]]:
    """(source, characters, ids) of each document; encoded in batches, which tokenizers do in parallel."""
    pending: list[_Document] = []
    chars = 0
    for document in documents:
        pending.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield from _encode_batch(pending, tokenizer)
            pending, chars = [], 0
    if pending:
        yield from _encode_batch(pending, tokenizer)


def _encode_batch(documents: list[_Document], tokenizer: Any) -> Iterator[tuple[str, int, list[int]]]:
    batch = tokenizer([d.text for d in documents], add_special_tokens=False, verbose=False)["input_ids"]
    for document, ids in zip(documents, batch, strict=True):
        yield document.source, len(document.text), ids


class _Cutter:
    """Cuts the joined stream of documents into blocks and remembers where each block begins."""

    def __init__(self, context: int, bos: int, limit: int) -> None:
        self.context, self.bos, self.limit = context, bos, limit
        self.blocks: list[list[int]] = []
        self.block_document: list[int] = []
        self.names: list[str] = []
        self.characters = 0
        self._run: list[int] = []
        self._run_document = 0

    @property
    def full(self) -> bool:
        return len(self.blocks) >= self.limit

    def add(self, source: str, characters: int, ids: list[int]) -> None:
        if not ids:
            return  # an empty document would leave nothing but a BOS
        document = len(self.names)
        self.names.append(source)
        self.characters += characters
        stream = ids if document == 0 else [self.bos, *ids]
        start = 0
        while start < len(stream) and not self.full:
            if not self._run:
                self._run_document = document
            take = self.context - 1 - len(self._run)
            self._run += stream[start : start + take]
            start += take
            if len(self._run) == self.context - 1:
                self.blocks.append([self.bos, *self._run])
                self.block_document.append(self._run_document)
                self._run = []

    @property
    def n_tokens(self) -> int:
        return len(self.blocks) * (self.context - 1) + len(self._run)


def build_token_store(
    folder: Path,
    corpus: str,
    documents: Iterable[_Document],
    tokenizer: Any,
    *,
    context: int,
    blocks: int,
    progress: Progress,
    least_blocks: int = 1,
    seed: int = 0,
) -> TokenStoreMeta:
    """Write a token store into the (temporary) ``folder``.

    Raises:
        CorpusError: the text is empty or gives fewer than ``least_blocks`` blocks.
    """
    bos = bos_id(tokenizer)
    if bos is None:
        raise ModelError("the tokenizer has neither a BOS nor an EOS token")
    cutter = _Cutter(context, bos, blocks)
    for source, characters, ids in _encoded(documents, tokenizer):
        cutter.add(source, characters, ids)
        progress.update(len(cutter.blocks), blocks, f"{cutter.characters / 1e6:.1f} MB of text")
        if cutter.full:
            break
    _enough(corpus, cutter, least_blocks)
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    order = np.random.default_rng(seed).permutation(len(cutter.blocks))
    np.asarray(cutter.blocks, dtype=dtype)[order].tofile(folder / TOKENS)
    documents_of = np.asarray(cutter.block_document)[order].tolist()
    sources = {"names": cutter.names, "block_document": documents_of}
    (folder / SOURCES).write_text(json.dumps(sources), encoding="utf8")
    meta = TokenStoreMeta(
        corpus, context, len(order), bos, np.dtype(dtype).name, len(cutter.names), cutter.characters
    )
    (folder / META).write_text(json.dumps(asdict(meta)), encoding="utf8")
    return meta


def _enough(corpus: str, cutter: _Cutter, least_blocks: int) -> None:
    if cutter.n_tokens == 0:
        raise CorpusError(f"corpus {corpus!r} holds no text")
    if not cutter.blocks:
        raise CorpusError(
            f"corpus {corpus!r} holds {cutter.n_tokens} tokens; "
            f"one block needs {cutter.context - 1} besides BOS"
        )
    if len(cutter.blocks) < least_blocks:
        raise CorpusError(
            f"corpus {corpus!r} gives {len(cutter.blocks)} blocks of {cutter.context} tokens; "
            f"this build needs at least {least_blocks}"
        )


def visible(text: str) -> str:
    """A token with its white space made visible.

    >>> visible(" of"), visible("x\\n"), visible("\\t")
    ('·of', 'x⏎', '⇥')
    """
    shown = (
        text.replace(" ", "·").replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    )
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)


def vocabulary(tokenizer: Any, d_vocab: int) -> tuple[list[str], list[bytes]]:
    """Visible text and bytes of every token id below ``d_vocab``."""
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(min(d_vocab, len(tokenizer)))))
    byte_level = _byte_decoder() if _is_byte_level(tokenizer) else {}
    texts: list[str] = []
    raw: list[bytes] = []
    for token, name in enumerate(names):
        data = _token_bytes(name or "", byte_level)
        raw.append((name or "").encode() if token in special else data)
        text = data.decode("utf8", errors="replace")
        shown = visible(text) if "�" not in text else "".join(f"\\x{b:02x}" for b in data)
        texts.append(name if token in special else shown)
    missing = d_vocab - len(texts)
    return [*texts, *[f"<unused {d_vocab - missing + i}>" for i in range(missing)]], [*raw, *[b""] * missing]


def _token_bytes(name: str, byte_level: Mapping[str, int]) -> bytes:
    """The bytes that a vocabulary entry writes as ``name``.

    >>> _token_bytes("▁é", {}).decode(), _token_bytes("<0x0A>", {}), _token_bytes("é", _byte_decoder())
    (' é', b'\\n', b'\\xe9')
    """
    if byte_level:
        known = all(c in byte_level for c in name)
        return bytes(byte_level[c] for c in name) if known else name.encode()
    fallback = _BYTE_FALLBACK.fullmatch(name)
    return bytes([int(fallback[1], 16)]) if fallback else name.replace("▁", " ").encode()


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether the vocabulary is written in the characters of byte-level BPE, where "é" is one byte."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    parts = json.loads(backend.to_str())
    return '"ByteLevel"' in json.dumps([parts["pre_tokenizer"], parts["decoder"]])


def _byte_decoder() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte, inverted (GPT-2's ``bytes_to_unicode``)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
