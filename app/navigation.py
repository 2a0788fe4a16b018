"""Links between views: as addresses that can be shared, and as moves inside a session."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import streamlit as st

from app import moves, ways
from atlas.errors import StoreError

_PAGES: dict[str, Any] = {}
_KEPT = ("release", "annotator", "blind", "order", "seed")
"""What stays in the address from view to view."""


def register(pages: Mapping[str, Any]) -> None:
    """Make the pages of this run known to :func:`go`."""
    _PAGES.update(pages)


def page(view: str) -> Any:
    """The page of a view, for a link inside this session."""
    return _PAGES[view]


def href(view: str, **params: object) -> str:
    """A relative address of a view that opens the same thing in another browser.

    >>> href("head", head="L5H3", sae=None)
    'head?head=L5H3'
    """
    kept = {key: str(value) for key, value in params.items() if value is not None}
    return f"{view}?{urlencode(kept)}" if kept else view


def go(address: str) -> None:
    """Open an address made by :func:`href` in this session."""
    parts = urlsplit(address)
    page = _PAGES.get(parts.path)
    if page is None:
        raise StoreError(f"view {parts.path!r} does not exist; allowed: {', '.join(_PAGES)}")
    kept = {key: st.query_params[key] for key in _KEPT if key in st.query_params}
    asked = dict(parse_qsl(parts.query))
    moves.expect(parts.path, asked)
    params = {**kept, **asked}
    ways.begin(parts.path, address, params)
    st.switch_page(page, query_params=params)


def arrive(view: str) -> None:
    """Say which view a run is for; where that is the one just left, go on to the one that was asked for."""
    address = ways.arrive(view)
    if address is not None:
        go(address)


def follow(result: Any) -> None:
    """Follow the link that was clicked inside a component, if one was."""
    address = getattr(result, "open", None)
    if isinstance(address, str) and address:
        go(address)


def bound_param(name: str, labels: Mapping[str, str]) -> None:
    """Lets an address name a choice by its key, too, where the widget bound to it knows its label alone."""
    asked = st.query_params.get(name)
    if asked in labels and name not in st.session_state:
        st.session_state[name] = asked


def index_param(name: str, allowed: int, what: str) -> int | None:
    """A number from the address in [0, allowed), None if absent; StoreError names a wrong one."""
    text = st.query_params.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or int(text) >= allowed:
        raise StoreError(f"{what} {text!r} does not exist; allowed: 0 to {allowed - 1}")
    return int(text)
