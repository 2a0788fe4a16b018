"""The app in a real browser: annotate from the grid, nothing lost on reload, DFA on hover."""

import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import need
from tests.servers import app_served
from tests.synthetic import build_synthetic_release

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE_MS = 120_000
"""Milliseconds that a test waits for something which a quiet machine shows at once."""
OWN = re.compile(r"(http|ws)://127\.0\.0\.1[:/]|data:|blob:|about:")
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of an app over a small release of 2 x 4 heads."""
    with served(tmp_path_factory.mktemp("home")) as url:
        yield url


@contextmanager
def served(home):
    """An app over a small release of 2 x 4 heads, whose notes lie in a folder."""
    need(Path(CHROMIUM).is_file(), f"Chromium ({CHROMIUM})")
    build_synthetic_release(home / "releases")
    with app_served(home, ATLAS_ANNOTATOR="ann") as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE_MS)
    need(Path(CHROMIUM).is_file(), f"Chromium ({CHROMIUM})")
    with sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=CHROMIUM, args=FLAGS,
            viewport={"width": 1400, "height": 1100}, timeout=PATIENCE_MS,
        )  # fmt: skip
        context.set_default_timeout(PATIENCE_MS)
        yield context
        context.close()


@pytest.fixture
def page(browser):
    """A page that fails its test if anything is asked of another machine."""
    page = browser.new_page()
    elsewhere = []
    page.on("request", lambda r: elsewhere.append(r.url) if not OWN.match(r.url) else None)
    yield page
    page.close()
    assert elsewhere == []


def heading(page, text):
    page.get_by_role("heading", name=text, exact=True).wait_for()


def slow(page, ms):
    """From the next page on, what the browser tells the server takes its time; ``ms`` says how long."""
    page.add_init_script(
        f"{{ const send = WebSocket.prototype.send; WebSocket.prototype.send = function (message) {{"
        f" setTimeout(() => send.call(this, message), window.slow ? {ms} : 0) }} }}"
    )


def label(page):
    """The label's field, once the page is at rest and the field of the head before is gone."""
    from playwright.sync_api import expect

    expect(page.locator(".stApp[data-test-script-state=notRunning]")).to_have_count(1)
    field = page.get_by_label("Label", exact=True)
    expect(field).to_have_count(1)
    return field


def test_annotate_from_the_grid_to_the_next_head_and_back(page, address):
    from playwright.sync_api import expect

    page.goto(address)
    page.locator(".cell[data-at='0,1']").click()
    heading(page, "L0H1")
    assert "head=L0H1" in page.url
    expect(page.get_by_text("0/8 done")).to_be_visible()
    label(page).fill("repeats <script>alert(1)</script> **words**")
    page.get_by_role("radio", name="bisemantic", exact=True).click()
    page.get_by_label("Notes").fill("seen on lists")
    page.get_by_label("Notes").press("Control+Enter")
    heading(page, "L0H2")
    expect(page.get_by_text("1/8 done")).to_be_visible()
    page.locator("h1").click()
    page.keyboard.press("p")
    heading(page, "L0H1")
    page.reload()
    heading(page, "L0H1")
    expect(label(page)).to_have_value("repeats <script>alert(1)</script> **words**")
    expect(page.get_by_label("Notes")).to_have_value("seen on lists")
    expect(page.get_by_text(re.compile("done, version"))).to_be_visible()


def test_a_draft_survives_a_reload_in_the_middle(page, address):
    from playwright.sync_api import expect

    page.goto(f"{address}/head?head=L1H3")
    heading(page, "L1H3")
    label(page).focus()
    page.keyboard.insert_text("half a thou")  # in one go: a pause in typing is a save, too
    expect(page.get_by_text(re.compile("draft, version 1"))).to_be_visible()
    notes = page.get_by_label("Notes")
    notes.focus()
    page.keyboard.insert_text("and a half")
    expect(page.get_by_text(re.compile("draft, version 2"))).to_be_visible()
    notes.press_sequentially(", saved at once")
    notes.press("Control+s")
    expect(page.get_by_text(re.compile("done, version"))).to_be_visible()
    page.reload()
    heading(page, "L1H3")
    expect(label(page)).to_have_value("half a thou")
    expect(page.get_by_label("Notes")).to_have_value("and a half, saved at once")


def test_grid_by_keyboard(page, address):
    page.goto(f"{address}/atlas")
    cell = page.locator(".cell[data-at='0,0']")
    cell.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    heading(page, "L1H1")


