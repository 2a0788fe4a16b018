"""What a server reads ahead, and what the head view leaves until it is unfolded."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import gc
from pathlib import Path

import pytest

from app import state, warm
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
    warm.begin(settings).join(60)
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


def test_scatters_are_made_when_they_are_unfolded(atlas):
    at = show("head", head="L0H1")
    told = "decoder share and FVE: rank correlation"
    assert told not in words(at)
    at.session_state["scatters"] = True
    at.run()
    assert not at.exception
    assert told in words(at)
    assert "DFA share: rank correlation" in words(at)
