"""Views in a real browser, checked by axe-core: names, roles and contrast; light and dark."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
from dataclasses import replace
from importlib.resources import files
from urllib.parse import quote

import pytest

from atlas.db import annotations
from atlas.db.notes import HeadAnnotation
from atlas.settings import load_settings
from tests.test_app_browser import browser, served

pytestmark = pytest.mark.browser
SAE = "synthetic/L00.z.topk-64"
VIEWS = {
    "atlas": "Atlas of synthetic",
    f"feature?sae={quote(SAE)}&feature=3&proxy=a": "Feature 3",
    "search?family=dense": "Search",
    "compare?one=L0H0&other=L0H1": "Compare",
    "sql?q=SELECT+1+AS+one": "SQL",
}
MORE = {
    "head?head=L0H1&annotator=ann": ("L0H1", "h"),
    "head?head=L0H1&annotator=ann#help": ("L0H1", "?"),
    "head?head=L9H9": ("", ""),
    f"feature?sae={quote(SAE)}&feature=3&annotator=ann#note": ("Feature 3", "1c"),
    f"feature?sae={quote(SAE)}&feature=3#history": ("Feature 3", "3h"),
    "overview": ("Overview", ""),
    "atlas?form=Table": ("Atlas of synthetic", ""),
    "queue?order=random": ("Queue", ""),
    "agreement": ("Agreement", ""),
    "survey": ("Survey", ""),
    "qk": ("Queries and keys", ""),
    "ioi": ("IOI", ""),
    "tasks": ("Tasks without a head", ""),
    "induction": ("", ""),
    "circuit": ("Circuits", ""),
    "try": ("Try a text", ""),
    "training": ("Training", ""),
    "jobs": ("Jobs", ""),
    "search?by=at&q=nosuchtoken": ("Search", ""),
    "sql?q=SELECT+1+FROM": ("SQL", ""),
}
"""Every other view and state: what its heading says, and keys that open what is folded away."""
NOT_OURS = {"region", "landmark-unique", "landmark-one-main", "scrollable-region-focusable"}
"""Streamlit's page has landmarks around our content only in part."""
STREAMLITS = (
    "stDataFrame",
    "dvn-",
    "gdg-",
    "data-grid",
    "stHeader",
    "stToolbar",
    "stSidebar",
    "react-select",
)
"""Marks of what Streamlit itself draws: the canvas of a table and its hidden copy, its menus."""
QUIET = ('class="ws"', "<sub>")
"""Marks of white space inside tokens are dim on purpose: they are no text."""
WORST = ("serious", "critical")


@pytest.fixture(scope="module")
def axe():
    return (files("axe_playwright_python") / "axe.min.js").read_text()


def violations(page, axe):
    page.evaluate(axe)
    found = page.evaluate("async () => (await axe.run(document, { resultTypes: ['violations'] })).violations")
    said = []
    for one in found:
        if one["impact"] not in WORST or one["id"] in NOT_OURS:
            continue
        for node in one["nodes"]:
            text = f"{node['target']} {node['html'][:160]}"
            if not any(mark in text for mark in (*STREAMLITS, *QUIET)):
                said.append(f"{one['id']}: {text}")
    return said


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """An app in which two people have judged one head differently, so that there is something to settle."""
    home = tmp_path_factory.mktemp("home")
    with served(home) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATLAS_HOME", str(home))
        for who, judged in (("ann", "monosemantic"), ("bea", "polysemantic")):
            note = HeadAnnotation("synthetic", 0, 1, who, label="a label", semanticity=judged, status="done")
            stored = annotations.save_head(load_settings(), note, 0)
            annotations.save_head(load_settings(), replace(stored, notes="more"), 1)
        yield url


AT_REST = """() => {
  const still = document.querySelector(".stApp[data-test-script-state=notRunning]")
    && !document.querySelector("[data-stale=true]")
    && document.getAnimations().every((one) => one.playState !== "running");
  window.still = still ? (window.still || 0) + 1 : 0;
  return window.still > 20;
}"""


def at_rest(page):
    """Wait until nothing has run, faded or moved for twenty frames, for what fades has little contrast."""
    page.evaluate("window.still = 0")
    page.wait_for_function(AT_REST)


@pytest.mark.parametrize(("view", "title"), VIEWS.items(), ids=[v.split("?")[0] for v in VIEWS])
def test_no_serious_fault(browser, address, axe, view, title):
    page = browser.new_page()
    try:
        page.goto(f"{address}/{view}")
        page.get_by_role("heading", name=title, exact=True).first.wait_for()
        at_rest(page)
        assert violations(page, axe) == []
    finally:
        page.close()


@pytest.mark.parametrize(("view", "state"), MORE.items(), ids=[v.split("&")[0] for v in MORE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_fault_in_any_state(browser, address, axe, view, state, scheme):
    title, keys = state
    page = browser.new_page()
    try:
        page.emulate_media(color_scheme=scheme)
        page.goto(f"{address}/{view.split('#')[0]}")
        wanted = (
            page.get_by_role("heading", name=title, exact=True) if title else page.locator("h1, .stAlert")
        )
        wanted.first.wait_for()
        at_rest(page)
        for key in keys:
            page.keyboard.press(key)
        page.locator("html:not([data-held])").wait_for(state="attached")
        at_rest(page)
        assert violations(page, axe) == []
    finally:
        page.close()


def test_the_dark_theme_keeps_its_contrast(browser, address, axe):
    page = browser.new_page()
    try:
        page.emulate_media(color_scheme="dark")
        page.goto(f"{address}/head?head=L0H1")
        page.locator(".card").first.wait_for()
        at_rest(page)
        assert violations(page, axe) == []
    finally:
        page.close()