def test_three_heads_by_keyboard_alone(page, address):
    from playwright.sync_api import expect

    page.goto(f"{address}/atlas?annotator=kay")
    page.locator(".cell[data-at='1,0']").focus()
    page.keyboard.press("Enter")
    for place, after in (("L1H0", "L1H1"), ("L1H1", "L1H2"), ("L1H2", "L1H3")):
        heading(page, place)
        expect(page.locator("html[data-keys=ready]")).to_have_count(1)
        expect(label(page)).to_have_value("")
        page.keyboard.press("e")
        page.keyboard.type(f"label of {place}")
        page.keyboard.press("Control+Enter")
        heading(page, after)
    expect(page.get_by_text("3/8 done")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("p")
    heading(page, "L1H2")
    page.reload()
    heading(page, "L1H2")
    expect(label(page)).to_have_value("label of L1H2")


def test_hover_shows_heads_and_sources(page, address):
    from playwright.sync_api import expect

    page.goto(f"{address}/feature")
    rows = page.locator(".row")
    rows.nth(3).hover()
    expect(rows.nth(3)).to_have_class(re.compile("active"))
    panel = page.locator("aside.panel")
    expect(panel.get_by_text("What made it fire")).to_be_visible()
    assert panel.locator(".head-bar").count() == 4
    total = [float(x.replace("−", "-")) for x in panel.locator(".total b").all_inner_texts()]
    assert total[0] + total[1] == pytest.approx(total[2], rel=0.02, abs=0.02)
    rows.nth(3).click()
    panel.locator(".head-bar").nth(2).click()
    expect(panel.get_by_text("Largest sources of L")).to_be_visible()
    assert set(panel.locator(".source-row .head-name").all_inner_texts()) <= {"H2"}
    rows.nth(0).hover()
    expect(rows.nth(3)).to_have_class(re.compile("active"))
    panel.get_by_role("link", name=re.compile("Open L")).click()
    heading(page, "L0H2")


def test_related_features_are_links_and_near_misses_say_so(page, address):
    from playwright.sync_api import expect

    page.goto(f"{address}/feature?sae=synthetic/L01.z.topk-64&feature=5")
    heading(page, "Feature 5")
    # Groups are drawn as they come near.
    page.get_by_text(re.compile("^Near misses: did not fire")).scroll_into_view_if_needed()
    miss = page.locator(".row", has=page.locator(".value.miss")).first
    miss.hover()
    expect(page.locator("aside.panel").get_by_text("Near miss: did not fire")).to_be_visible()
    expect(page.get_by_text(re.compile("^Near misses: did not fire"))).to_be_visible()
    assert page.locator(".group").count() == 0
    page.locator("summary", has_text="Related features").click()
    link = page.locator(".group a").first
    expect(link).to_be_visible()
    text = link.inner_text()
    link.click()
    heading(page, text.replace("feature", "Feature"))


@pytest.fixture(scope="module")
def shown(browser, address, tmp_path_factory):
    """The page of a feature, and its examples as that page saves them, by the name that their rows have."""
    one = browser.new_page()
    one.goto(f"{address}/feature?sae=synthetic/L00.z.topk-64&feature=3")
    one.locator(".row").first.wait_for()
    file = tmp_path_factory.mktemp("card") / "card.json"
    # That draws all groups, too; otherwise they are drawn as they come near.
    with one.expect_download() as waiting:
        one.get_by_role("button", name="save this card as JSON").click()
    waiting.value.save_as(file)
    saved = json.loads(file.read_text())["examples"]
    yield one, {f"{example['group']} example {example['rank'] + 1}": example for example in saved}
    one.close()


def drawn(page):
    """Of each example that is shown: the positions drawn, the gaps between, and where its token stands."""
    rows = page.locator(".group-part .row").evaluate_all(
        """rows => rows.filter((row) => row.offsetParent).map((row) => [row.ariaLabel.split(",")[0], {
            positions: [...row.querySelectorAll(".tok")].map((one) => Number(one.dataset.position)),
            gaps: row.querySelectorAll(".gap").length,
            x: Math.round(row.querySelector(".tok.fire, .tok.miss").getBoundingClientRect().left),
        }])"""
    )
    return dict(rows)


def extent(rows):
    return sum(len(one["positions"]) for one in rows.values())


def test_compact_wider_whole_and_aligned_show_what_they_say(shown):
    page, examples = shown

    def after(name, times=1):
        for _ in range(times):
            page.get_by_role("button", name=name, exact=True).click()
        return drawn(page)

    wider, narrower = "Wider text around the token", "Narrower text around the token"
    compact = drawn(page)
    assert set(compact) == set(examples)
    wide = after(wider)
    assert all(set(one["positions"]) <= set(wide[name]["positions"]) for name, one in compact.items())
    assert page.evaluate("document.activeElement.shadowRoot.activeElement.ariaLabel") == wider
    assert after(narrower) == compact
    assert extent(after(narrower, 2)) < extent(compact) < extent(wide)
    assert page.get_by_role("button", name=narrower).is_disabled()
    assert after(wider, 2) == compact
    for name, one in after("Whole block").items():
        assert (one["positions"], one["gaps"]) == (list(range(len(examples[name]["tokens"]))), 0)
    stacked = after("Aligned")
    assert len({one["x"] for one in stacked.values()}) == 1
    for name, one in stacked.items():
        at, size = examples[name]["position"], len(examples[name]["tokens"])
        assert one["positions"] == list(range(max(0, at - 24), min(size, at + 17)))
    assert after("Compact") == compact


def test_examples_by_strongest_head_and_by_source_token(shown):
    from playwright.sync_api import expect

    page, examples = shown
    explained = {name: one["dfa"] for name, one in examples.items() if one["dfa"]}
    by_head = {}
    for name, dfa in explained.items():
        by_head.setdefault(max(dfa["by_head"], key=dfa["by_head"].get), set()).add(name)
    choice = page.get_by_label("Only examples whose strongest head is")
    assert choice.locator("option").all_inner_texts()[1:] == [
        f"strongest: {head}" for head in sorted(by_head)
    ]
    assert len(by_head) > 1
    for head, names in by_head.items():
        choice.select_option(f"strongest: {head}")
        assert set(drawn(page)) == names
    choice.select_option("any strongest head")
    assert set(drawn(page)) == set(examples)
    by_source = {}
    for name, dfa in explained.items():
        for one in dfa["sources"]:
            if one["value"] > 0 and one["position"] > 0:
                by_source.setdefault(examples[name]["tokens"][one["position"]], set()).add(name)
    token = max(by_source, key=lambda one: (len(one), one))
    assert 0 < len(by_source[token]) < len(examples)
    field = page.get_by_label("Only examples with this text among their source tokens")
    field.fill(token.replace("·", " ").upper())
    holds = [names for other, names in by_source.items() if token.lower() in other.lower()]
    assert set(drawn(page)) == set().union(*holds)
    field.fill("no such token")
    expect(page.get_by_text("No example passes the filters.")).to_be_visible()
    field.fill("")
    assert set(drawn(page)) == set(examples)


def test_card_link_opens_the_feature_in_this_session(page, address):
    page.goto(f"{address}/head?head=L1H2")
    link = page.locator(".card a.name").first
    text = link.inner_text()
    link.click()
    heading(page, text.replace("feature", "Feature"))
    page.keyboard.press("b")
    heading(page, "L1H2")


def test_cards_come_when_the_reader_is_near_and_are_links_too(page, address):
    from playwright.sync_api import expect

    page.set_viewport_size({"width": 1400, "height": 400})
    page.goto(f"{address}/head?head=L1H3&k=20&annotator=lia")
    expect(page.locator(".card:not(.waiting)")).to_have_count(10)
    expect(page.locator(".card.waiting")).to_have_count(10)
    drawn = page.locator(".st-key-cards")  # its place was kept until the cards were there
    expect(drawn).to_have_css("min-height", "auto")
    page.locator(".card").nth(7).scroll_into_view_if_needed()
    expect(page.locator(".card:not(.waiting)")).to_have_count(20)
    expect(page.locator(".card.waiting")).to_have_count(0)
    label(page).fill("rows and rows")
    label(page).blur()
    expect(page.get_by_text("draft, version 1")).to_be_visible()
    expect(page.locator(".card:not(.waiting)")).to_have_count(20)
    last = page.locator(".card a.name").last
    name = last.inner_text()
    last.click()
    heading(page, name.replace("feature", "Feature"))


def test_the_card_of_a_feature_is_saved_in_three_forms(page, address, tmp_path):
    page.goto(f"{address}/feature?sae=synthetic/L01.z.topk-64&feature=5")
    page.locator(".row").first.wait_for()

    def saved(form):
        with page.expect_download() as waiting:
            page.get_by_role("button", name=f"save this card as {form}").click()
        waiting.value.save_as(tmp_path / waiting.value.suggested_filename)
        return (tmp_path / waiting.value.suggested_filename).read_bytes()

    card = json.loads(saved("JSON"))
    assert (card["sae"], card["feature"], len(card["promotes"])) == ("synthetic/L01.z.topk-64", 5, 10)
    first = card["examples"][0]
    active = {one["position"]: one["value"] for one in first["activations"]}
    assert active[first["position"]] == first["activation"]
    assert first["tokens"][0] == "<|endoftext|>"
    assert set(first["dfa"]["by_head"]) == {"L1H0", "L1H1", "L1H2", "L1H3"}
    text = saved("HTML").decode()
    assert "promotes" in text
    assert "<script" not in text
    assert saved("PNG").startswith(b"\x89PNG")
