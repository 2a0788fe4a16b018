# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
"""Annotating in a real browser: by keyboard alone, with two writers, through a reload, with hostile text."""

import re

import pytest

from atlas.db import annotations
from atlas.settings import load_settings
from tests.test_app_browser import address, browser, heading, label, page, slow

pytestmark = pytest.mark.browser
OTHERS = re.compile(r"^What others wrote \(")


def ready(page, place):
    """Wait until the form is the one of this head."""
    from playwright.sync_api import expect

    heading(page, place)
    expect(page.locator(f"html[data-head={place}]")).to_have_count(1)


def test_a_head_by_keyboard_from_the_grid_to_saved_and_back(page, address):
    from playwright.sync_api import expect

    page.goto(f"{address}/atlas?annotator=key")
    cell = page.locator(".cell[data-at='0,0']")
    cell.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    ready(page, "L0H1")
    rows = page.locator(".st-key-note-verdicts .row")
    expect(rows).to_have_count(10)
    page.keyboard.press("g")
    page.keyboard.type("lists & <b>tags</b>")
    page.keyboard.press("Enter")
    page.keyboard.type("1111111oc")
    expect(rows.nth(9).locator(".said")).to_have_text("can't say")
    expect(page.get_by_text("lists & <b>tags</b> 8/10: nearly monosemantic")).to_be_visible()
    page.keyboard.press("e")
    page.keyboard.type("closes lists")
    page.keyboard.press("Escape")
    expect(page.locator(".stApp[data-test-script-state=notRunning]")).to_have_count(1)
    page.keyboard.press("Control+Enter")
    ready(page, "L0H2")
    page.keyboard.press("p")
    ready(page, "L0H1")
    expect(label(page)).to_have_value("closes lists")
    expect(rows.nth(8).locator(".said")).to_have_text("odd one out")
    expect(page.get_by_text(re.compile("^done, version"))).to_be_visible()
    page.keyboard.press("z")
    expect(page.get_by_text(re.compile("^draft, version"))).to_be_visible()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Keys")).to_have_count(0)


def test_no_pause_between_heads_and_nothing_is_lost(page, address):
    """Keys are pressed at once, also while the next head opens; each letter is in the note it was for."""
    from playwright.sync_api import expect

    page.goto(f"{address}/head?head=L0H0&annotator=fast")
    ready(page, "L0H0")
    keys = page.keyboard
    keys.press("e")
    keys.type("label of the first")
    for key in ("Escape", "Control+Enter", "e"):
        keys.press(key)
    keys.type("label of the second, longer")
    for key in ("Escape", "w"):
        keys.press(key)
    keys.type("two")
    keys.press("Enter")
    keys.type("lines")
    for key in ("Control+Enter", "o", "c", "g"):
        keys.press(key)
    keys.type("commas")
    keys.press("Control+Enter")
    keys.press("e")
    keys.type("fourth")
    for key in ("Escape", "p", "j"):
        keys.press(key)
    rows = page.locator(".st-key-note-verdicts .row")
    expect(page.locator("html:not([data-held])")).to_have_count(1, timeout=60_000)
    ready(page, "L0H2")
    expect(rows.nth(1)).to_have_class("row here")
    expect(rows.locator(".said").nth(0)).to_have_text("odd one out")
    expect(rows.locator(".said").nth(1)).to_have_text("can't say")
    expect(rows.locator(".said").nth(2)).to_have_text("commas")
    for place, text, notes in (
        ("L0H2", "", ""),
        ("L0H1", "label of the second, longer", "two\nlines"),
        ("L0H0", "label of the first", ""),
    ):
        ready(page, place)
        expect(label(page)).to_have_value(text)
        expect(page.get_by_label("Notes")).to_have_value(notes)
        expect(page.get_by_text(re.compile("^done, version"))).to_be_visible()
        keys.press("p")
    page.goto(f"{address}/head?head=L0H3&annotator=fast")
    ready(page, "L0H3")
    expect(label(page)).to_have_value("fourth")
    expect(page.get_by_text(re.compile("^draft, version"))).to_be_visible()


