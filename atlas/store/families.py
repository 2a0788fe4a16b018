"""Feature families: rules over the evidence of a release, as the views ``families`` and ``feature_families``.

Which kinds of feature does a head have? Each family is a condition on the columns of one table, so that it
can be read, argued with and asked for in SQL. They are rules on evidence, not truths: a threshold is a
choice, a feature may belong to several families or to none, and what a feature is for is written down by
people (``feature_annotations``). Shares of positive DFA that rest on few examples, and shares of tokens that
rest on few firings, are chance; below ``MIN_EXAMPLES`` and ``MIN_FIRINGS`` a feature belongs to no family of
that kind. Sources: seed 002 (the paper), row C2; seeds 000, 001 and 003.
"""

from dataclasses import dataclass

from atlas.tables import FAMILY_NAMES

MIN_FIRINGS = 10
"""Firing tokens below which shares of positions and tokens say nothing."""
MIN_EXAMPLES = 5
"""Top examples below which shares of DFA say nothing."""
DENSE = 0.1
"""Share of tokens on which a feature fires, above which it is dense."""
AT_ONE_POSITION = 0.5
"""Share of a feature's strongest tokens that lie at one position of the block."""
ON_ONE_TOKEN = 0.8
"""Share of a feature's strongest tokens that are one token, or end one pair of tokens."""
MOST_DFA = 0.5
"""Share of positive DFA that counts as most of it."""
MOST_EXAMPLES = 0.5
"""Share of top examples that counts as most of them."""


@dataclass(frozen=True)
class Family:
    """A family: the table it is read from, the column that names its members' value, and its condition."""

    name: str
    table: str
    value: str
    rule: str
    meaning: str
    origin: str

    @property
    def select(self) -> str:
        """Its members as a query: sae, feature, family, value.

        >>> print(FAMILIES["dense"].select)
        SELECT sae, feature, 'dense' AS family, density::DOUBLE AS value FROM features WHERE density > 0.1
        """
        return (
            f"SELECT sae, feature, '{self.name}' AS family, {self.value}::DOUBLE AS value "  # noqa: S608
            f"FROM {self.table} WHERE {self.rule}"
        )


_FIRINGS, _EXAMPLES = f"n_active >= {MIN_FIRINGS}", f"n >= {MIN_EXAMPLES}"

_FAMILIES = (
    Family(
        "dead", "features", "density", "NOT alive",
        "never fires in the summarised tokens",
        "seed 000, A19; seed 003, D2",
    ),
    Family(
        "dense", "features", "density", f"density > {DENSE}",
        "fires on so many tokens that it hardly says anything about any of them",
        "seed 001, B1; seed 003, D2",
    ),
    Family(
        "positional", "features", "top_position_share",
        f"{_FIRINGS} AND top_position_share >= {AT_ONE_POSITION}",
        "has at least half of its strongest tokens at one position of the context",
        "seed 000, A3 to A5",
    ),
    Family(
        "single_token", "features", "top_token_share",
        f"{_FIRINGS} AND top_token_share >= {ON_ONE_TOKEN} AND top_pair_share < {ON_ONE_TOKEN}",
        "fires most strongly on one token, whatever comes before it",
        "seed 000, A6 and A16; seed 001, B7",
    ),
    Family(
        "bigram", "features", "top_pair_share", f"{_FIRINGS} AND top_pair_share >= {ON_ONE_TOKEN}",
        "fires most strongly on one token after one other token",
        "seed 001, B7",
    ),
    Family(
        "previous_token", "dfa_summary", "previous", f"{_EXAMPLES} AND previous >= {MOST_DFA}",
        "reads from the token just before the one it fires on",
        "seed 001, B6 (head 4.11)",
    ),
    Family(
        "duplicate_token", "dfa_summary", "same_token",
        f"{_EXAMPLES} AND same_token >= {MOST_DFA} AND same_token >= after_match",
        "reads from earlier copies of the token it fires on",
        "seed 001, B6 (head 3.0)",
    ),
    Family(
        "induction", "dfa_summary", "after_match",
        f"{_EXAMPLES} AND after_match >= {MOST_DFA} AND matched >= {MOST_EXAMPLES} "
        "AND after_match > greatest(previous, same_token)",
        "reads from the tokens that came after earlier copies of the token it fires on",
        "seed 002, C2 and C5; seed 001, B6 and B11",
    ),
    Family(
        "local_context", "dfa_summary", "local",
        f"{_EXAMPLES} AND local >= {MOST_DFA} AND previous < {MOST_DFA}",
        "reads from the last 8 tokens, not mainly from the one just before",
        "seed 002, C2",
    ),
    Family(
        "long_range_context", "dfa_summary", "long_range", f"{_EXAMPLES} AND long_range >= {MOST_DFA}",
        "reads from more than 32 tokens back, BOS left out",
        "seed 002, C2",
    ),
)  # fmt: skip

FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}
"""Every family by name, in the order of ``atlas.tables.FAMILY_NAMES``."""

if tuple(FAMILIES) != FAMILY_NAMES:
    raise AssertionError("families and FAMILY_NAMES differ")  # pragma: no cover


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def families_view() -> str:
    """The statement that makes the view ``families``: what the rules are."""
    rows = ", ".join(
        f"({number}, {', '.join(map(_literal, (f.name, f.table, f.rule, f.meaning, f.origin)))})"
        for number, f in enumerate(_FAMILIES)
    )
    columns = "number, family, table_name, rule, meaning, origin"
    return f"CREATE VIEW families AS SELECT * FROM (VALUES {rows}) AS v({columns})"  # noqa: S608


def feature_families_view() -> str:
    """The statement that makes the view ``feature_families``: who belongs to which.

    One query per family over one table each, without a join, so that a filter on ``sae`` and ``feature``
    reads only their rows.
    """
    return "CREATE VIEW feature_families AS\n" + "\nUNION ALL ".join(f.select for f in _FAMILIES)
