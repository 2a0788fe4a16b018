"""Published facts about the heads of known models, and how a release agrees with them.

The data are files in ``atlas/resources/reference``, one per model, each fact with its source. A label says
that somebody found a role; a head without a label has not been shown to lack it. Source: seed 001, row B6.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from atlas.errors import StoreError
from atlas.store.queries.ranks import rank_correlation
from atlas.store.reports_families import area_under_curve
from atlas.store.reports_shown import Part, Shown

FOLDER = Path(__file__).parents[1] / "resources" / "reference"
Place = tuple[int, int]
_BEST = 5


@dataclass(frozen=True)
class Numbers:
    """A published number of every head, and the column of a release that measures the same."""

    name: str
    meaning: str
    source: str
    column: str
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Family:
    """Heads for which a role was published."""

    name: str
    heads: tuple[Place, ...]
    primary: tuple[Place, ...]
    sources: tuple[str, ...]
    evidence: str
    column: str | None


@dataclass(frozen=True)
class Note:
    """What seed 001's table says of a head; starred: one feature grouping for all its features."""

    layer: int
    head: int
    star: bool
    text: str


@dataclass(frozen=True)
class Reference:
    """Everything published about the heads of one model."""

    models: tuple[str, ...]
    n_layers: int
    n_heads: int
    about: str
    sources: Mapping[str, Mapping[str, Any]]
    families: tuple[Family, ...]
    notes: tuple[Note, ...]
    numbers: tuple[Numbers, ...]

    def cited(self, source: str) -> str:
        """A source as one line: authors, year, title, address.

        >>> reference_of("gpt2", 12, 12).cited("ioi").split(",")[0]
        'Wang et al. 2022'
        """
        one = self.sources[source]
        year = f" {one['year']}" if one["year"] else ""
        url = f", {one['url']}" if one["url"] else ""
        return f"{one['authors']}{year}, {one['title']}{url}"


@cache
def references() -> tuple[Reference, ...]:
    """Every model for which there is reference data."""
    return tuple(_read(path) for path in sorted(FOLDER.glob("*.json")))


def _read(path: Path) -> Reference:
    plain = json.loads(path.read_text(encoding="utf8"))
    families = tuple(
        Family(
            one["name"],
            tuple((layer, head) for layer, head in one["heads"]),
            tuple((layer, head) for layer, head in one["primary"]),
            tuple(one["sources"]),
            one["evidence"],
            one["column"],
        )
        for one in plain["families"]
    )
    notes = tuple(Note(**one) for one in plain["table"])
    numbers = tuple(
        Numbers(**(one | {"values": tuple(map(tuple, one["values"]))})) for one in plain["numbers"]
    )
    sizes = (plain["n_layers"], plain["n_heads"])
    return Reference(
        tuple(plain["models"]), *sizes, plain["about"], plain["sources"], families, notes, numbers
    )


def reference_of(model: str, n_layers: int, n_heads: int) -> Reference:
    """What was published about a model; StoreError says why there is nothing to compare with."""
    known = [one for one in references() if model in one.models]
    if not known:
        names = ", ".join(one.models[0] for one in references())
        raise StoreError(
            f"nothing published is known here about the heads of model {model!r}; there is reference data "
            f"for: {names}. Numbers of one model say nothing about another's heads, so they are not compared"
        )
    found = known[0]
    if (found.n_layers, found.n_heads) != (n_layers, n_heads):
        raise StoreError(
            f"model {model!r} has {n_layers} layers of {n_heads} heads; the published {found.models[0]} has "
            f"{found.n_layers} of {found.n_heads}, so it is another model and is not compared"
        )
    return found


def column_values(con: duckdb.DuckDBPyConnection, model: str, column: str) -> dict[Place, float]:
    """The value of every head in a column, written ``head_scores:SCORE`` or ``head_spectra:OV:COLUMN``.

    ``top_8_energy`` of a spectrum is the share of the squared singular values in the 8 largest.
    """
    table, *name = column.split(":")
    if table == "head_scores":
        sql, given = "SELECT layer, head, value FROM head_scores WHERE model = ? AND score = ?", name
    elif table == "head_spectra" and len(name) == 2:
        sql = f"SELECT layer, head, {_spectral(name[1])} FROM head_spectra WHERE model = ? AND circuit = ?"  # noqa: S608
        given = name[:1]
    else:
        raise StoreError(
            f"column {column!r} is unknown; allowed: head_scores:SCORE, head_spectra:CIRCUIT:COLUMN"
        )
    try:
        rows = con.execute(sql, [model, *given]).fetchall()
    except duckdb.CatalogException:
        return {}
    return {(layer, head): value for layer, head, value in rows if value is not None}


