"""What the first page would otherwise wait for, made ready while the server starts.

Views are imported, the release is opened, what every page or every search asks of it is asked once, and the
system is told to read its file while there is memory for it: a page reads from hundreds of places.
"""

import gc
import importlib
import inspect
import logging
import os
import threading
from pathlib import Path

import duckdb

from atlas.db import annotations
from atlas.db.schema import exists
from atlas.errors import AtlasError
from atlas.settings import Settings
from atlas.store import published
from atlas.store.sandbox import prewarm

log = logging.getLogger(__name__)
STEP = 1 << 21
"""Bytes that the system is asked to read at a time; of one larger request it would do the beginning alone."""


def begin(settings: Settings) -> threading.Thread:
    """Make everything ready in a thread of its own; pages need not wait for it."""
    thread = threading.Thread(target=make_ready, args=(settings,), name="warm", daemon=True)
    thread.start()
    return thread


def make_ready(settings: Settings) -> None:
    """Import the views, and read what pages share; what is wrong is for the first page to say."""
    importlib.import_module("app.main")
    _done_once()
    try:
        _notes(settings)
        if settings.lake_url is None:  # with a lake a copy may have to come first, which the first page tells
            _read(settings)
    except (AtlasError, duckdb.Error) as error:
        log.info("nothing could be read ahead: %s", error)
    gc.freeze()  # what is here by now stays, so that collections need not look through it


def _done_once() -> None:
    """What Streamlit does at the first page alone: it looks who calls it, and imports what reads its icon."""
    inspect.stack()  # finds the file of every module, and keeps it
    importlib.import_module("PIL.PngImagePlugin")


def _notes(settings: Settings) -> None:
    """Ask the annotations as pages do: statements are put together once."""
    if exists(settings):
        annotations.head_progress(settings, "", settings.annotator)
        annotations.load_head(settings, "", 0, 0, settings.annotator)
        annotations.load_feature(settings, "", 0, settings.annotator)


def _read(settings: Settings) -> None:
    from app import families, search_answers, state
    from atlas.store.queries import heads, overview, search_index

    if not published.names(settings):
        return
    release = published.current(settings, os.environ.get(state.RELEASE_VARIABLE) or None)
    scope = state.scope_of(settings, release)
    scope.ask(overview.vocabulary, scope.model.model)
    scope.ask(heads.head_scores, scope.model.model)
    families.rules(scope)
    scope.ask_once(search_index.make_ready)
    search_answers.text_of(scope)
    prewarm()
    read_ahead(release.path)


def read_ahead(path: Path) -> bool:
    """Ask the system to read a file into memory that is free; False where less than twice its size is."""
    size = path.stat().st_size
    if not hasattr(os, "posix_fadvise") or 2 * size > _free_memory():
        return False
    with path.open("rb") as file:
        for start in range(0, size, STEP):
            os.posix_fadvise(file.fileno(), start, STEP, os.POSIX_FADV_WILLNEED)
    return True


def _free_memory() -> int:
    """Bytes that can be used without putting anything else out of memory; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
