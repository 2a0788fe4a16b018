"""The analysed text as text: where strings stand in it, and which tokens they end in.

A release keeps token ids; here they are joined to the text that a person reads, once per release, with the
place of every token. At most four million tokens are joined, the first blocks, which are a fair sample of the
text because blocks lie in random order.
"""

import itertools
from collections.abc import Iterable, Sequence
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
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Texts:
    """Text of some blocks: ``texts[i]`` is block ``blocks[i]``, whose token t begins at ``starts[i][t]``.

    BOS is the empty text: position 0 begins and ends at character 0.
    """

    blocks: Ints
    texts: tuple[str, ...]
    starts: tuple[npt.NDArray[np.int32], ...]
    complete: bool
    """Whether all blocks of the release are here."""

    def token_at(self, row: int, character: int) -> int:
        """The position of the token that holds a character of a block; the last one where several begin."""
        return int(np.searchsorted(self.starts[row], character, "right")) - 1


def read_texts(con: duckdb.DuckDBPyConnection, model: str, most: int = MOST_TOKENS) -> Texts:
    """The text of a release's blocks, the first ``most`` tokens of it."""
    rows = arrow(con, "SELECT token, bytes FROM vocab WHERE model = ? ORDER BY token", [model])
    known = dict(zip(rows["token"].to_pylist(), rows["bytes"].to_pylist(), strict=True))
    ((length, n),) = con.execute("SELECT coalesce(max(len(tokens)), 1), count(*) FROM docs").fetchall()
    docs = arrow(con, "SELECT block, tokens FROM docs ORDER BY block LIMIT ?", [max(1, most // length)])
    tokens = docs["tokens"].combine_chunks()
    flat, offsets = tokens.flatten().to_numpy(), tokens.offsets.to_numpy()
    joined = [_join(flat[a:b].tolist(), known) for a, b in itertools.pairwise(offsets)]
    texts, starts = (tuple(part) for part in zip(*joined, strict=True)) if joined else ((), ())
    return Texts(docs["block"].to_numpy().astype(np.int64), texts, starts, len(docs) == n)


def _join(ids: Sequence[int], known: dict[int, bytes]) -> tuple[str, npt.NDArray[np.int32]]:
    """The text of a block and the first character of each token; a character cut in two is the first's."""
    parts = [b"", *(known.get(token, b"") for token in ids[1:])]
    whole = b"".join(parts)
    text = whole.decode("utf8", errors="replace")
    edges = np.cumsum([0, *(len(part) for part in parts[:-1])])
    if len(text) == len(whole):
        return text, edges.astype(np.int32)
    return text, _characters(whole, edges)


def _characters(whole: bytes, edges: Ints) -> npt.NDArray[np.int32]:
    """Which character each byte edge stands at, by decoding piece by piece."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf8")(errors="replace")
    found, so_far = [], 0
    for low, high in zip(edges, [*edges[1:], len(whole)], strict=True):
        found.append(so_far)
        so_far += len(decoder.decode(whole[low:high]))
    return np.array(found, np.int32)


def places_of(texts: Texts, wanted: str, *, exact: bool = False, most: int = MOST_PLACES) -> pa.Table:
    """Where a string stands: block, and the positions of the first and the last token that it touches.

    Upper and lower case count as equal unless ``exact``. At most ``most`` places, those of the first blocks.
    QueryError for an empty string.
    """
    if not wanted:
        raise QueryError("the text to look for is empty; allowed: at least one character")
    looked_for = wanted if exact else wanted.lower()
    found: list[tuple[int, int, int]] = []
    for row, text in enumerate(texts.texts):
        for start in _occurrences(text if exact else text.lower(), looked_for):
            low, high = texts.token_at(row, start), texts.token_at(row, start + len(looked_for) - 1)
            found.append((int(texts.blocks[row]), low, high))
            if len(found) >= most:
                return _table(found)
    return _table(found)


def _occurrences(text: str, wanted: str) -> Iterable[int]:
    at = text.find(wanted)
    while at >= 0:
        yield at
        at = text.find(wanted, at + 1)


def _table(found: list[tuple[int, int, int]]) -> pa.Table:
    columns = list(zip(*found, strict=True)) if found else [(), (), ()]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, PLACES, strict=True)], schema=PLACES)


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
