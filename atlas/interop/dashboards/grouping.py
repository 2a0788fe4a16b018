"""Which example of a release an activation of SAEDashboard's or Neuronpedia's format is."""

from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

N_GROUPS, PER_GROUP = 10, 5
"""Groups by tenths of the active tokens, and examples in each, of a release's table ``examples``."""
Place = tuple[int | None, str, int]
"""Block, group and rank."""


def places(activations: list[dict[str, Any]], n_active: int) -> list[Place]:
    """Block, group and rank of each example.

    Where they are not stated, the top group is told by its bin of -1, the random one by its bin of 0, and
    groups of tenths by the number of examples that each of them has in a release with so many active tokens.
    Those of other programs' files, which are cut differently, are numbered from the strongest interval down.
    """
    if all("place" in shown for shown in activations):
        return [shown["place"] for shown in activations]
    kinds = [_kind(shown) for shown in activations]
    tenths = iter(
        _tenths([shown for shown, kind in zip(activations, kinds, strict=True) if not kind], n_active)
    )
    counts: dict[str, int] = defaultdict(int)
    found: list[Place] = []
    for kind in kinds:
        group = kind or next(tenths)
        found.append((None, group, counts[group]))
        counts[group] += 1
    return found


def _kind(shown: Mapping[str, Any]) -> str:
    if shown["bin_contains"] == -1:
        return "top"
    return "random" if shown["bin_min"] == shown["bin_max"] == shown["bin_contains"] == 0 else ""


def _tenths(shown: list[dict[str, Any]], n_active: int) -> list[str]:
    """The names of the groups of tenths, for each example, strongest group first."""
    # A tenth is floor(10 * rank from the bottom / n), so below 10 active tokens some are empty.
    ends = [-(-group * n_active // N_GROUPS) for group in range(N_GROUPS + 1)]
    sizes = [min(high - low, PER_GROUP) for low, high in pairwise(ends)]
    if sum(sizes) == len(shown):
        return [f"q{group}" for group in reversed(range(N_GROUPS)) for _ in range(sizes[group])]
    bins = [(one["bin_min"], one["bin_max"]) for one in shown]
    order = sorted(set(bins), reverse=True)
    return [f"q{max(N_GROUPS - 1 - order.index(one), 0)}" for one in bins]