def test_names_in_use_are_offered_and_what_is_typed_stays(page, address):
    from playwright.sync_api import expect

    page.goto(f"{address}/head?head=L1H0&annotator=names")
    ready(page, "L1H0")
    keys, form = page.keyboard, page.locator(".st-key-note-form")
    keys.type("gcommas")
    keys.press("Enter")
    keys.press("a")
    expect(form.get_by_text("commas 10/10: monosemantic")).to_be_visible()
    keys.type("gcolons")
    keys.press("Enter")
    expect(form.get_by_text("commas 9/10, colons 1/10: nearly monosemantic")).to_be_visible()
    keys.type("gMMA")
    expect(page.get_by_role("option", name="commas")).to_be_visible()
    keys.press("ArrowDown")
    keys.press("Enter")
    expect(form.get_by_text("commas 10/10: monosemantic")).to_be_visible()
    expect(form.get_by_text("colons")).to_have_count(0)
    keys.type("rname mover")
    for key in ("Enter", "Escape", "Control+s"):
        keys.press(key)
    expect(page.get_by_text(re.compile("^done, version"))).to_be_visible()
    slow(page, 2000)
    page.reload()
    ready(page, "L1H0")
    expect(page.get_by_label("Role")).to_have_value("name mover")
    # However long the server takes to open the other head, what is typed waits for it.
    page.evaluate("window.slow = true")
    keys.press("/")
    keys.type("L1H2")
    keys.press("Enter")
    keys.type("etyped at once")
    keys.press("Escape")
    ready(page, "L1H2")
    expect(label(page)).to_have_value("typed at once")


def test_words_that_were_not_confirmed_are_kept_however_one_goes_on(page, address):
    from playwright.sync_api import expect

    page.goto(f"{address}/head?head=L1H0&annotator=unsure")
    ready(page, "L1H0")
    form, keys = page.locator(".st-key-note-form"), page.keyboard
    words = form.locator("[data-tag]")

    def typed(name, text):
        field = form.get_by_role("combobox", name=name)
        field.press_sequentially(text)
        expect(field).to_have_attribute("aria-expanded", "true")

    typed("Groupings", "ind")
    keys.press("Tab")
    expect(words).to_have_text(["ind"])
    # Typed as it is offered, but for its case; and one whose entry is at the end of a long list.
    typed("Groupings", "SYNTAX")
    page.locator("h1").click()
    typed("Groupings", "e")
    page.locator("h1").click()
    expect(words).to_have_text(["ind", "syntax", "e"])
    typed("Role", "a role of its own")
    keys.press("Escape")
    keys.press("n")
    ready(page, "L1H1")
    expect(words).to_have_count(0)
    typed("Groupings", "by the mouse")
    page.locator(".st-key-after button").first.click()
    ready(page, "L1H2")
    # An entry that an arrow key went to is the one that is meant; Enter takes one and not all that match.
    typed("Groupings", "ind")
    keys.press("ArrowDown")
    keys.press("Control+Enter")
    ready(page, "L1H3")
    for place, said in (
        ("L1H2", ["induction"]),
        ("L1H1", ["by the mouse"]),
        ("L1H0", ["ind", "syntax", "e"]),
    ):
        keys.press("p")
        ready(page, place)
        expect(words).to_have_text(said)
    expect(form.get_by_role("combobox", name="Role")).to_have_value("a role of its own")


