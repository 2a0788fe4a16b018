"""Late addresses after a move: they lead on, not back; going back is still possible."""

from types import SimpleNamespace

import pytest

from app import moves


@pytest.fixture
def browser(monkeypatch):
    """The address that a request carries, and what a session remembers."""
    page = SimpleNamespace(query_params={}, session_state={})
    monkeypatch.setattr(moves, "st", page)

    def request(head):
        page.query_params.clear()
        page.query_params["head"] = head
        moves.arrive("head")
        return page.query_params["head"]

    return request


def moved(*heads):
    for head in heads:
        moves.move("head", {"head": head})
        moves.arrive("head")


def test_a_late_address_leads_to_where_one_moved(browser):
    assert browser("L0H0") == "L0H0"
    moved("L0H1")
    assert browser("L0H0") == "L0H1"
    assert browser("L0H0") == "L0H1"


def test_of_two_quick_moves_neither_old_address_leads_back(browser):
    browser("L0H0")
    moved("L0H1", "L0H2")
    assert [browser("L0H0"), browser("L0H1")] == ["L0H2", "L0H2"]


def test_once_the_browser_knows_the_new_address_the_old_one_goes_back(browser):
    browser("L0H0")
    moved("L0H1")
    assert browser("L0H1") == "L0H1"
    assert browser("L0H0") == "L0H0"


def test_another_address_is_never_replaced(browser):
    browser("L0H0")
    moved("L0H1")
    assert browser("L5H5") == "L5H5"
    assert browser("L0H0") == "L0H0"


def test_an_old_address_counts_after_a_while(browser, monkeypatch):
    browser("L0H0")
    moved("L0H1")
    monkeypatch.setattr(moves, "LATE_SECONDS", 0.0)
    assert browser("L0H0") == "L0H0"


def test_moving_back_at_once_is_a_move_like_any_other(browser):
    browser("L0H0")
    moved("L0H1", "L0H0")
    assert browser("L0H0") == "L0H0"
