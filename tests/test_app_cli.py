"""``atlas app``: what it starts, and what it refuses before it starts anything."""

import socket

import pytest
from click.testing import CliRunner

import app.state
from atlas.cli import app as command
from atlas.errors import ConfigError, StoreError


def run(*arguments):
    return CliRunner().invoke(command.app, list(arguments), standalone_mode=True)


def test_it_serves_quietly_and_tells_nobody():
    line = command.streamlit_command(8600, "0.0.0.0")
    assert line[1:4] == ["-m", "streamlit", "run"]
    assert line[-1].endswith("server.py")
    for flag in ("--server.port=8600", "--server.address=0.0.0.0", "--browser.gatherUsageStats=false"):
        assert flag in line


def test_cli_and_app_agree_on_the_variable():
    assert command.RELEASE_VARIABLE == app.state.RELEASE_VARIABLE


def test_an_unknown_release_is_refused_with_those_that_exist():
    result = run("--release", "gone")
    assert isinstance(result.exception, StoreError)
    assert "there is no release 'gone'" in str(result.exception)


def test_a_wrong_port_is_refused():
    result = run("--port", "99999")
    assert result.exit_code == 2
    assert "99999" in result.output


def test_a_taken_port_ends_with_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("--port", str(port))
    assert isinstance(result.exception, ConfigError)
    assert str(port) in str(result.exception)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_the_printed_address_can_be_opened(address, monkeypatch):
    class Ended:
        def wait(self):
            return 0

    monkeypatch.setattr(command.subprocess, "Popen", lambda *a, **k: Ended())
    assert "http://localhost:8501" in run("--address", address).output
