"""A search as an address: read from the query string, written back, so that every search is a link."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

import streamlit as st

from app.state import Scope
from atlas.errors import QueryError
from atlas.store.queries.search import ROLES, Filters
from atlas.store.queries.search_index import COLUMNS
from atlas.tables import FAMILY_NAMES

QUESTIONS = {
    "": "any feature",
    **{role: f"{told} token" for role, told in ROLES.items()},
    "text": "text of its examples",
    "label": "label, tags or notes",
    "like": "like this feature",
}
"""What can be looked for."""
_MANY = ("family", "range")
_NAMES = ("by", "q", "exact", "like", "sae", "head", "order", "page", *_MANY)


@dataclass(frozen=True)
class Asked:
    """What the address asks for."""

    by: str = ""
    q: str = ""
    exact: bool = False
    sae: str = ""
    head: int | None = None
    families: tuple[str, ...] = ()
    ranges: tuple[tuple[str, float | None, float | None], ...] = ()
    order: str = ""
    page: int = 0

    def filters(self, scope: Scope) -> Filters:
        """The filters, over the SAEs of the model or the one that was chosen."""
        own = [ref for ref in scope.saes if ref.model == scope.model.model]
        saes = tuple(ref.sae for ref in own if not self.sae or ref.sae == self.sae)
        order = self.order or ("score" if self.by and self.by != "label" else "max_activation")
        return Filters(saes, self.head, self.families, self.ranges, order)

    def params(self) -> dict[str, Any]:
        """What stands in the address; what is as usual is left out."""
        found: dict[str, Any] = {
            "by": self.by, "q": self.q, "exact": "1" if self.exact else "", "sae": self.sae,
            "head": "" if self.head is None else str(self.head), "family": list(self.families),
            "range": [write_range(*one) for one in self.ranges], "order": self.order,
            "page": str(self.page) if self.page else "",
        }  # fmt: skip
        return {name: value for name, value in found.items() if value}

    def address(self) -> str:
        """The query string."""
        return urlencode(self.params(), doseq=True)


def write_range(name: str, low: float | None, high: float | None) -> str:
    """A range as it stands in an address.

    >>> write_range("density", None, 0.01), write_range("n_active", 5, None)
    ('density:..0.01', 'n_active:5..')
    """
    low_text, high_text = ("" if bound is None else f"{bound:g}" for bound in (low, high))
    return f"{name}:{low_text}..{high_text}"


def read_range(text: str) -> tuple[str, float | None, float | None]:
    """The range in a text; QueryError for one that cannot be read.

    >>> read_range("density:..0.01")
    ('density', None, 0.01)
    """
    name, colon, bounds = text.partition(":")
    low, dots, high = bounds.partition("..")
    try:
        if not colon or not dots or name not in COLUMNS:
            raise ValueError
        return name, float(low) if low else None, float(high) if high else None
    except ValueError:
        allowed = f"COLUMN:LOW..HIGH with a column of {', '.join(COLUMNS)}"
        raise QueryError(f"range {text!r} cannot be read; allowed: {allowed}") from None


def read(params: Mapping[str, Sequence[str]]) -> Asked:
    """What lists of parameters ask for; QueryError names a value that is not allowed."""

    def one(name: str) -> str:
        values = params.get(name) or [""]
        return values[-1]

    by = one("by")
    if by not in QUESTIONS:
        raise QueryError(f"question {by!r} is not known; allowed: {', '.join(filter(None, QUESTIONS))}")
    numbers = {}
    for name in ("head", "page"):
        text = one(name)
        if text and not (text.isascii() and text.isdigit()):
            raise QueryError(f"{name} {text!r} is not a number; allowed: 0 and more")
        numbers[name] = int(text) if text else None
    families = tuple(params.get("family") or ())
    unknown = [name for name in families if name not in FAMILY_NAMES]
    if unknown:
        raise QueryError(f"family {unknown[0]!r} is not known; allowed: {', '.join(FAMILY_NAMES)}")
    ranges = tuple(read_range(text) for text in params.get("range") or ())
    return Asked(
        by, one("q"), one("exact") == "1", one("sae"), numbers["head"], families, ranges, one("order"),
        numbers["page"] or 0,
    )  # fmt: skip


def current() -> Asked:
    """What this page's address asks for."""
    return read({name: st.query_params.get_all(name) for name in _NAMES})


def change(**other: Any) -> None:
    """Another search: the address is rewritten; all but a change of page begins at the first page."""
    asked = replace(current(), **{"page": 0, **other})
    go_to(asked.params())


def go_to(params: Mapping[str, Any]) -> None:
    """Let the address say this search and nothing else of one."""
    for name in _NAMES:
        st.query_params.pop(name, None)
    for name, value in params.items():
        st.query_params[name] = value
