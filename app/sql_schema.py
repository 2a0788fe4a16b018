"""What SQL can name in this release: for the list of tables beside the editor, and for its suggestions."""

import html
import re
from typing import Any, NamedTuple

import streamlit as st

from app.state import Scope
from atlas.db.arrow import SCHEMAS
from atlas.schema import Entry, Field, entries
from atlas.store.queries import words
from atlas.store.queries.words import Columns
from atlas.store.study_tables import STUDY_TABLES

KEYWORDS = (
    "SELECT", "DISTINCT", "FROM", "WHERE", "GROUP BY", "GROUP BY ALL", "HAVING", "ORDER BY", "ORDER BY ALL",
    "LIMIT", "OFFSET", "JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN", "INNER JOIN", "CROSS JOIN",
    "SEMI JOIN", "ANTI JOIN", "ASOF JOIN", "USING", "ON", "AS", "AND", "OR", "NOT", "IN", "IS NULL",
    "IS NOT NULL", "BETWEEN", "LIKE", "ILIKE", "CASE", "WHEN", "THEN", "ELSE", "END", "CAST", "TRY_CAST",
    "COALESCE", "EXISTS", "UNION", "UNION ALL", "INTERSECT", "EXCEPT", "WITH", "RECURSIVE", "OVER",
    "PARTITION BY", "QUALIFY", "FILTER", "ASC", "DESC", "NULLS FIRST", "NULLS LAST", "TRUE", "FALSE",
    "NULL", "LATERAL", "VALUES", "USING SAMPLE", "UNPIVOT", "DESCRIBE", "SUMMARIZE", "EXPLAIN", "INTERVAL",
    "SIMILAR TO",
)  # fmt: skip
"""What can stand in a query; words of statements that are refused are left out."""
_UNNEST = ("unnest", "unnest(list)", "One row for each element of a list")
"""DuckDB does not describe it."""
_LONGEST_MEANING = 180


class Known(NamedTuple):
    """A table, view, annotation table or study table, with its columns as the reference shows them."""

    name: str
    kind: str
    row: str
    key: tuple[str, ...]
    fields: tuple[Field, ...]


def _kind(entry: Entry) -> str:
    if entry.name in SCHEMAS:
        return "annotations"
    if entry.name in STUDY_TABLES:
        return "study"
    return "view" if entry.definition else "table"


def _of_release(entry: Entry | None, there: Columns) -> Known:
    """A table or view of the release: its real columns, with what is declared about them."""
    declared = {one.name: one for one in entry.fields} if entry else {}
    fields = tuple(
        declared[name]._replace(type=kind) if name in declared else Field(name, kind, "", "", nullable=False)
        for name, kind in there.columns
    )
    if entry is None:
        return Known(there.name, "table", "of a release that another version made", (), fields)
    return Known(entry.name, _kind(entry), entry.row, entry.key, fields)


def known_tables(there: tuple[Columns, ...]) -> tuple[Known, ...]:
    """Everything that SQL can name beside a release that has these columns, in the order of the reference."""
    declared = entries()
    real = {one.name: one for one in there}
    found = [
        _of_release(entry, real[entry.name])
        if entry.name in real
        else Known(entry.name, _kind(entry), entry.row, entry.key, entry.fields)
        for entry in declared
        if entry.name in real or _kind(entry) in ("annotations", "study")
    ]
    names = {entry.name for entry in declared}
    return (*found, *(_of_release(None, one) for one in there if one.name not in names))


def tables(scope: Scope) -> tuple[Known, ...]:
    """Everything that SQL can name beside this release."""
    return _tables(scope.ask(words.columns))


@st.cache_resource(max_entries=3, show_spinner=False)
def _tables(there: tuple[Columns, ...]) -> tuple[Known, ...]:
    return known_tables(there)


def short(meaning: str, longest: int = _LONGEST_MEANING) -> str:
    """The first sentence of a meaning, cut where it is long.

    >>> short("Absolute value. Of anything."), short("abcdef", 4)
    ('Absolute value', 'abc…')
    """
    first = re.split(r"\.\s", " ".join(meaning.split()))[0].removesuffix(".")
    return first if len(first) <= longest else first[: longest - 1] + "…"


def told(one: Field) -> str:
    """A column's meaning with its unit."""
    return f"{one.meaning} [{one.unit}]" if one.unit else one.meaning


def suggestions(scope: Scope) -> dict[str, Any]:
    """What the editor suggests: tables with their columns, functions, keywords; each with its meaning."""
    return {
        "tables": [
            [one.name, one.kind, one.row, [[f.name, f.type, told(f)] for f in one.fields]]
            for one in tables(scope)
        ],
        "functions": [
            *([one.name, one.call, short(one.meaning)] for one in scope.ask(words.functions)),
            list(_UNNEST),
        ],
        "keywords": list(KEYWORDS),
    }


def _details(name: str, meaning: str, columns: list[tuple[str, str]]) -> str:
    """One table that unfolds, as HTML; every text escaped."""
    lines = "".join(f"<dt>{html.escape(c)}</dt><dd>{html.escape(said)}</dd>" for c, said in columns)
    said = f"<summary>{html.escape(name)}<span>{html.escape(meaning)}</span></summary>"
    return f"<details>{said}<dl>{lines}</dl></details>"


def schema_html(found: tuple[Known, ...]) -> str:
    """Tables, views, annotations and studies with their columns and what these mean."""
    parts = []
    for one in found:
        columns = [(f.name, " · ".join(filter(None, (told(f), f.type)))) for f in one.fields]
        parts.append(_details(one.name, one.row[:1].lower() + one.row[1:], columns))
    return f"<div class='ha-details'>{''.join(parts)}</div>"
