"""Which part of a release is exported: SAEs by name, site or layer, and features by number."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
import numpy.typing as npt

from atlas.errors import ConfigError, StoreError
from atlas.sites import KINDS, Site

Ints = npt.NDArray[np.int64]
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Wanted:
    """What somebody asked for; empty means all."""

    saes: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    features: tuple[range, ...] = ()
    alive: bool = False
    """Only features that fire."""


@dataclass(frozen=True)
class Part:
    """An SAE of the release, how others' formats name it, and which of its features are wanted."""

    sae: str
    model: str
    site: Site
    d_sae: int
    digest: str
    n_tokens: int
    suffix: str | None
    features: tuple[range, ...]
    alive: bool

    @property
    def model_id(self) -> str:
        """The model's name in letters, digits, underscores and dashes, in lower case."""
        return plain_name(self.model).lower()

    @property
    def source_set(self) -> str:
        """The SAE's name without its model and layer: ``z-topk-768`` of ``docs-12l/L05.z.topk-768``."""
        return source_set(self.sae)

    @property
    def source_id(self) -> str:
        """Layer and source set, the name of the SAE's folder: ``5-z-topk-768``."""
        name = f"{self.site.layer}-{self.source_set}"
        return name if self.suffix is None else f"{name}__{self.suffix}"

    def numbers(self, con: duckdb.DuckDBPyConnection) -> Ints:
        """The wanted features, ascending."""
        only = " AND alive" if self.alive else ""
        sql = f"SELECT feature FROM features WHERE sae = ?{only} ORDER BY feature"  # noqa: S608
        found = con.execute(sql, [self.sae]).fetchnumpy()["feature"].astype(np.int64)
        if not self.features:
            return found
        inside = [(found >= r.start) & (found < r.stop) for r in self.features]
        return found[np.any(inside, axis=0)]

    def batches(self, con: duckdb.DuckDBPyConnection, size: int) -> Iterator[Ints]:
        """The wanted features, at most ``size`` at a time."""
        numbers = self.numbers(con)
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]


def plain_name(text: str) -> str:
    """Letters, digits, underscores and dashes; anything else becomes a dash.

    >>> plain_name("z.topk-768")
    'z-topk-768'
    """
    return _NOT_ALLOWED.sub("-", text).strip("-") or "unnamed"


def source_set(sae: str) -> str:
    """An SAE's name without its model and layer.

    >>> source_set("docs-12l/L05.z.topk-768"), source_set("gpt2/L05.H03.q.relu-256"), source_set("gpt2/mine")
    ('z-topk-768', 'H03-q-relu-256', 'mine')
    """
    return plain_name(re.sub(r"^L\d+\.", "", sae.rsplit("/", 1)[-1]))


def parse_features(text: str) -> tuple[range, ...]:
    """Numbers and ranges, both ends included.

    >>> parse_features("0-99,200")
    (range(0, 100), range(200, 201))
    >>> parse_features("9-3")
    Traceback (most recent call last):
    ...
    atlas.errors.ConfigError: features '9-3' cannot be read; write them like 0-99,200
    """
    ranges = []
    for word in text.split(","):
        match = _RANGE.fullmatch(word.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if high < low:
            raise ConfigError(f"features {text[:80]!r} cannot be read; write them like 0-99,200")
        ranges.append(range(low, high + 1))
    return tuple(ranges)


def select(con: duckdb.DuckDBPyConnection, wanted: Wanted) -> tuple[Part, ...]:
    """The SAEs that are wanted, by model, layer, site and name.

    Raises:
        StoreError: an SAE, site, layer or feature that the release does not have, or nothing is left.
    """
    rows = con.execute(
        "SELECT sae, model, site, layer, head, d_sae, digest, n_tokens FROM saes "
        "ORDER BY model, layer, site, head NULLS FIRST, sae"
    ).fetchall()
    _check(wanted, rows)
    kept = [
        row
        for row in rows
        if (not wanted.saes or row[0] in wanted.saes)
        and (not wanted.sites or row[2] in wanted.sites)
        and (not wanted.layers or row[3] in wanted.layers)
    ]
    if not kept:
        raise StoreError("the release has no SAE that fits --sae, --site and --layer together")
    parts = []
    taken: set[tuple[str, str]] = set()
    for sae, model, site, layer, head, d_sae, digest, n_tokens in kept:
        for asked in wanted.features:
            if asked.stop > d_sae:
                raise StoreError(f"feature {asked.stop - 1} is not in {sae}; allowed: 0 to {d_sae - 1}")
        place = (plain_name(model).lower(), f"{layer}-{source_set(sae)}")
        # Two names that differ only in what other programs do not allow are told apart by their tensors.
        suffix = digest[:8] if place in taken else None
        taken.add(place)
        where = Site(site, layer, head)
        parts.append(Part(sae, model, where, d_sae, digest, n_tokens, suffix, wanted.features, wanted.alive))
    return tuple(parts)


def _check(wanted: Wanted, rows: Sequence[tuple]) -> None:
    """StoreError for a name, site or layer of which the release has nothing."""
    asked_and_there = (
        ("SAE", wanted.saes, [row[0] for row in rows]),
        ("site", wanted.sites, [kind for kind in KINDS if kind in {row[2] for row in rows}]),
        ("layer", wanted.layers, sorted({row[3] for row in rows})),
    )
    for what, asked, there in asked_and_there:
        for one in asked:
            if one not in there:
                more = f", ... ({len(there)} in all)" if len(there) > 12 else ""
                listed = ", ".join(map(str, there[:12])) or "none"
                raise StoreError(f"{what} {one!r} is not in this release; allowed: {listed}{more}")
