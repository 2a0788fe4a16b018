"""One invariant of a release as a named SQL query, and pieces that many of them share."""

from dataclasses import dataclass

from atlas.tables import TABLES


@dataclass(frozen=True)
class Check:
    """An invariant: the query returns the rows that break it, as ``key`` columns and what was ``found``.

    The name is the table's, a point, and what is checked. Where ``by_sae`` is set, the query is run for one
    ``$sae`` after the other, so that joins of the largest tables stay small.
    """

    name: str
    meaning: str
    query: str
    key: tuple[str, ...] = ("sae", "feature")
    by_sae: bool = False

    @property
    def table(self) -> str:
        """The table whose rows are looked at."""
        return self.name.partition(".")[0]


def rows(name: str, meaning: str, offends: str, found: str, source: str | None = None) -> Check:
    """A check of single rows: those of the table (or of ``source``) for which ``offends`` holds.

    >>> print(rows("vocab.token", "no negative ids", "token < 0", "token").query)
    SELECT "model", "token", token AS found FROM vocab WHERE token < 0
    """
    table = name.partition(".")[0]
    key = TABLES[table].key
    columns = ", ".join(f'"{column}"' for column in key)
    query = f"SELECT {columns}, {found} AS found FROM {source or table} WHERE {offends}"  # noqa: S608
    return Check(name, meaning, query, key)


def grouped(
    name: str, meaning: str, found: str, offends: str,
    key: tuple[str, ...] = ("sae", "feature"), source: str | None = None,
) -> Check:  # fmt: skip
    """A check of groups of rows: ``found`` is an aggregate, ``offends`` a condition on it and others."""
    table, columns = name.partition(".")[0], ", ".join(key)
    query = f"SELECT {columns}, {found} AS found FROM {source or table} GROUP BY {columns} HAVING {offends}"  # noqa: S608
    return Check(name, meaning, query, key)
