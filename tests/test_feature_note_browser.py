# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
"""Writing about features in a real browser: by keyboard, through a reload, two windows, two people, blind."""

import re
from types import SimpleNamespace
from urllib.parse import quote

import pytest

from atlas.db import annotations
from atlas.settings import load_settings
from tests.servers import wait_until
from tests.test_annotation_browser import ANSWERS_LATE
from tests.test_app_browser import browser, heading, label, page, served, slow

pytestmark = pytest.mark.browser
SAE = "synthetic/L00.z.topk-64"
OTHERS = re.compile(r"^What others wrote \(1\)")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """A served app, and what it has stored of a feature."""
    home = tmp_path_factory.mktemp("home")
    with served(home) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATLAS_HOME", str(home))
        settings = load_settings()
        yield SimpleNamespace(url=url, note=lambda at, who: annotations.load_feature(settings, SAE, at, who))


def visit(page, app, feature, who, more=""):
    page.goto(f"{app.url}/feature?sae={quote(SAE)}&feature={feature}&annotator={who}{more}")
    ready(page, feature)


def ready(page, feature):
    """Wait until the form is the one of this feature, and the page is at rest."""
    from playwright.sync_api import expect

    heading(page, f"Feature {feature}")
    expect(page.locator(f"html[data-head='{SAE} {feature}']")).to_have_count(1)
    expect(page.locator(".stApp[data-test-script-state=notRunning]")).to_have_count(1)


def version(page, number):
    from playwright.sync_api import expect

    expect(page.get_by_text(re.compile(f"^version {number}, kept"))).to_be_visible()


def test_a_feature_by_keyboard_alone(page, app):
    from playwright.sync_api import expect

    visit(page, app, 3, "kay")
    rating = page.locator(".st-key-note_rating [role=radio]")
    page.keyboard.press("2")
    version(page, 1)
    expect(rating.nth(1)).to_be_checked()
    page.keyboard.press("e")
    page.keyboard.insert_text("closes <b>lists</b>")  # in one go: a pause in typing is a save, too
    version(page, 2)
    page.keyboard.press("Escape")
    page.keyboard.press("z")
    version(page, 3)
    expect(label(page)).to_have_value("")
    page.keyboard.press("Shift+KeyZ")
    expect(label(page)).to_have_value("closes <b>lists</b>")
    page.keyboard.press("Escape")
    page.keyboard.press("h")
    expect(page.locator(".ha-save ins", has_text="closes <b>lists</b>").first).to_be_visible()
    page.keyboard.press("c")
    page.keyboard.type("is it so?")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".ha-said", has_text="is it so?")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_contain_text("take the rating back")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Keys")).to_have_count(0)
    expect(page.locator(".stApp[data-test-script-state=notRunning]")).to_have_count(1)
    page.keyboard.press("x")
    expect(rating.nth(1)).not_to_be_checked()


def test_what_is_typed_while_the_next_feature_opens_lands_there(page, app):
    visit(page, app, 8, "swift")
    page.keyboard.type("eof eight")
    page.keyboard.press("Control+Enter")
    page.keyboard.type("eof nine")
    page.keyboard.press("Escape")
    page.keyboard.type("nwof ten")
    page.keyboard.press("Control+s")
    ready(page, 10)
    wait_until("the last word is stored", lambda: (note := app.note(10, "swift")) and note.notes == "of ten")
    stored = [(note.label, note.notes) for note in (app.note(at, "swift") for at in (8, 9, 10))]
    assert stored == [("of eight", ""), ("of nine", ""), ("", "of ten")]


def test_a_rating_waits_for_buttons_whose_script_is_on_its_way(page, app):
    from playwright.sync_api import expect

    page.route(re.compile(r"/static/js/ButtonGroup\."), lambda _: None)
    visit(page, app, 7, "slow")
    expect(page.locator(".st-key-note_rating [data-testid=stSkeleton]")).to_have_count(1)
    page.keyboard.press("2")
    page.unroute_all()  # lets those go that wait
    version(page, 1)
    assert app.note(7, "slow").interpretability == "partly"


def test_going_on_while_a_comment_opens_loses_no_keys(page, app):
    """A form that goes while it holds keys for a field of its own leaves nothing behind."""
    from playwright.sync_api import expect

    visit(page, app, 8, "leaver")
    page.evaluate(  # the comment's field never comes
        """new MutationObserver(() => document.querySelector(".st-key-note-talk textarea")?.remove())
          .observe(document, {childList: true, subtree: true})"""
    )
    page.keyboard.press("c")
    expect(page.locator("html[data-held]")).to_have_count(1)
    page.get_by_role("link", name="Head", exact=True).click()
    expect(page.locator("html[data-head^=L]")).to_have_count(1)
    page.keyboard.type("ehere now")
    expect(page.locator("html[data-keys=ready]:not([data-held])")).to_have_count(1)
    expect(label(page)).to_have_value("here now")