def _spectral(name: str) -> str:
    parts = name.split("_")
    if parts[0] == "top" and parts[-1] == "energy" and parts[1].isdigit():
        squares = "list_transform({}, lambda s: s::DOUBLE * s)"
        first = squares.format(f"singular_values[:{int(parts[1])}]")
        return f"list_sum({first}) / nullif(list_sum({squares.format('singular_values')}), 0)"
    if name not in ("frobenius", "spectral", "effective_rank"):
        raise StoreError(
            f"column {name!r} of head_spectra is unknown; allowed: frobenius, spectral, effective_rank"
        )
    return name


def compare(con: duckdb.DuckDBPyConnection, model: str, n_layers: int, n_heads: int) -> list[Part]:
    """Rank correlations of published numbers, and places of published heads, in a release of that model.

    Spearman's over all heads that have both; AUC: the chance that a published head of a family is above one
    that is not, by the release's column.
    """
    reference = reference_of(model, n_layers, n_heads)
    asked = [one.column for one in reference.numbers]
    asked += [one.column for one in reference.families if one.column]
    values = {column: column_values(con, model, column) for column in dict.fromkeys(asked)}
    numbers = [_number_line(one, values[one.column], reference) for one in reference.numbers]
    families = [_family_line(one, values[one.column]) for one in reference.families if one.column]
    return [
        Part("Published numbers", _NUMBERS, _table(_NUMBERS, numbers)),
        Part("Published heads", _FAMILIES, _table(_FAMILIES, families)),
    ]


_NUMBERS = (
    Shown("name", "Published"), Shown("column", "Here"), Shown("heads", "Heads", "d"),
    Shown("spearman", "Rank correlation", ".3f", "Spearman"), Shown("best", "Largest, published"),
    Shown("best_here", "Largest, here"), Shown("source", "Source"),
)  # fmt: skip
_FAMILIES = (
    Shown("family", "Family"), Shown("published", "Heads"), Shown("column", "Here"),
    Shown("auc", "AUC", ".3f", "chance that such a head is above another"), Shown("places", "Their ranks"),
)  # fmt: skip


def _number_line(one: Numbers, here: Mapping[Place, float], reference: Reference) -> dict[str, Any]:
    published = {(layer, head): v for layer, row in enumerate(one.values) for head, v in enumerate(row)}
    both = sorted(published.keys() & here.keys())
    pairs = pa.table(
        {"a": pa.array([published[at] for at in both], pa.float64()),
         "b": pa.array([here[at] for at in both], pa.float64())}
    )  # fmt: skip
    return {
        "name": one.meaning, "column": one.column, "heads": len(both),
        "spearman": rank_correlation(pairs, "a", "b"), "best": _best(published), "best_here": _best(here),
        "source": reference.cited(one.source).partition(", http")[0],
    }  # fmt: skip


def _family_line(one: Family, here: Mapping[Place, float]) -> dict[str, Any]:
    inside = [here[at] for at in one.heads if at in here]
    outside = [value for at, value in here.items() if at not in one.heads]
    ranks = [f"{1 + sum(v > here[at] for v in here.values())}" for at in one.heads if at in here]
    return {
        "family": one.name, "published": _names(one.heads), "column": one.column,
        "auc": area_under_curve(inside, outside), "places": ", ".join(ranks),
    }  # fmt: skip


def _best(values: Mapping[Place, float]) -> str:
    """The heads of the largest values; ties go to the earlier head."""
    return _names(sorted(values, key=lambda at: (-values[at], at))[:_BEST])


def _names(heads: Sequence[Place]) -> str:
    return ", ".join(f"{layer}.{head}" for layer, head in heads)


def _table(columns: tuple[Shown, ...], lines: list[dict[str, Any]]) -> pa.Table:
    kinds = {"heads": pa.int64(), "spearman": pa.float64(), "auc": pa.float64()}
    return pa.table(
        {c.name: pa.array([line[c.name] for line in lines], kinds.get(c.name, pa.string())) for c in columns}
    )
