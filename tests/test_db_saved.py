"""Saved searches and queries: own and shared ones, replaced, thrown away, and a bounded history."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import pytest

from atlas import access
from atlas.access import Actor
from atlas.db import backup, saved
from atlas.db.saved import delete_question, history, list_questions, note_query, save_question
from atlas.errors import AccessError, ConfigError
from tests.servers import database, empty_database, postgres_server


@pytest.fixture
def reader():
    access.use_source(lambda: Actor("ann", "reader", known=True))
    yield
    access.use_source(access.os_user)


def test_own_questions_and_those_that_others_share(database):
    save_question(database, "search", "ann", "of  and\nthe", "by=at&q=the")
    save_question(database, "search", "bob", "secret", "q=x")
    save_question(database, "search", "bob", "Open", "q=y", shared=True)
    save_question(database, "sql", "ann", "of and the", "SELECT 1")
    assert [(s.author, s.name, s.body, s.shared) for s in list_questions(database, "search", "ann")] == [
        ("ann", "of and the", "by=at&q=the", False),
        ("bob", "Open", "q=y", True),
    ]
    save_question(database, "search", "ann", "of and the", "by=next", shared=True)
    assert list_questions(database, "search", "ann")[0].body == "by=next"
    assert [s.name for s in list_questions(database, "search", "bob")] == ["Open", "secret", "of and the"]
    assert delete_question(database, "search", "ann", "of and the")
    assert not delete_question(database, "search", "ann", "of and the")
    assert [s.name for s in list_questions(database, "sql", "ann")] == ["of and the"]


def test_the_history_is_bounded_and_the_last_comes_first(database, monkeypatch):
    monkeypatch.setattr(saved, "REMEMBERED", 3)
    for n in (1, 2, 3, 4, 2):
        note_query(database, "ann", f"SELECT {n}")
    note_query(database, "bob", "SELECT 9")
    assert [one.body for one in history(database, "ann")] == ["SELECT 2", "SELECT 4", "SELECT 3"]


def test_what_is_refused(database, reader):
    with pytest.raises(AccessError, match="is reader and may not do this"):
        save_question(database, "sql", "ann", "x", "SELECT 1")
    with pytest.raises(AccessError):
        delete_question(database, "sql", "ann", "x")
    access.use_source(lambda: Actor("ann", "annotator", known=True))
    with pytest.raises(AccessError, match="cannot write as 'bob'"):
        save_question(database, "sql", "bob", "x", "SELECT 1")
    for name, body in (("", "SELECT 1"), ("x" * 201, "SELECT 1"), ("x", ""), ("x", "y" * 100_001)):
        with pytest.raises(ConfigError):
            save_question(database, "sql", "ann", name, body)
    with pytest.raises(ConfigError, match="kind of question 'poem' is not known"):
        save_question(database, "poem", "ann", "x", "y")
    assert list_questions(database, "sql", "ann") == []


def test_they_are_in_a_backup(database):
    save_question(database, "sql", "ann", "mine", "SELECT 1", shared=True)
    lines = [line for line in backup.dump(database) if "saved_questions" in line]
    assert len(lines) == 1
    delete_question(database, "sql", "ann", "mine")
    backup.load(database, lines)
    assert list_questions(database, "sql", "bob")[0].body == "SELECT 1"
