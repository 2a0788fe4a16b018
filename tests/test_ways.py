"""From view to view: a request from before the way leads on, whoever began the way."""

from types import SimpleNamespace

import pytest

from app import ways

HEAD, FEATURE = {"head": "L0H1"}, {"feature": "3", "sae": "a/b"}


@pytest.fixture
def session(monkeypatch):
    """Requests of one session: ``ask(view, address)`` gives where that leads instead; time stands still."""
    page = SimpleNamespace(query_params=Address(), session_state={})
    run = SimpleNamespace(is_history_navigation=False)
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(ways, "st", page)
    monkeypatch.setattr(ways, "get_script_run_ctx", lambda **_: run)
    monkeypatch.setattr(ways, "time", clock)

    def ask(view, address, *, back=False):
        page.query_params = Address(address)
        run.is_history_navigation = back
        return ways.arrive(view)

    return SimpleNamespace(ask=ask, clock=clock)


class Address(dict):
    def to_dict(self):
        return dict(self)


def test_a_request_from_before_a_press_leads_on(session):
    session.ask("head", HEAD)
    ways.begin("feature", "feature?feature=3&sae=a%2Fb", FEATURE)
    assert session.ask("feature", FEATURE) is None
    assert session.ask("head", HEAD) == "feature?feature=3&sae=a%2Fb"
    session.clock.now += ways.LATE_SECONDS
    assert session.ask("head", HEAD) is None


@pytest.mark.parametrize("address", [HEAD, FEATURE, HEAD | FEATURE])
def test_a_request_from_before_the_way_back_does_not_undo_it(session, address):
    session.ask("head", HEAD)
    ways.begin("feature", "feature?feature=3&sae=a%2Fb", FEATURE)
    session.ask("feature", FEATURE)
    assert session.ask("head", address, back=True) is None
    to = session.ask("feature", address)
    assert to is not None
    assert to.startswith("head?")
    assert session.ask("feature", address) == to  # each of them, as long as it is late


def test_the_way_back_and_forward_is_followed_each_time(session):
    session.ask("head", HEAD)
    session.ask("feature", FEATURE)
    for view in ("head", "feature", "head", "feature"):
        assert session.ask(view, FEATURE, back=True) is None


def test_after_the_way_back_a_link_leads_to_where_one_was_before(session):
    session.ask("head", HEAD)
    session.ask("feature", FEATURE)
    session.ask("head", HEAD, back=True)
    ways.begin("feature", "feature?feature=3&sae=a%2Fb", FEATURE)
    assert session.ask("feature", FEATURE) is None
    session.ask("head", HEAD, back=True)
    ways.sent()
    session.clock.now += ways.THERE_SECONDS
    assert session.ask("feature", HEAD) is None
