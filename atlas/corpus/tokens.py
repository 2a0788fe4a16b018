"""The token store: blocks of equal length, each beginning with BOS, memory-mapped from one file.

Documents are joined by BOS, the stream is cut into runs of ``context - 1`` tokens, and BOS is put before
each run. The blocks are then put in a seeded random order, so that any prefix of the store (the held-out
blocks, the analysed blocks) is a fair sample of the text that was read. A store may begin later in the
stream (``skip``): the extensions of ``atlas.corpus.stores`` do.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from atlas.corpus.cutting import Cutter, write_in_order
from atlas.errors import CorpusError, ModelError
from atlas.progress import Progress

TOKENS, META, SOURCES, _AS_CUT = "tokens.bin", "meta.json", "sources.json", "as_cut.bin"
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
            self._tokens = _mapped(path, dtype, (self.meta.n_blocks, self.meta.context))
            sources = json.loads((folder / SOURCES).read_text(encoding="utf8"))
            self._names: list[str] = sources["names"]
            self._block_document = np.array(sources["block_document"], np.int64)
            if self._block_document.shape != (self.meta.n_blocks,):
                raise ValueError(f"{SOURCES} does not name one document for each of its blocks")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CorpusError(f"token store {str(folder)!r} cannot be read: {error}") from None

    def __len__(self) -> int:
        return self.meta.n_blocks

    def blocks(self, index: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Token ids [len(index), context] of the blocks asked for."""
        return np.asarray(self._tokens[np.asarray(index, np.int64)], np.int64)

    def at(self, block: npt.NDArray[np.int64], position: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Token ids of single occurrences."""
        return np.asarray(self._tokens[block, position], dtype=np.int64)

    def source(self, block: int) -> str:
        """The document in which the block begins."""
        return str(self._names[self._block_document[block]])


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, int]) -> npt.NDArray[Any]:
    """The blocks in a file, not read before they are asked for; an empty file cannot be mapped."""
    return np.memmap(path, dtype, "r", shape=shape) if shape[0] else np.empty(shape, dtype)


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
    skip: int = 0,
) -> TokenStoreMeta:
    """Write the blocks ``skip`` to ``skip + blocks`` of the text into the (temporary) ``folder``.

    Blocks are cut alike whatever ``skip`` and ``blocks`` are, and written as they come: memory holds one run
    and a number per block. Then they are put in an order that depends on ``seed``, ``skip`` and their number.

    Raises:
        CorpusError: the text is empty or gives fewer than ``least_blocks`` blocks after the skipped ones;
            with 0, a text that is too short gives a store without blocks.
    """
    bos = bos_id(tokenizer)
    if bos is None:
        raise ModelError("the tokenizer has neither a BOS nor an EOS token")
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    with (folder / _AS_CUT).open("wb") as out:
        cutter = Cutter(out, dtype, context=context, bos=bos, skip=skip, limit=blocks)
        for source, characters, ids in _encoded(documents, tokenizer):
            cutter.add(source, characters, ids)
            progress.update(cutter.n_cut, skip + blocks, f"{cutter.read / 1e6:.1f} MB of text")
            if cutter.full:
                break
    _enough(corpus, cutter, least_blocks)
    _shuffle(folder, cutter, dtype, np.random.default_rng([seed, skip] if skip else seed))
    meta = TokenStoreMeta(
        corpus, context, cutter.n_blocks, bos, dtype.name, cutter.documents, cutter.characters
    )
    (folder / META).write_text(json.dumps(asdict(meta)), encoding="utf8")
    return meta


def _shuffle(folder: Path, cutter: Cutter, dtype: np.dtype[Any], random: np.random.Generator) -> None:
    """Write the blocks and the documents in which they begin in a random order."""
    order = random.permutation(cutter.n_blocks)
    as_cut = _mapped(folder / _AS_CUT, dtype, (cutter.n_blocks, cutter.context))
    with (folder / TOKENS).open("wb") as out:
        write_in_order(out, as_cut, order)
    (folder / _AS_CUT).unlink()
    begins_in = np.frombuffer(cutter.block_document, np.int64)[order].tolist() if len(order) else []
    sources = {"names": cutter.names, "block_document": begins_in}
    with (folder / SOURCES).open("w", encoding="utf8") as text:
        json.dump(sources, text)


def _enough(corpus: str, cutter: Cutter, least_blocks: int) -> None:
    if cutter.n_blocks >= least_blocks:
        return
    after = f" after its first {cutter.skip} blocks" if cutter.skip else ""
    if cutter.n_tokens == 0:
        raise CorpusError(f"corpus {corpus!r} holds no text{after}")
    if cutter.n_blocks == 0:
        raise CorpusError(
            f"corpus {corpus!r} holds {cutter.n_tokens} tokens{after}; "
            f"one block needs {cutter.context - 1} besides BOS"
        )
    raise CorpusError(
        f"corpus {corpus!r} gives {cutter.n_blocks} blocks of {cutter.context} tokens{after}; "
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
