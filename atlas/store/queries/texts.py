"""The analysed text as text: where strings stand in it, and which tokens they end in.

A release keeps token ids; here their bytes are joined once per release to the text that a person reads, with
the place of every token. At most four million tokens are joined, the first blocks, which are a fair sample of
the text because blocks lie in random order. A search is one pass over these bytes.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from atlas.errors import QueryError
from atlas.store.queries.rows import arrow

MOST_TOKENS = 4_000_000
MOST_PLACES = 20_000
"""Places of a string that are looked at; a commoner one says nothing about a feature."""
PLACES = pa.schema([("block", pa.int32()), ("low", pa.int16()), ("high", pa.int16())])
BOS = b"\xff"
"""Stands for the first token of a block. No text holds this byte, so that nothing is found across blocks."""
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Texts:
    """The text of some blocks as UTF-8, one after the other, each with BOS in front.

    Token t begins at byte ``starts[t]`` and ends before ``starts[t + 1]``; block ``blocks[i]`` is the tokens
    from ``rows[i]`` up to ``rows[i + 1]``.
    """

    blocks: Ints
    data: bytes
    lowered: bytes
    """The same with the letters A to Z small."""
    starts: npt.NDArray[np.int32]
    rows: Ints
    complete: bool
    """Whether all blocks of the release are here."""

    def text(self, row: int) -> str:
        """The text of one block; bytes that are no UTF-8 (of characters cut in two) are lone surrogates."""
        low, high = (int(self.starts[self.rows[i]]) for i in (row, row + 1))
        return self.data[low:high].removeprefix(BOS).decode("utf8", errors="surrogateescape")

    def positions(self, row: int, characters: Sequence[int]) -> list[int]:
        """The positions in their block of the tokens that hold some characters of :meth:`text`."""
        codes = np.frombuffer(self.text(row).encode("utf-32-le", "surrogatepass"), np.uint32)
        escaped = (codes >= 0xDC80) & (codes <= 0xDCFF)
        lengths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000) - 2 * escaped
        first = int(self.starts[self.rows[row]]) + len(BOS)
        places = first + np.concatenate([[0], np.cumsum(lengths)])[list(characters)]
        return (self.token_at(places) - self.rows[row]).tolist()

    def token_at(self, places: Ints) -> Ints:
        """The tokens that hold some bytes; the last one where several begin."""
        return np.searchsorted(self.starts, places, "right") - 1


def read_texts(con: duckdb.DuckDBPyConnection, model: str, most: int = MOST_TOKENS) -> Texts:
    """The text of a release's blocks, the first ``most`` tokens of it."""
    ((length, n),) = con.execute("SELECT coalesce(max(len(tokens)), 1), count(*) FROM docs").fetchall()
    docs = arrow(con, "SELECT block, tokens FROM docs ORDER BY block LIMIT ?", [max(1, most // length)])
    tokens = docs["tokens"].combine_chunks()
    rows = tokens.offsets.to_numpy().astype(np.int64)
    ids = tokens.flatten().to_numpy()
    known = arrow(con, "SELECT token, bytes FROM vocab WHERE model = ? ORDER BY token", [model])
    joined = _pieces(known, ids, rows[:-1][np.diff(rows) > 0])
    _, starts, data = joined.buffers()
    whole = data.to_pybytes() if data else b""
    edges = np.frombuffer(starts, np.int32, len(ids) + 1) if starts else np.zeros(1, np.int32)
    blocks = docs["block"].to_numpy().astype(np.int64)
    return Texts(blocks, whole, whole.lower(), edges, rows - rows[0], len(docs) == n)


def _pieces(known: pa.Table, ids: np.ndarray, first: np.ndarray) -> pa.BinaryArray:
    """The bytes of each token, none for one that is not known; BOS for those at ``first``.

    >>> known = pa.table({"token": [0, 2], "bytes": pa.array([b"a", b"bc"])})
    >>> _pieces(known, np.array([9, 2, 1, 0]), np.array([0])).to_pylist() == [BOS, b"bc", b"", b"a"]
    True
    """
    token = known["token"].to_numpy()
    place = np.full(max(int(ids.max(initial=0)), int(token.max(initial=0))) + 1, len(token), np.int32)
    place[token] = np.arange(len(token))
    wanted = place[ids]
    wanted[first] = len(token) + 1
    bytes_of = known["bytes"].cast(pa.binary()).fill_null(b"").combine_chunks()
    return pa.concat_arrays([bytes_of, pa.array([b"", BOS], pa.binary())]).take(pa.array(wanted))


def places_of(texts: Texts, wanted: str, *, exact: bool = False, most: int = MOST_PLACES) -> pa.Table:
    """Where a string stands: block, and the positions of the first and the last token that it touches.

    Upper and lower case count as equal unless ``exact``. At most ``most`` places, those of the first blocks.
    QueryError for an empty string.
    """
    if not wanted:
        raise QueryError("the text to look for is empty; allowed: at least one character")
    found = np.array(list(_occurrences(texts, wanted, exact, most)), np.int64).reshape(-1, 2)
    low, high = texts.token_at(found[:, 0]), texts.token_at(found[:, 1] - 1)
    row = np.searchsorted(texts.rows, low, "right") - 1
    columns = texts.blocks[row], low - texts.rows[row], high - texts.rows[row]
    arrays = [pa.array(c, f.type, safe=False) for c, f in zip(columns, PLACES, strict=True)]
    return pa.table(arrays, schema=PLACES)


def _occurrences(texts: Texts, wanted: str, exact: bool, most: int) -> Iterator[tuple[int, int]]:
    """First byte and end of each place, in order; places may overlap."""
    data = texts.data if exact else texts.lowered
    looked_for = re.compile(_pattern(wanted, exact))
    found = looked_for.search(data)
    while found and most:
        yield found.span()
        found, most = looked_for.search(data, found.start() + 1), most - 1


def _pattern(wanted: str, exact: bool) -> bytes:
    """A regular expression of the bytes of a string, in either case of its letters beyond A to Z, too.

    >>> _pattern("Ab", True), _pattern("Ab", False)
    (b'Ab', b'ab')
    """
    if exact:
        return re.escape(wanted.encode())
    parts = []
    for one in wanted:
        cases = {one.lower()} if one.isascii() else {one, one.lower(), one.upper()}
        parts.append(b"|".join(re.escape(case.encode()) for case in sorted(cases)))
        if len(cases) > 1:
            parts[-1] = b"(?:" + parts[-1] + b")"
    return b"".join(parts)


def tokens_like(con: duckdb.DuckDBPyConnection, model: str, wanted: str, most: int = 50) -> tuple[int, ...]:
    """Token ids whose text is ``wanted``, with or without a space before it, in any case.

    A space may be written as it is or as ·; where the text begins with one, only tokens that do count.

    >>> con = duckdb.connect()
    >>> _ = con.execute("CREATE TABLE vocab AS SELECT * FROM (VALUES ('m', 1, '·The'), ('m', 2, 'the'), "
    ...     "('m', 3, '·then')) AS v(model, token, text)")
    >>> tokens_like(con, "m", "the"), tokens_like(con, "m", " the")
    ((1, 2), (1,))
    """
    text = wanted.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    rows = con.execute(
        "SELECT token FROM vocab WHERE model = $model AND lower(text) IN (lower($text), lower('·' || $text)) "
        "ORDER BY token LIMIT $most",
        {"model": model, "text": text, "most": most},
    ).fetchall()
    return tuple(token for (token,) in rows)
