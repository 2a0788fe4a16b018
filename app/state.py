"""What a page works on: settings, the current release, cached answers, and who is annotating."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import streamlit as st

from atlas import access
from atlas.errors import AtlasError
from atlas.settings import Settings, load_settings
from atlas.store import published
from atlas.store import release as releases
from atlas.store.connection import cursor, open_release
from atlas.store.queries import overview
from atlas.store.release import ReleaseInfo

T = TypeVar("T")
RELEASE_VARIABLE = "ATLAS_RELEASE"
NAME_LENGTH = 80
MEMORY = "1GB"
"""What DuckDB may keep of one release; by itself it would take most of the machine's memory."""


@dataclass(frozen=True)
class Scope:
    """The release, model and SAE variant that the page shows."""

    settings: Settings
    release: ReleaseInfo
    models: tuple[overview.Model, ...]
    model: overview.Model
    saes: tuple[overview.SaeRef, ...]
    variant: str | None

    def ask(self, query: Callable[..., T], *args: Any) -> T:
        """The answer of a named query on this release; asked once per release file and arguments."""
        return _answer(str(self.release.path), self.release.digest, _name(query), args, query)

    def ask_once(self, query: Callable[..., T], *args: Any) -> T:
        """The same, not kept: for arguments that are tables, and for answers that are large."""
        return query(cursor(_connection(str(self.release.path), self.release.digest)), *args)

    @property
    def z_saes(self) -> dict[int, overview.SaeRef]:
        """The z SAE of each layer, in the chosen variant."""
        return overview.z_saes(self.saes, self.model.model, self.variant)

    @property
    def n_heads_all(self) -> int:
        """Layers times heads."""
        return self.model.n_layers * self.model.n_heads


def _name(query: Callable[..., Any]) -> str:
    return f"{query.__module__}.{query.__qualname__}"


@st.cache_resource(max_entries=3, show_spinner=False)
def _connection(path: str, digest: str) -> duckdb.DuckDBPyConnection:  # noqa: ARG001 - part of the key
    connection = open_release(Path(path))
    connection.execute(f"SET memory_limit = '{MEMORY}'")
    return connection


@st.cache_resource(max_entries=300, show_spinner=False)
def _answer(path: str, digest: str, name: str, args: tuple[Any, ...], _query: Callable[..., T]) -> T:  # noqa: ARG001
    return _query(cursor(_connection(path, digest)), *args)


@st.cache_resource(max_entries=8, show_spinner=False)
def _current(folder: str, name: str | None, stamp: tuple[tuple[str, int], ...]) -> ReleaseInfo:  # noqa: ARG001
    return releases.current(Path(folder), name)


def _stamp(folder: Path) -> tuple[tuple[str, int], ...]:
    """Changes whenever any release is published: names and times of the pointers."""
    pointers = sorted(folder.glob(f"*/{releases.CURRENT}"))
    return tuple((str(p), p.stat().st_mtime_ns) for p in pointers)


def release_names(settings: Settings) -> list[str]:
    """Names of the releases that have a current version."""
    return published.names(settings)


def current_release(settings: Settings) -> ReleaseInfo:
    """The release that the link, the sidebar or the command line names, or the newest one.

    Raises StoreError where there is none of that name.
    """
    name = st.query_params.get("release") or st.session_state.get("release")
    name = name or os.environ.get(RELEASE_VARIABLE) or None
    if settings.lake_url is not None:
        return published.current(settings, name, wait=False)
    return _current(str(settings.releases), name, _stamp(settings.releases))


def scope() -> Scope:
    """Everything a page needs; StoreError names what does not exist and what does."""
    settings = load_settings()
    asked, must = st.query_params.get("model"), "model" in st.query_params
    chosen = st.session_state.get("model"), st.session_state.get("variant")
    return scope_of(settings, current_release(settings), asked or chosen[0], chosen[1], must=must)


def scope_of(
    settings: Settings,
    release: ReleaseInfo,
    model: str | None = None,
    variant: str | None = None,
    *,
    must: bool = False,
) -> Scope:
    """A release with one of its models and variants of SAEs; the first where there is none of that name.

    A model that ``must`` be there and is not raises StoreError.
    """
    key = (str(release.path), release.digest)
    models = _answer(*key, _name(overview.models), (), overview.models)
    saes = _answer(*key, _name(overview.sae_refs), (), overview.sae_refs)
    if model not in [m.model for m in models] and not must:
        model = None
    found = overview.find_model(models, model)
    known = overview.variants(saes, found.model)
    if variant not in known:
        variant = known[0] if known else None
    return Scope(settings, release, models, found, saes, variant)


def annotator(settings: Settings) -> str:
    """The name under which this session writes: the login's; without logins, the one that was typed."""
    return typed_annotator(settings) if settings.auth == "none" else access.actor().name


def typed_annotator(settings: Settings) -> str:
    """The sidebar's name, else the link's, else the settings'."""
    name = st.session_state.get("annotator") or st.query_params.get("annotator") or settings.annotator
    return " ".join(str(name).split())[:NAME_LENGTH] or settings.annotator


def say_error(error: AtlasError) -> None:
    """One calm line for something the user can act on; shown as plain text."""
    st.error(plain(str(error)), icon=":material/error:")


_MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_{}[]()#+-.!|>~$:<&"})


def plain(text: str) -> str:
    r"""Text that Markdown shows as it stands.

    >>> plain("a*b <i>")
    'a\\*b \\<i\\>'
    """
    return text.replace("\r", " ").replace("\n", " ").translate(_MARKS)
