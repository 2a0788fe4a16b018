# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
"""The SQL editor in a real browser: suggestions by keyboard, and the place of an error."""

import re
from functools import partial
from types import SimpleNamespace

import pytest

from tests.test_app_axe import axe, violations
from tests.test_app_browser import address, browser, page

pytestmark = pytest.mark.browser
TRIES = 1000
"""Times that suggestions are asked for, every tenth of a second."""


@pytest.fixture
def editor(page, address):
    """An empty editor, ready to suggest, with what is around it."""
    from playwright.sync_api import expect

    page.goto(f"{address}/sql")
    expect(page.locator("html[data-complete=ready]")).to_have_count(1)
    # A page that is still being made puts the list away, and so does one that scrolls.
    expect(page.locator(".stApp[data-test-script-state=notRunning]")).to_have_count(1)
    area = page.get_by_label("SQL", exact=True)
    area.scroll_into_view_if_needed()
    area.fill("")
    return SimpleNamespace(area=area, list=page.get_by_role("listbox", name="Suggestions"), page=page)


def put(editor, text):
    """Write a text whose place of typing is marked by a bar, and ask for suggestions there."""
    editor.area.fill(text.replace("|", ""))
    editor.area.evaluate("(area, at) => area.setSelectionRange(at, at)", text.index("|"))
    editor.page.keyboard.press("Control+Space")


def suggested(editor, text):
    """Names suggested at the bar in a text; asked for again where the page has put them away meanwhile."""
    put(editor, text)
    for _ in range(TRIES):
        names = editor.list.locator("[role=option] b").all_inner_texts()
        if names:
            return names
        editor.page.wait_for_timeout(100)
        editor.page.keyboard.press("Control+Space")
    pytest.fail(f"nothing is suggested in {text!r}")


def test_a_query_is_written_with_suggestions_alone(editor, axe):
    from playwright.sync_api import expect

    keys = editor.page.keyboard
    keys.type("sel")
    expect(editor.list).to_be_visible()
    keys.press("Tab")
    keys.type(" * FROM feature_a")
    expect(editor.list.locator("[role=option]").first).to_contain_text("feature_annotations")
    keys.press("Escape")
    expect(editor.list).to_be_hidden()
    for _ in "_a":
        keys.press("Backspace")
    expect(editor.area).to_be_focused()
    first = editor.list.locator("[role=option]").first
    expect(first).to_contain_text("One row per SAE x feature")
    expect(first).to_have_attribute("aria-selected", "true")
    assert editor.area.get_attribute("aria-activedescendant") == first.get_attribute("id")
    assert editor.area.get_attribute("aria-controls") == editor.list.get_attribute("id")
    assert violations(editor.page, axe) == []
    keys.press("Enter")
    keys.type(" f WHERE f.ma")
    expect(editor.list.locator("[aria-selected=true]")).to_contain_text("largest activation")
    keys.press("ArrowDown")
    keys.press("ArrowUp")
    keys.press("Enter")
    keys.type(" > 0")
    expect(editor.area).to_have_value("select * FROM features f WHERE f.max_activation > 0")
    keys.press("Control+z")
    expect(editor.area).not_to_have_value("select * FROM features f WHERE f.max_activation > 0")
    keys.press("Tab")
    expect(editor.area).not_to_be_focused()


def test_what_is_suggested_depends_on_the_place(editor):
    from playwright.sync_api import expect

    at = partial(suggested, editor)
    assert at("SELECT | FROM saes s JOIN features f USING (sae)")[:2] == ["sae", "model"]
    assert {"layer", "density", "s", "f"} <= {*at("SELECT | FROM saes s, features f")}
    assert "count" in at("SELECT cou| FROM saes s")
    assert at("SELECT sae fr| saes")[0] == "FROM"
    assert "density" not in at("SELECT s.| FROM saes s JOIN features f USING (sae)")
    put(editor, "SELECT * FROM x|")
    expect(editor.list).to_be_hidden()
    assert at("WITH mine AS (SELECT 1) SELECT * FROM |")[0] == "mine"
    # The tables of brackets are seen inside them alone.
    assert "density" not in at("SELECT | FROM saes WHERE sae IN (SELECT sae FROM features)")
    assert at("SELECT 1 FROM saes WHERE sae IN (SELECT dens| FROM features)")[0] == "density"
    for quiet in ("SELECT 'from |'", "SELECT 1 -- from |", "SELECT 1 /* from | */"):
        editor.page.keyboard.press("Escape")
        put(editor, quiet)
        expect(editor.list).to_be_hidden()


def test_an_error_is_shown_in_the_editor(editor):
    from playwright.sync_api import expect

    editor.area.fill("SELECT sae,\n  featre FROM features")
    editor.page.keyboard.press("Control+Enter")
    expect(editor.page.get_by_text("Line 2, column 3.")).to_be_visible()
    editor.page.get_by_role("button", name="Show the place").click()
    expect(editor.area).to_be_focused()
    chosen = "area => area.value.slice(area.selectionStart, area.selectionEnd)"
    assert editor.area.evaluate(chosen) == "featre"
