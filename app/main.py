"""The entry point of the app: pages, sidebar, and the empty and error states that all views share."""

import os
from pathlib import Path

import duckdb
import streamlit as st

from app import access, navigation, state, style, ways
from app.views import (
    agreement,
    circuit,
    compare,
    feature,
    head,
    induction,
    ioi,
    jobs,
    overview,
    qk,
    queue,
    search,
    sql,
    survey,
    tasks,
    training,
    try_text,
)
from app.views import atlas as atlas_view
from atlas.errors import AtlasError, StoreError
from atlas.settings import Settings, load_settings
from atlas.store import published
from atlas.store.queries.overview import variants

ICON = Path(__file__).with_name("icon.png")
MAKE_ONE = "atlas build --model docs-12l --sites z --layers all"


def _home() -> None:
    """The bare address shows the atlas, under the atlas's own address."""
    navigation.go("atlas")


def _pages() -> dict[str, st.Page]:
    page = st.Page
    return {
        "": page(_home, title="Head Atlas", default=True, visibility="hidden"),
        "overview": page(overview.render, title="Overview", url_path="overview"),
        "atlas": page(atlas_view.render, title="Atlas", url_path="atlas"),
        "head": page(head.render, title="Head", url_path="head"),
        "queue": page(queue.render, title="Queue", url_path="queue"),
        "agreement": page(agreement.render, title="Agreement", url_path="agreement"),
        "survey": page(survey.render, title="Survey", url_path="survey"),
        "feature": page(feature.render, title="Feature", url_path="feature"),
        "search": page(search.render, title="Search", url_path="search"),
        "try": page(try_text.render, title="Try a text", url_path="try"),
        "induction": page(induction.render, title="Induction", url_path="induction"),
        "tasks": page(tasks.render, title="Tasks", url_path="tasks"),
        "circuit": page(circuit.render, title="Circuits", url_path="circuit"),
        "qk": page(qk.render, title="Queries and keys", url_path="qk"),
        "ioi": page(ioi.render, title="IOI", url_path="ioi"),
        "compare": page(compare.render, title="Compare", url_path="compare"),
        "training": page(training.render, title="Training", url_path="training"),
        "sql": page(sql.render, title="SQL", url_path="sql"),
        "jobs": page(jobs.render, title="Jobs", url_path="jobs"),
    }


# What stands in the bar itself, and what in its menus; all else is in the last menu. (Streamlit would write a
# docstring of this file onto the page.)
MENUS = {
    "": ("", "overview", "atlas", "head", "feature", "search", "compare", "try"),
    "Annotate": ("queue", "agreement", "survey"),
    "Circuits": ("circuit", "induction", "qk", "tasks", "ioi"),
}


def _menus(pages: dict[str, st.Page]) -> dict[str, list[st.Page]]:
    """Pages by menu, none left out."""
    named = {name for names in MENUS.values() for name in names}
    menus = {menu: [pages[name] for name in names if name in pages] for menu, names in MENUS.items()}
    return menus | {"Data": [page for name, page in pages.items() if name not in named]}


def _forget(key: str) -> None:
    """A choice in the sidebar replaces the one that the address named."""
    st.query_params.pop(key, None)


def _choose(label: str, key: str, options: list[str], note: str) -> None:
    """A choice that follows the address; nothing where there is no choice."""
    if len(options) > 1:
        asked = st.query_params.get(key)
        if asked in options:
            st.session_state[key] = asked
        elif st.session_state.get(key) not in options:
            st.session_state[key] = options[0]
        st.selectbox(label, options, key=key, help=note, on_change=_forget, args=(key,))


def _sidebar(settings: Settings) -> None:
    with st.sidebar:
        access.who_is_it(settings)
        names = state.release_names(settings)
        fixed = os.environ.get(state.RELEASE_VARIABLE)
        if len(names) > 1 and not fixed:
            newest = state.current_release(settings).name
            _choose("Release", "release", [newest, *(n for n in names if n != newest)], "What was published.")
        if not names:
            return
        scope = state.scope()
        _choose("Model", "model", [m.model for m in scope.models], "A model of this release.")
        known = variants(scope.saes, scope.model.model)
        _choose("SAEs of z", "variant", list(known), "Which SAE stands for each layer.")
        st.caption(f"Release {state.plain(scope.release.label)} · {scope.release.created[:16]} UTC")


def _empty(settings: Settings) -> None:
    """What a new user sees before anything was built."""
    style.title("Head Atlas", "no release yet")
    st.write("There is no published release yet, so there is nothing to show. This command makes one:")
    st.code(MAKE_ONE, language="bash")
    st.write(
        "It trains SAEs on a bundled model, computes every table and publishes the release; this page picks "
        "it up by itself. The **Jobs** view shows how far a build is."
    )
    st.caption(f"Looked in {state.plain(published.place(settings))}")


def _note(settings: Settings) -> None:
    """What to know of the release's copy on this machine: the lake does not answer, a newer one is coming."""
    if settings.lake_url is None or not state.release_names(settings):
        return
    note = state.current_release(settings).note
    if note:
        st.caption(f":material/cloud_off: {state.plain(note)}")


def _too_old(error: duckdb.Error) -> StoreError:
    """What it means that a view asked for a table or a column that the release has not."""
    first = str(error).splitlines()[0][:200]
    return StoreError(
        f"this release was made by another version of Head Atlas and lacks what this view reads ({first}); "
        "the same build, run again with this version, publishes a release that has it"
    )


def main() -> None:
    """Draw the chosen page."""
    st.set_page_config(layout="wide", initial_sidebar_state="collapsed")
    style.inject()
    pages = _pages()
    navigation.register(pages)
    page = st.navigation(_menus(pages), position="top")
    navigation.arrive(page.url_path)
    # Pages have no icons of their own: Streamlit would fetch them from a server elsewhere as favicons.
    st.set_page_config(page_title=f"{page.title} · Head Atlas", page_icon=str(ICON))
    try:
        settings = load_settings()
        access.gate(settings)
        _sidebar(settings)
        if not state.release_names(settings) and page.url_path not in ("jobs", "training"):
            _empty(settings)
        else:
            _note(settings)
            page.run()
            ways.sent()
    except StoreError as error:
        state.say_error(error)
        st.page_link(pages["atlas"], label="Go to the atlas of heads")
    except AtlasError as error:
        state.say_error(error)
    except (duckdb.BinderException, duckdb.CatalogException) as error:
        state.say_error(_too_old(error))


if __name__ == "__main__":
    main()
