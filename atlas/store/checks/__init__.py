"""The invariants of a release, as a flat list of named SQL queries (``CHECKS``)."""

from atlas.store.checks import attribution, counts, heads, indexes, orders, pairs, ranges, references
from atlas.store.checks.check import Check

CHECKS: dict[str, Check] = {
    check.name: check
    for room in (references, counts, orders, ranges, attribution, heads, pairs, indexes)
    for check in room.CHECKS
}
"""Every check by name: references, counts, orders, ranges, attribution, heads, pairs of SAEs, indexes."""