def test_keys_before_the_first_form_wait_for_it(page, address):
    from playwright.sync_api import expect

    settled = page.locator("html[data-keys=ready]:not([data-held])")
    keys, early = page.keyboard, page.locator(".ha-early")
    page.add_init_script(  # what the line says, however short it is there
        """window.earlySaid = [];
        new MutationObserver(() => window.earlySaid.push(document.querySelector(".ha-early")?.textContent))
          .observe(document, {childList: true, subtree: true, characterData: true});"""
    )
    page.goto(f"{address}/head?head=L0H1&annotator=early", wait_until="commit")
    page.wait_for_function("() => window.headAtlasEarly")
    keys.type("ebefore the form")
    keys.press("Escape")
    keys.type("wnotes, too")
    ready(page, "L0H1")
    expect(settled).to_have_count(1)
    assert "Opening … what you type is kept." in page.evaluate("window.earlySaid")
    expect(early).to_have_count(0)
    expect(label(page)).to_have_value("before the form")
    expect(page.get_by_label("Notes")).to_have_value("notes, too")
    # From the grid to a head, and from a card of it to a feature and back.
    page.goto(f"{address}/atlas?annotator=early")
    page.locator(".cell[data-at='0,2']").press("Enter")
    keys.type("efrom the grid")
    ready(page, "L0H2")
    expect(settled).to_have_count(1)
    expect(label(page)).to_have_value("from the grid")
    page.locator(".card a.name").first.click()
    keys.type("eof a feature")
    keys.press("Escape")
    keys.type("bwof the head")
    ready(page, "L0H2")
    expect(settled).to_have_count(1)
    expect(page.get_by_label("Notes")).to_have_value("of the head")
    expect(label(page)).to_have_value("from the grid")
    page.goto(f"{address}/head?head=L9H9&annotator=early", wait_until="commit")
    page.wait_for_function("() => window.headAtlasEarly")
    keys.type("enowhere")
    expect(early).to_contain_text("There is no form here")


def test_keys_before_the_first_form_wait_in_a_slow_browser(page, browser, address):
    """The form is drawn long after the server has said all: 2.5 s and more with a fifth of a processor."""
    from playwright.sync_api import expect

    browser.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": 5})
    page.goto(f"{address}/head?head=L0H1&annotator=patient", wait_until="commit")
    page.wait_for_function("() => window.headAtlasEarly")
    page.keyboard.type("eat last")
    form = page.locator("html[data-head=L0H1][data-keys=ready]:not([data-held])")
    expect(form).to_have_count(1, timeout=90_000)
    expect(label(page)).to_have_value("at last")


@pytest.mark.parametrize(
    "scripts",
    ["TextInput|TextArea|ButtonGroup|Multiselect|Selectbox", "BidiComponent"],
    ids=["fields", "components"],
)
def test_keys_wait_for_parts_of_the_form_whose_scripts_are_on_their_way(page, address, scripts):
    from playwright.sync_api import expect

    keys = page.keyboard
    page.route(re.compile(rf"/static/js/({scripts})\."), lambda _: None)
    page.goto(f"{address}/head?head=L0H2&annotator={scripts[:4]}", wait_until="commit")
    heading(page, "L0H2")
    expect(page.locator(".st-key-note-form [data-testid=stSkeleton]")).not_to_have_count(0)
    expect(page.locator(".stApp[data-test-script-state=notRunning]")).to_have_count(1)
    keys.press("e")
    keys.type("a label")
    for key in ("Escape", "w"):
        keys.press(key)
    keys.type("notes")
    for key in ("Escape", "j", "o"):
        keys.press(key)
    page.unroute_all()  # lets those go that wait
    ready(page, "L0H2")
    expect(page.locator("html[data-keys=ready]:not([data-held])")).to_have_count(1)
    expect(label(page)).to_have_value("a label")
    expect(page.get_by_label("Notes")).to_have_value("notes")
    rows = page.locator(".st-key-note-verdicts .row")
    expect(rows.nth(1).locator(".said")).to_have_text("odd one out")


