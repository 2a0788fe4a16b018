"""What the components draw, as plain data: token texts once each, numbers rounded, nothing marked up."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from atlas.store.queries.examples import Attribution, Example


def rounded(value: float | None, digits: int = 4) -> float | None:
    """A number short enough to send: significant digits; None for what JSON cannot carry.

    >>> rounded(0.123456), rounded(float("nan")), rounded(None), rounded(12345.678)
    (0.1235, None, None, 12350.0)
    """
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


class Texts:
    """Token texts, each kept once and named by its place.

    >>> texts = Texts(["a", "·b"])
    >>> [texts.place(1), texts.place(0), texts.place(1), texts.place(7)], texts.list
    ([0, 1, 0, 2], ['·b', 'a', '<7>'])
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = vocabulary
        self.list: list[str] = []
        self._places = _Places(self)

    def text(self, token: int) -> str:
        """The visible form of a token id."""
        return self.vocabulary[token] if 0 <= token < len(self.vocabulary) else f"<{token}>"

    def place(self, token: int) -> int:
        """Where in ``list`` the token's text stands."""
        return self._places[token]

    def places(self, tokens: Iterable[int]) -> "list[int]":
        """Where the texts of many tokens stand."""
        return [*map(self._places.__getitem__, tokens)]


class _Places(dict[int, int]):
    """Places of tokens; one that is asked for the first time gets the next. A page asks for 10,000."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def __missing__(self, token: int) -> int:
        self[token] = len(self._texts.list)
        self._texts.list.append(self._texts.text(token))
        return self[token]


def attribution(dfa: Attribution | None) -> dict[str, Any] | None:
    """DFA of one example: h by head, their sum, bias term, pre-activation, sources as triples.

    ``match`` is the strongest source with the number of tokens before it that repeat those up to the
    example's position; None where none does.
    """
    if dfa is None:
        return None
    return {
        "h": [rounded(v) or 0.0 for v in dfa.by_head],
        "sum": rounded(dfa.pre_activation - dfa.bias_term, 5),  # parts of heads are stored rounded
        "bias": rounded(dfa.bias_term),
        "pre": rounded(dfa.pre_activation),
        "src": [[head, source, rounded(v) or 0.0] for head, source, v in dfa.sources],
        "match": [dfa.top_source, dfa.matched_prefix] if dfa.matched_prefix else None,
    }


def example(one: Example, texts: Texts) -> dict[str, Any]:
    """One example: group, rank, block, position, activation, tokens, active positions, DFA.

    ``miss`` is the pre-activation of a near miss, and None for an example on which the feature fires.
    """
    return {
        "g": one.group,
        "r": one.rank,
        "b": one.block,
        "p": one.position,
        "a": rounded(one.activation),
        "miss": rounded(one.near_miss),
        "s": one.source,
        "t": texts.places(one.tokens),
        "act": [[position, rounded(value) or 0.0] for position, value in one.active],
        "dfa": attribution(one.dfa),
    }
