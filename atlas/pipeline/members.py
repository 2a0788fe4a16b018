"""The SAEs of a build in their one order, and which step each of them comes from.

The order is that of the [[sae]] tables; within a table by width of the site (as widths first occur), then
by site; after them the imported ones as they are listed. It does not depend on the number of parts, and
neither does any SAE, whose seed comes from its name: bit for bit where no bank is split, to rounding
elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

from atlas.configs import BuildConfig, SAEConfig
from atlas.errors import ConfigError, SAEError
from atlas.lm.files import ModelFiles
from atlas.sae.library import Imported, find_imported, imported_names
from atlas.sae.library_lake import bring_imported
from atlas.settings import Settings
from atlas.sites import ModelShape, Site, partner, partner_name

IMPORTS = "imports"
"""The step that copies imported SAEs."""


@dataclass(frozen=True)
class Member:
    """One SAE of a build: its name, its site, and the step and the number under which it is made."""

    name: str
    site: Site
    step: str
    item: int
    digest: str = ""
    """Of an imported SAE's files."""


def pairs_of(saes: Sequence[Member]) -> tuple[tuple[int, int], ...]:
    """The numbers of every q SAE with a k SAE of the same head and, but for that letter, the same name.

    >>> q, k, z = Site("q", 1, 3), Site("k", 1, 3), Site("z", 1)
    >>> pairs_of([Member(f"m/{s.name}.topk-8", s, "train", i) for i, s in enumerate([z, k, q])])
    ((2, 1),)
    """
    numbers = {(member.name, member.site): number for number, member in enumerate(saes)}
    found = []
    for number, member in enumerate(saes):
        if member.site.kind == "q":
            other = partner_name(member.name, member.site), partner(member.site)
            if other in numbers:
                found.append((number, numbers[other]))
    return tuple(found)


def by_width(sites: Sequence[Site], shape: ModelShape) -> list[list[Site]]:
    """The sites in groups of equal d_in, in the order in which widths first occur."""
    groups: dict[int, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.d_in(shape), []).append(site)
    return list(groups.values())


def deal(sites: Sequence[Site], shape: ModelShape, parts: int) -> tuple[tuple[Site, ...], ...]:
    """The sites dealt out to at most ``parts`` training steps, none of them empty.

    Each part is a run of neighbouring sites, of one width if there are enough parts, so that its SAEs
    can be stacked; widths get parts by their sites times d_in. Sites keep their order within a part.

    >>> shape = ModelShape(3, 2, 8, 4, 10, 16)
    >>> sites = [Site("z", 0), Site("q", 1, 0), Site("q", 1, 1), Site("z", 1), Site("z", 2)]
    >>> [[site.name for site in part] for part in deal(sites, shape, 3)]
    [['L00.z'], ['L01.z', 'L02.z'], ['L01.H00.q', 'L01.H01.q']]
    >>> [[site.name for site in part] for part in deal(sites, shape, 1)]
    [['L00.z', 'L01.H00.q', 'L01.H01.q', 'L01.z', 'L02.z']]
    """
    groups = by_width(sites, shape)
    place = {site: i for i, site in enumerate(sites)}
    if parts < len(groups):
        runs = _cut([site for group in groups for site in group], parts)
        return tuple(tuple(sorted(run, key=place.__getitem__)) for run in runs)
    shares = [1] * len(groups)
    for _ in range(min(parts, len(sites)) - len(groups)):
        load = [
            len(group) * group[0].d_in(shape) / share if share < len(group) else 0.0
            for group, share in zip(groups, shares, strict=True)
        ]
        shares[load.index(max(load))] += 1
    return tuple(
        tuple(run) for group, share in zip(groups, shares, strict=True) for run in _cut(group, share)
    )