def test_what_was_typed_for_a_place_that_does_not_come_is_let_go(page, address):
    from playwright.sync_api import expect

    page.add_init_script(
        """const send = WebSocket.prototype.send;
        WebSocket.prototype.send = function (message) { if (!window.cut) send.call(this, message); };"""
    )
    page.goto(f"{address}/head?head=L0H3&annotator=cut")
    ready(page, "L0H3")
    page.locator(".card a.name").first.wait_for()
    page.wait_for_timeout(500)
    page.evaluate("window.cut = true")
    page.locator(".card a.name").first.click()
    page.keyboard.type("efor another place")
    expect(page.get_by_text("That did not open; what was typed was let go.")).to_be_visible()
    page.evaluate("window.cut = false")
    expect(page.locator("html:not([data-held])")).to_have_count(1)
    expect(label(page)).to_have_value("")
    page.keyboard.type("efor this one")
    expect(page.get_by_text(re.compile("draft, version"))).to_be_visible()
    expect(label(page)).to_have_value("for this one")


LATE = """
const send = WebSocket.prototype.send;
let before = null;
const late = (socket) => send.call(socket, before);  // a request from before the click arrives after it
WebSocket.prototype.send = function (message) {
  const how = window.how;
  window.sent = Date.now();
  if (how) window.how = null;
  if (how !== "lost") send.call(this, message);
  if (how === "undone") setTimeout(() => late(this), 250);
  else if (how === "back") window.back = () => late(this);
  else if (!window.back) before = message;
};"""


QUIET = """() => {
  const running = !document.querySelector(".stApp[data-test-script-state=notRunning]");
  if (running || !window.rested) window.rested = Date.now();
  return Date.now() - Math.max(window.rested, window.sent) > 1000;
}"""


def labelled(page, address, head, who):
    """Open a head and write a label, until it is kept."""
    from playwright.sync_api import expect

    page.goto(f"{address}/head?head={head}&annotator={who}")
    ready(page, head)
    expect(page.locator("html[data-keys=ready]:not([data-held])")).to_have_count(1)
    page.keyboard.press("e")
    expect(label(page)).to_be_focused()
    page.keyboard.insert_text("of the head")  # in one piece, so that it is one version
    expect(page.get_by_text(re.compile("draft, version 1"))).to_be_visible()
    page.keyboard.press("Escape")


@pytest.mark.parametrize("how", ["lost", "undone"])
def test_a_click_that_is_lost_on_the_way_is_made_again(page, address, how):
    """What is typed for the feature never lands in the note of the head that was left."""
    from playwright.sync_api import expect

    page.add_init_script(LATE)
    labelled(page, address, "L0H1", how)
    link = page.locator(".card a.name").first
    feature = link.inner_text().split()[-1]
    page.wait_for_function(QUIET)  # nothing else is on its way
    page.evaluate(f"window.how = '{how}'")
    link.click()
    page.keyboard.type("eof the feature")
    heading(page, f"Feature {feature}")
    expect(page.locator("html[data-keys=ready]:not([data-held])")).to_have_count(1)
    expect(label(page)).to_have_value("of the feature")
    expect(page.get_by_text(re.compile(r"^version \d+, "))).to_be_visible()
    expect(label(page)).to_have_value("of the feature")
    page.goto(f"{address}/head?head=L0H1&annotator={how}")
    ready(page, "L0H1")
    expect(label(page)).to_have_value("of the head")


ANSWERS_LATE = """
const Plain = window.WebSocket;
window.WebSocket = class extends Plain {
  constructor(...given) {
    super(...given);
    this.addEventListener("message", (event) => {
      if (!window.answersLate || event.late) return;
      event.stopImmediatePropagation();
      const later = new MessageEvent("message", { data: event.data });
      later.late = true;
      setTimeout(() => this.dispatchEvent(later), window.answersLate);
    });
  }
};"""


