"""What a server reads ahead, what the head view leaves for later, and what a session forgets."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import gc
import os
from pathlib import Path

import pytest

from app import state, warm
from atlas.db.annotations import load_head
from atlas.settings import load_settings
from atlas.store import published
from tests.test_app_views import atlas, home, show, words


@pytest.fixture(autouse=True)
def frozen(monkeypatch):
    """How often objects would have been kept from later collections, which must not happen to other tests."""
    calls = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    return calls


def test_what_pages_share_is_there_before_the_first(atlas, frozen):
    settings = load_settings()
    warm.begin(settings).join()
    release = published.current(settings)
    con = state._connection(str(release.path), release.digest)
    made = "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'search_features'"
    assert con.execute(made).fetchall() == [(1,)]
    assert con.execute("SELECT current_setting('memory_limit')").fetchall() == [("953.6 MiB",)]  # 1 GB
    assert frozen == ["freeze"]


def test_nothing_to_read_and_nothing_readable_are_for_the_first_page_to_say(tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path))
    warm.make_ready(load_settings())
    folder = Path(tmp_path) / "releases" / "broken"
    folder.mkdir(parents=True)
    (folder / "current.json").write_text("{")
    warm.make_ready(load_settings())


def test_a_release_is_read_ahead_whole_where_there_is_memory_for_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, n, __: asked.append((start, start + n)))
    monkeypatch.setattr(warm, "STEP", 1000)
    file = tmp_path / "release.duckdb"
    file.write_bytes(bytes(4500))
    monkeypatch.setattr(warm, "_free_memory", lambda: 9000)
    assert warm.read_ahead(file)
    assert [start for start, _ in asked] == [0, *(stop for _, stop in asked[:-1])]
    assert asked[-1][1] >= 4500
    monkeypatch.setattr(warm, "_free_memory", lambda: 8999)
    assert not warm.read_ahead(file)
    assert len(asked) == 5


def test_scatters_are_made_when_they_are_unfolded(atlas):
    at = show("head", head="L0H1")
    told = "decoder share and FVE: rank correlation"
    assert told not in words(at)
    at.session_state["scatters"] = True
    at.run()
    assert not at.exception
    assert told in words(at)
    assert "DFA share: rank correlation" in words(at)


def test_of_notes_left_long_ago_only_what_the_database_has_is_kept(atlas):
    at = show("head", head="L0H0")
    next(t for t in at.text_input if t.label == "Label").input("lists").run()
    for head in ("L0H1", "L0H2", "L0H3", "L1H0", "L1H1"):
        at.query_params["head"] = head
        at.run()
    remembered = [key for key in at.session_state if key.endswith("|stored")]
    assert len(remembered) == 4
    at.query_params["head"] = "L0H0"
    at.run()
    label = next(t for t in at.text_input if t.label == "Label")
    assert label.value == "lists"
    label.input("lists of names").run()
    assert not at.warning, "its next save conflicts with itself"
    assert load_head(atlas, "synthetic", 0, 0, "ann").label == "lists of names"


def test_ten_cards_are_sent_at_once_and_the_others_when_asked_for(atlas, monkeypatch):
    sent = {}
    monkeypatch.setattr("app.components.draw.feature_cards", sent.__setitem__)
    at = show("head", head="L0H1", k="20")
    assert [card["rank"] for card in sent["cards"]["cards"]] == list(range(10))
    later = sent["cards 10"]
    assert later["waiting"] == list(range(10, 20))
    assert "cards" not in later
    monkeypatch.setattr("app.components.draw.wanted", {"cards 10": later["of"]}.get)
    at.run()
    assert [card["rank"] for card in sent["cards 10"]["cards"]] == list(range(10, 20))
    assert all(card["examples"] for card in sent["cards 10"]["cards"])
    at.query_params["head"] = "L0H2"  # what the browser asked for was another head's
    at.run()
    assert sent["cards 10"]["waiting"] == list(range(10, 20))
