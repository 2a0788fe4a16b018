"""A dump holds every table of people's words, whatever tables there are, and gives the same rows back."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import json
import re
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import CheckConstraint, insert

from atlas.db import backup
from atlas.db.backup import LEFT_OUT, dump, load, note_tables
from atlas.db.models import Base, UtcDateTime
from atlas.db.session import writing
from atlas.errors import ConfigError, ConflictError
from atlas.settings import load_settings
from tests.servers import database, empty_database, postgres_server

PEOPLES = {"annotator", "author", "adjudicator", "merged_by", "created_by", "label", "body", "groupings"}
"""Columns that only tables of people's words have."""
FITTING = {
    "confidence": 3,
    "groupings": ["induction", "größer"],
    "verdicts": [{"sae": "m/x", "feature": 1, "verdict": "group", "group": "induction"}],
    "payload": {"label": "first"},
}
TIME = datetime(2026, 3, 1, 12, 30, 15, 250_000, tzinfo=UTC)


def allowed_word(column):
    """The first word that a check of the table allows; None where there is no such check."""
    for check in column.table.constraints:
        words = re.fullmatch(rf"{column.name} IN \('(\w+)'.*", str(getattr(check, "sqltext", "")))
        if words:
            return words[1]
    return None


def value(column, number):
    """Something that the column takes; other rows get other values in the key."""
    if allowed_word(column):
        return allowed_word(column)
    if column.name in FITTING:
        return FITTING[column.name]
    if isinstance(column.type, UtcDateTime):
        return TIME + timedelta(hours=number)
    kind = column.type.python_type
    if column.foreign_keys:
        return "s-0"
    return {str: f"{column.name[:1]}-{number}", int: number + 1, float: 1.5, bool: True}.get(kind, {"a": [1]})


def fill(settings):
    """Two rows in every table that is dumped, those that others refer to first."""
    with writing(settings) as session:
        for table in note_tables().values():
            for number in range(2):
                row = {c.name: value(c, number) for c in table.columns if c.name != "id"}
                if table.name == "surveys":
                    row["name"] = f"s-{number}"
                session.execute(insert(table).values(**row))


def test_a_table_of_peoples_words_is_in_the_dump():
    for name, table in Base.metadata.tables.items():
        own = PEOPLES & set(table.columns.keys())
        assert bool(own) != (name in LEFT_OUT), f"table {name} with {sorted(own)}: in the dump or left out?"
    assert set(LEFT_OUT) < set(Base.metadata.tables)


def test_every_table_comes_back(database, tmp_path):
    fill(database)
    lines = list(dump(database))
    assert {json.loads(line)["table"] for line in lines} == set(note_tables())
    assert len(lines) == 2 * len(note_tables())
    other = load_settings({"ATLAS_HOME": str(tmp_path / "other")})
    assert load(other, lines) == len(lines)
    assert list(dump(other)) == lines
    assert load(other, lines) == 0
    assert load(database, lines) == 0


@pytest.mark.parametrize("name", sorted(note_tables()))
def test_a_changed_row_is_a_conflict(tmp_path, name):
    settings = load_settings({"ATLAS_HOME": str(tmp_path)})
    fill(settings)
    line = next(line for line in dump(settings) if json.loads(line)["table"] == name)
    key = {column.name for column in backup._key(note_tables()[name])}
    changed = json.loads(line)
    words = {column.name for column in note_tables()[name].columns if allowed_word(column)}
    column = next(
        c
        for c in changed
        if isinstance(changed[c], str) and c not in {*key, *FITTING, "table"} and c not in words
    )
    changed[column] = (TIME + timedelta(days=9)).isoformat() if column.endswith("_at") else "another"
    with pytest.raises(ConflictError, match=f"{name} .* already there with another {column}"):
        load(settings, [json.dumps(changed)])


def test_a_dump_of_before_verdicts_loads(tmp_path):
    settings = load_settings({"ATLAS_HOME": str(tmp_path)})
    fill(settings)
    older = json.loads(next(iter(dump(settings))))
    assert older.pop("verdicts")
    fresh = load_settings({"ATLAS_HOME": str(tmp_path / "fresh")})
    assert load(fresh, [json.dumps(older)]) == 1
    assert json.loads(next(iter(dump(fresh))))["verdicts"] == []


def test_a_row_that_breaks_a_rule_of_the_database_is_told(tmp_path):
    settings = load_settings({"ATLAS_HOME": str(tmp_path)})
    fill(settings)
    lines = [json.loads(line) for line in dump(settings)]
    comment = next(line for line in lines if line["table"] == "comments")
    with pytest.raises(ConfigError, match="line 1 breaks a rule of comments"):
        load(settings, [json.dumps({**comment, "kind": "song", "body": "new"})])