@pytest.mark.parametrize(("after", "late"), [("the word", 1500), ("another field", 0)])
def test_a_form_that_is_drawn_anew_in_the_middle_of_a_word_goes_on_with_it(page, address, after, late):
    """The field goes in the middle of a word; what it holds never undoes the way back."""
    from playwright.sync_api import expect

    page.add_init_script(ANSWERS_LATE)
    page.goto(f"{address}/head?head=L1H2&annotator={after[0]}")
    ready(page, "L1H2")
    link = page.locator(".card a.name").first
    feature = link.inner_text().split()[-1]
    link.click()
    heading(page, f"Feature {feature}")
    expect(page.locator("html[data-keys=ready]:not([data-held])")).to_have_count(1)
    page.keyboard.type("ethe begin of it")
    for _ in " of it":
        page.keyboard.press("ArrowLeft")
    page.evaluate(f"window.answersLate = {late}; history.back()")
    ready(page, "L1H2")
    expect(label(page)).to_have_value("")
    page.wait_for_timeout(late)
    ready(page, "L1H2")
    page.evaluate("history.forward()")
    heading(page, f"Feature {feature}")
    if after == "another field":
        page.get_by_label("Notes").click()
    page.keyboard.type("ning")
    expect(page.locator("html[data-keys=ready]:not([data-held])")).to_have_count(1)
    beside = after == "another field"
    expect(label(page)).to_have_value("the begin of it" if beside else "the beginning of it")
    expect(page.get_by_label("Notes")).to_have_value("ning" if beside else "")


def test_a_view_that_comes_back_by_itself_shows_what_is_stored(page, address):
    """Its request brought values of fields that the browser had forgotten: empty ones, then stored so."""
    from playwright.sync_api import expect

    page.add_init_script(LATE)
    labelled(page, address, "L1H1", "back")
    page.wait_for_function(QUIET)
    page.evaluate("window.how = 'back'")
    page.locator(".card a.name").first.click()
    heading(page, re.compile("Feature"))
    page.keyboard.type("eof the feature")
    expect(page.get_by_text(re.compile(r"version \d"))).to_be_visible()
    page.evaluate("window.back()")
    ready(page, "L1H1")
    expect(label(page)).to_have_value("of the head")
    page.keyboard.type("wnotes")
    expect(page.get_by_text(re.compile("draft, version [2-9]"))).to_be_visible()
    expect(label(page)).to_have_value("of the head")


def test_an_answer_that_refers_to_what_the_browser_had_is_understood(page, address):
    """What was sent before is sent as a reference, which a browser that has let go of it cannot read.

    On a slow way back from the server, the browser says that it has the cards of the first head, and lets go
    of them when it hears of the end of a run that is over by then.
    """
    from playwright.sync_api import expect

    page.add_init_script(
        """const add = WebSocket.prototype.addEventListener;
        WebSocket.prototype.addEventListener = function (name, act, ...more) {
          const later = (event) => (window.late ? setTimeout(() => act(event), window.late) : act(event));
          return add.call(this, name, name === "message" ? later : act, ...more);
        };"""
    )
    keys = page.keyboard
    rest = page.locator(".stApp[data-test-script-state=notRunning]")
    page.goto(f"{address}/head?head=L0H1&annotator=cache")
    ready(page, "L0H1")
    keys.press("n")
    ready(page, "L0H2")
    expect(rest).to_have_count(1)
    page.wait_for_timeout(1000)
    page.evaluate("window.late = 1000")
    keys.press("s")
    page.wait_for_timeout(600)
    keys.press("p")
    ready(page, "L0H1")
    expect(page.locator(".stApp[data-test-connection-state=CONNECTED]")).to_have_count(1)
    expect(label(page)).to_have_value("")


def test_the_second_writer_sees_both_texts(page, browser, address):
    from playwright.sync_api import expect

    url = f"{address}/head?head=L0H3&annotator=two"
    other = browser.new_page()
    for one in (page, other):
        one.goto(url)
        ready(one, "L0H3")
    label(page).fill("from the first window")
    expect(page.get_by_text(re.compile("draft, version 1"))).to_be_visible()
    label(other).fill("from the second window")
    expect(other.get_by_text("This note was changed elsewhere")).to_be_visible()
    expect(other.get_by_text("label, stored")).to_contain_text("from the first window")
    expect(other.get_by_text("label, yours")).to_contain_text("from the second window")
    other.get_by_role("button", name="Keep mine").click()
    expect(other.get_by_text(re.compile("draft, version 2"))).to_be_visible()
    other.close()
    page.reload()
    ready(page, "L0H3")
    expect(label(page)).to_have_value("from the second window")


