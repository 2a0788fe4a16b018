"""Fixtures that several test modules share."""

import os

import pytest

IN_CI = os.environ.get("CI") == "true"


def need(condition: object, what: str) -> None:
    """Skip on a developer's bare machine, fail in CI, where every server has to be there."""
    if condition:
        return
    if IN_CI:
        pytest.fail(f"{what} is missing, and CI must have it")
    pytest.skip(f"{what} is not installed")


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    """No test ever reads or writes the user's own atlas."""
    for key in [k for k in os.environ if k.startswith("ATLAS_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path / "home"))