def test_a_tag_that_was_not_confirmed_is_kept(page, app):
    from playwright.sync_api import expect

    visit(page, app, 16, "tags")
    tags = page.get_by_role("combobox", name="Tags")
    page.keyboard.type("tby key")
    expect(tags).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("Control+Enter")
    ready(page, 17)
    tags.press_sequentially("by mouse")
    expect(tags).to_have_attribute("aria-expanded", "true")
    page.locator(".st-key-after button").first.click()
    ready(page, 18)
    assert [app.note(at, "tags").tags for at in (16, 17)] == [("by key",), ("by mouse",)]


def test_what_is_typed_after_a_number_lands_in_that_feature(page, app):
    slow(page, 2000)
    visit(page, app, 21, "jump")
    page.evaluate("window.slow = true")
    page.keyboard.type("/23")
    page.keyboard.press("Enter")
    page.keyboard.type("eof twenty-three")
    page.keyboard.press("Control+s")
    ready(page, 23)
    version(page, 1)
    assert app.note(23, "jump").label == "of twenty-three"
    assert app.note(21, "jump") is None


def test_a_reload_in_the_middle_of_a_draft_loses_nothing(page, app):
    from playwright.sync_api import expect

    visit(page, app, 12, "rel")
    label(page).focus()
    page.keyboard.insert_text("half a thou")
    version(page, 1)
    page.get_by_label("Notes").focus()
    page.keyboard.insert_text("a sentence, half")
    version(page, 2)
    page.reload()
    ready(page, 12)
    expect(label(page)).to_have_value("half a thou")
    expect(page.get_by_label("Notes")).to_have_value("a sentence, half")


def test_the_second_window_sees_both_texts(page, browser, app):
    from playwright.sync_api import expect

    other = browser.new_page()
    for one in (page, other):
        visit(one, app, 14, "two")
    label(page).fill("from the first window")
    version(page, 1)
    label(other).fill("from the second window")
    expect(other.get_by_text("This note was changed elsewhere")).to_be_visible()
    expect(other.get_by_text("label, stored")).to_contain_text("from the first window")
    expect(label(other)).to_be_focused()
    other.get_by_role("button", name="Keep mine").click()
    version(other, 2)
    other.close()
    assert app.note(14, "two").label == "from the second window"


def test_blind_hides_families_and_words_of_others_until_one_rated(page, app):
    from playwright.sync_api import expect

    visit(page, app, 5, "ann")
    label(page).fill("seen by others")
    version(page, 1)
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    version(page, 2)
    visit(page, app, 5, "bob", "&blind=1")
    expect(page.get_by_text("Blind: families, labels")).to_be_visible()
    assert page.get_by_text(OTHERS).count() == page.locator(".ha-chips").count() == 0
    assert page.get_by_text("seen by others").count() == page.locator(".st-key-note-talk").count() == 0
    page.keyboard.press("3")
    expect(page.locator(".ha-chips")).to_be_visible()
    page.get_by_text(OTHERS).click()
    expect(page.get_by_text("ann (interpretable): seen by others")).to_be_visible()


@pytest.mark.parametrize(("who", "late"), [("prompt", 0), ("late", 1500)])
def test_what_was_typed_just_before_the_way_back_is_kept(page, app, who, late):
    """Back by the browser's own button in the middle of a field: the view changes, and the text is stored."""
    from playwright.sync_api import expect

    page.add_init_script(ANSWERS_LATE)
    page.goto(f"{app.url}/head?head=L0H1&annotator={who}")
    expect(page.locator("html[data-head=L0H1]")).to_have_count(1)
    link = page.locator(f".card a.name[href*='{quote(SAE, safe='')}']").first
    feature = int(link.inner_text().split()[-1])
    link.click()
    ready(page, feature)
    expect(page.locator("html[data-keys=ready]:not([data-held])")).to_have_count(1)
    page.keyboard.type("ekept")
    page.evaluate(f"window.answersLate = {late}; window.before = history.length; history.back()")
    heading(page, "L0H1")
    expect(page.locator("html[data-head=L0H1]")).to_have_count(1)
    page.wait_for_timeout(late)
    heading(page, "L0H1")
    assert late or page.evaluate("history.length === window.before")  # the way forward is still there
    wait_until("the text is stored", lambda: app.note(feature, who))
    assert app.note(feature, who).label == "kept"