def test_a_verdict_and_a_text_survive_a_reload_at_once(page, address):
    from playwright.sync_api import expect

    page.goto(f"{address}/head?head=L1H3&annotator=rel")
    ready(page, "L1H3")
    page.keyboard.press("j")
    page.keyboard.press("o")
    expect(page.get_by_text(re.compile("draft, version 1"))).to_be_visible()
    page.keyboard.press("w")
    page.keyboard.insert_text("half a sentence, then")  # in one go: a pause in typing is a save, too
    expect(page.get_by_text(re.compile("draft, version 2"))).to_be_visible()
    page.reload()
    ready(page, "L1H3")
    expect(page.get_by_label("Notes")).to_have_value("half a sentence, then")
    expect(page.locator(".st-key-note-verdicts .row").nth(1).locator(".said")).to_have_text("odd one out")


HOSTILE = (
    "<script>document.title='owned'</script>\u202e txet **x** [a](javascript:1) 🧠 "
    "<img src=x onerror=alert(1)>"
)


def test_hostile_text_is_text_everywhere(page, browser, address):
    from playwright.sync_api import expect

    alerts = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    page.goto(f"{address}/head?head=L0H0&annotator=mallory")
    ready(page, "L0H0")
    page.keyboard.press("g")
    page.keyboard.insert_text(HOSTILE[:60])
    page.keyboard.press("Enter")
    label(page).fill(HOSTILE)
    page.get_by_label("Notes").fill((HOSTILE + "\n") * 100)
    page.get_by_label("Notes").press("Control+s")
    expect(page.get_by_text(re.compile("^done, version"))).to_be_visible()
    page.goto(f"{address}/head?head=L0H0&annotator=victim")
    ready(page, "L0H0")
    page.get_by_text(OTHERS).click()
    expect(page.get_by_text("onerror=alert(1)").first).to_be_visible()
    for view in ("atlas", "queue"):
        page.goto(f"{address}/{view}?annotator=mallory")
        heading(page, "Queue" if view == "queue" else "Atlas of synthetic")
    assert alerts == []
    assert page.title() != "owned"
    assert page.locator("img[src=x]").count() == page.locator("a[href^=javascript]").count() == 0


def test_blind_hides_what_others_wrote_until_saved(page, address):
    from playwright.sync_api import expect

    page.goto(f"{address}/head?head=L0H0&annotator=ann")
    ready(page, "L0H0")
    label(page).fill("seen by others")
    label(page).press("Control+s")
    expect(page.get_by_text(re.compile("^done, version"))).to_be_visible()
    page.goto(f"{address}/head?head=L0H0&annotator=blindfold&blind=1")
    ready(page, "L0H0")
    expect(page.get_by_text("Blind: scores, families")).to_be_visible()
    assert page.get_by_text(OTHERS).count() == page.locator(".card .family").count() == 0
    label(page).fill("own verdict")
    label(page).press("Control+s")
    expect(page.get_by_text(OTHERS)).to_be_visible()


def test_a_survey_by_keyboard(page, address):
    from playwright.sync_api import expect

    page.goto(f"{address}/survey?annotator=rater")
    page.get_by_label("Name").fill("first look")
    page.get_by_label("Features of each SAE").fill("1")
    page.get_by_label("Features of each SAE").press("Tab")
    page.get_by_role("button", name="Draw the sample").click()
    expect(page.get_by_text("0 of 2 judged")).to_be_visible()
    page.locator("h1").click()
    still = page.locator(".stApp[data-test-script-state=notRunning]")  # with the keys of the buttons
    expect(still).to_have_count(1)
    page.keyboard.press("1")
    expect(page.get_by_text("1 of 2 judged")).to_be_visible()
    expect(still).to_have_count(1)
    page.keyboard.press("3")
    expect(page.get_by_text("You judged every feature")).to_be_visible()
    expect(page.get_by_text(re.compile(r"9 to 9\d%"))).to_be_visible()
