"""Views in a real browser, checked by axe-core: names, roles and contrast; light and dark."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
from importlib.resources import files
from urllib.parse import quote

import pytest

from tests.test_app_browser import address, browser

pytestmark = pytest.mark.browser
SAE = "synthetic/L00.z.topk-64"
VIEWS = {
    "atlas": "Atlas of synthetic",
    f"feature?sae={quote(SAE)}&feature=3&proxy=a": "Feature 3",
    "search?family=dense": "Search",
    "compare?one=L0H0&other=L0H1": "Compare",
    "sql?q=SELECT+1+AS+one": "SQL",
}
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


@pytest.mark.parametrize(("view", "title"), VIEWS.items(), ids=[v.split("?")[0] for v in VIEWS])
def test_no_serious_fault(browser, address, axe, view, title):
    page = browser.new_page()
    try:
        page.goto(f"{address}/{view}")
        page.get_by_role("heading", name=title, exact=True).first.wait_for()
        page.wait_for_function("() => !document.querySelector('[data-stale=true]')")
        page.wait_for_timeout(600)
        assert violations(page, axe) == []
    finally:
        page.close()


def test_the_dark_theme_keeps_its_contrast(browser, address, axe):
    page = browser.new_page()
    try:
        page.emulate_media(color_scheme="dark")
        page.goto(f"{address}/head?head=L0H1")
        page.locator(".card").first.wait_for()
        page.wait_for_timeout(600)
        assert violations(page, axe) == []
    finally:
        page.close()
