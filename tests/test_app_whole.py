"""Callbacks of the app are not stopped half-way by a newer request of the browser."""

from types import SimpleNamespace

import pytest
from streamlit.runtime.scriptrunner import RerunException
from streamlit.runtime.scriptrunner_utils.script_requests import (
    RerunData,
    ScriptRequests,
    ScriptRequestType,
)
from streamlit.runtime.state import SafeSessionState, SessionState

from app import whole


@pytest.fixture
def requests(monkeypatch):
    """The requests of a run in progress, with a newer one waiting, and a session state that looks for it."""
    found = ScriptRequests()
    monkeypatch.setattr(whole, "get_script_run_ctx", lambda **_: SimpleNamespace(script_requests=found))
    assert found.request_rerun(RerunData(query_string="newer"))
    return found


def session(requests):
    def look():
        request = requests.on_scriptrunner_yield()
        if request is not None:
            raise RerunException(request.rerun_data)

    return SafeSessionState(SessionState(), look)


def test_a_callback_is_done_whole_and_the_newer_request_comes_after_it(requests):
    state, done = session(requests), []

    @whole.whole
    def callback(value):
        state["stored"] = value
        with whole.undisturbed():
            done.append("inner")
        state["known"] = value
        return state["stored"]

    assert callback(3) == 3
    assert done == ["inner"]
    with pytest.raises(RerunException) as stopped:
        state["later"] = 1
    assert stopped.value.rerun_data.query_string == "newer"
    assert (state["stored"], state["known"]) == (3, 3)


def test_without_it_the_same_callback_is_stopped_at_its_first_look(requests):
    state = session(requests)
    with pytest.raises(RerunException):
        state["stored"] = 3
    assert "stored" not in state


def test_an_error_inside_does_not_keep_requests_waiting(requests):
    with pytest.raises(ValueError, match="gone"), whole.undisturbed():
        raise ValueError("gone")
    request = requests.on_scriptrunner_yield()
    assert request is not None
    assert request.type == ScriptRequestType.RERUN


def test_something_long_ends_when_a_newer_request_waits(requests, monkeypatch):
    monkeypatch.setattr(whole.st, "session_state", session(requests))
    newer = whole.Newer()
    with pytest.raises(RerunException):
        newer.is_set()
    assert not newer.is_set()
    newer.set()
    assert newer.is_set()


def test_outside_of_a_run_nothing_happens(monkeypatch):
    monkeypatch.setattr(whole, "get_script_run_ctx", lambda **_: None)
    assert whole.whole(lambda a, b: a + b)(1, b=2) == 3
