"""Where in a query an error lies, and what a bound that was met means."""

import re
from typing import NamedTuple

_MARKED = re.compile(r"^LINE (\d+): (.*)\n(\s*)(\^+)", re.MULTILINE)


class Place(NamedTuple):
    """A place in a query: line and column from 1, and how many characters are meant."""

    line: int
    column: int
    length: int


class Wrong(NamedTuple):
    """Why a query gave no rows, and where in it the fault lies, where that is known."""

    error: str
    place: Place | None


def place(error: str, sql: str) -> Place | None:
    r"""The place that DuckDB marks below a line of its message; None where it marks none.

    DuckDB shows a long line in part, so the marked part is looked up in the query's own line.

    >>> place("Binder Error: no x\nLINE 2:   x FROM t\n          ^", "SELECT\n  x FROM t")
    Place(line=2, column=3, length=1)
    >>> place("Parser Error: bad\nLINE 1: ... b, c\n               ^", "SELECT " + "a, " * 40 + "b, c")
    Place(line=1, column=131, length=1)
    >>> place("stopped after its bound of 20 seconds", "SELECT 1") is None
    True
    """
    found = _MARKED.search(error)
    lines = sql.splitlines()
    if found is None or not 1 <= int(found[1]) <= len(lines):
        return None
    number, shown = int(found[1]), found[2]
    at = len(found[3]) - len(f"LINE {number}: ")
    whole = lines[number - 1]
    if shown.startswith("..."):
        start = whole.find(shown.removeprefix("...").removesuffix("..."))
        at += start - 3
        if start < 0:
            return None
    if not 0 <= at <= len(whole):
        return None
    return Place(number, at + 1, max(1, min(len(found[4]), len(whole) - at)))


def advice(error: str) -> str:
    """What can be done about a bound that was met; empty for other errors.

    >>> advice("the query was stopped after its bound of 20 seconds")
    'Ask for less (WHERE, LIMIT, USING SAMPLE), or raise the bound with ATLAS_QUERY_SECONDS.'
    """
    if "stopped after its bound" in error:
        return "Ask for less (WHERE, LIMIT, USING SAMPLE), or raise the bound with ATLAS_QUERY_SECONDS."
    if "more memory than its bound" in error:
        return "Group or sort less at once, or raise the bound with ATLAS_QUERY_MEMORY."
    return ""