def _cut(sites: Sequence[Site], parts: int) -> list[Sequence[Site]]:
    """Neighbours in ``parts`` runs whose lengths differ by one at most."""
    ends = [len(sites) * i // parts for i in range(parts + 1)]
    return [sites[a:b] for a, b in pairwise(ends)]


def part_names(parts: Sequence[object]) -> tuple[str, ...]:
    """Names of the training steps."""
    return ("train",) if len(parts) == 1 else tuple(f"train-{i:03d}" for i in range(len(parts)))


def members_of(
    config: BuildConfig,
    files: ModelFiles,
    shape: ModelShape,
    parts: Sequence[Sequence[Site]],
    imported: Sequence[Imported],
) -> tuple[Member, ...]:
    """Every SAE of the build, in order.

    Raises:
        ConfigError: two SAEs would have one name, a k is more than the width at a site, or an objective
            does not fit it.
    """
    step_of = {site: name for name, part in zip(part_names(parts), parts, strict=True) for site in part}
    order = sorted(step_of, key=lambda s: (s.layer, s.kind, -1 if s.head is None else s.head))
    made: dict[str, int] = {}
    out = []
    for sae in config.sae:
        for site in (site for group in by_width(order, shape) for site in group):
            d_in = site.d_in(shape)
            _check_member(sae, site, d_in)
            step = step_of[site]
            item = made.setdefault(step, 0)
            made[step] += 1
            out.append(Member(sae.name_at(files.name, site.name, d_in), site, step, item))
    out += [Member(sae.name, sae.site, IMPORTS, i, sae.digest) for i, sae in enumerate(imported)]
    names = [member.name for member in out]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two SAEs would be called {twice[0]!r}; give one [[sae]] a label")
    return tuple(out)


def _check_member(sae: SAEConfig, site: Site, d_in: int) -> None:
    if sae.has_k and sae.k > sae.width(d_in):
        raise ConfigError(f"sae k {sae.k} is more than d_sae {sae.width(d_in)} at site {site.name}")
    if sae.objective in ("scores", "pattern") and site.kind not in ("q", "k"):
        raise ConfigError(f"objective {sae.objective!r} is for q and k; {site.name} is neither")


def find_imports(
    config: BuildConfig, settings: Settings, files: ModelFiles, shape: ModelShape
) -> tuple[Imported, ...]:
    """The imported SAEs that the build asks for, which must belong to its model as it is prepared.

    Raises:
        SAEError: the library has none of that name, or it was made for another model, processing or width.
    """
    bring_imported(settings, config.imports)
    names = [name for asked in config.imports for name in _matching(settings.home, asked)]
    found = tuple(find_imported(settings.home, name) for name in dict.fromkeys(names))
    for sae in found:
        if sae.model != files.name:
            raise SAEError(
                f"imported SAE {sae.name!r} reads {sae.model!r}; this build's model is {files.name!r}"
            )
        if sae.processing != config.model.processing:
            raise SAEError(
                f"imported SAE {sae.name!r} reads {sae.processing} weights; this build has processing = "
                f'"{config.model.processing}", and processing = "{sae.processing}" under [model] is needed'
            )
        _check_site(sae, files, shape)
    return found


def _matching(home: Path, asked: str) -> list[str]:
    """The names that a pattern with ``*`` stands for; any other name as it is, for the library to find."""
    if "*" not in asked:
        return [asked]
    there = imported_names(home)
    found = [name for name in there if fnmatchcase(name, asked)]
    if not found:
        listed = f"there are: {', '.join(there)}" if there else "the library is empty; see `atlas import`"
        raise SAEError(f"no imported SAE's name matches {asked!r}; {listed}")
    return found


def _check_site(sae: Imported, files: ModelFiles, shape: ModelShape) -> None:
    site = sae.site
    if site.layer >= shape.n_layers or (site.head or 0) >= shape.n_heads:
        raise SAEError(f"imported SAE {sae.name!r} reads {site.name}, which {files.name} does not have")
    if sae.d_in != site.d_in(shape):
        raise SAEError(
            f"imported SAE {sae.name!r} has d_in {sae.d_in}; {site.name} of {files.name} is "
            f"{site.d_in(shape)} wide"
        )
