"""What the first page would otherwise wait for, made ready while the server starts.

Views are imported, the release is opened, and what every page or every search asks of it is asked once.
"""

import gc
import importlib
import logging
import os
import threading

import duckdb

from atlas.errors import AtlasError
from atlas.settings import Settings
from atlas.store import published

log = logging.getLogger(__name__)


def begin(settings: Settings) -> threading.Thread:
    """Make everything ready in a thread of its own; pages need not wait for it."""
    thread = threading.Thread(target=make_ready, args=(settings,), name="warm", daemon=True)
    thread.start()
    return thread


def make_ready(settings: Settings) -> None:
    """Import the views, and read what pages share; what is wrong is for the first page to say."""
    importlib.import_module("app.main")
    try:
        if settings.lake_url is None:  # with a lake a copy may have to come first, which the first page tells
            _read(settings)
    except (AtlasError, duckdb.Error) as error:
        log.info("nothing could be read ahead: %s", error)
    gc.freeze()  # what is here by now stays, so that collections need not look through it


def _read(settings: Settings) -> None:
    from app import search_answers, state
    from atlas.store.queries import overview, search_index

    if not published.names(settings):
        return
    release = published.current(settings, os.environ.get(state.RELEASE_VARIABLE) or None)
    scope = state.scope_of(settings, release)
    scope.ask(overview.vocabulary, scope.model.model)
    scope.ask_once(search_index.make_ready)
    search_answers.text_of(scope)
