"""Names for the places in a model where activations are read: kind, layer, and perhaps one head.

A site is written ``L05.z`` (z of a whole layer, heads concatenated), ``L05.H03.q`` (q of one head) or
``L05.resid_pre``. Hook names are the classic TransformerLens ones, which ``TransformerBridge`` keeps.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from atlas.errors import ConfigError, one_of

HEAD_KINDS = ("z", "q", "k", "v")
STREAM_KINDS = ("resid_pre", "attn_out", "mlp_out")
KINDS = (*HEAD_KINDS, *STREAM_KINDS)

_PATTERN = re.compile(r"L(\d+)(?:\.H(\d+))?\.([a-z_]+)")


class ModelShape(NamedTuple):
    """The sizes of a transformer, under the field's names."""

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    n_ctx: int


@dataclass(frozen=True, order=True)
class Site:
    """One place in a model: ``kind`` at ``layer``, for one ``head`` or (None) the whole layer.

    >>> Site("z", 5).name, Site("q", 5, 3).name
    ('L05.z', 'L05.H03.q')
    >>> Site.parse("L05.H03.q").hook_name
    'blocks.5.attn.hook_q'
    """

    kind: str
    layer: int
    head: int | None = None

    def __post_init__(self) -> None:
        one_of("site", self.kind, KINDS)
        if self.head is not None and self.kind in STREAM_KINDS:
            raise ConfigError(f"site {self.kind!r} belongs to a layer and has no head {self.head}")
        if self.head is None and self.kind in ("q", "k", "v"):
            raise ConfigError(f"site {self.kind!r} needs a head, such as L05.H03.{self.kind}")

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read the written form; ConfigError names what could not be read."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ConfigError(f"site {text!r} cannot be read; write it like L05.z or L05.H03.q")
        layer, head, kind = match.groups()
        return cls(kind, int(layer), None if head is None else int(head))

    @property
    def name(self) -> str:
        """The written form, which sorts by layer, then head."""
        head = "" if self.head is None else f".H{self.head:02d}"
        return f"L{self.layer:02d}{head}.{self.kind}"

    @property
    def hook_name(self) -> str:
        """The TransformerLens hook that holds this site's activations."""
        if self.kind in HEAD_KINDS:
            return f"blocks.{self.layer}.attn.hook_{self.kind}"
        return f"blocks.{self.layer}.hook_{self.kind}"

    def d_in(self, shape: ModelShape) -> int:
        """The length of one activation vector here.

        >>> shape = ModelShape(12, 12, 768, 64, 50257, 1024)
        >>> Site("z", 0).d_in(shape), Site("q", 0, 1).d_in(shape), Site("mlp_out", 0).d_in(shape)
        (768, 64, 768)
        """
        if self.kind in STREAM_KINDS:
            return shape.d_model
        return shape.d_head if self.head is not None else shape.n_heads * shape.d_head


OTHER_SIDE = {"q": "k", "k": "q"}


def partner(site: Site) -> Site:
    """The other side of a q or k site.

    >>> partner(Site("q", 0, 3)).name
    'L00.H03.k'
    """
    return Site(OTHER_SIDE[site.kind], site.layer, site.head)


def partner_name(name: str, site: Site) -> str:
    """The name of the SAE that is like this one on the other side of the head: the same but for that letter.

    >>> partner_name("m/L00.H03.q.topk-8", Site("q", 0, 3))
    'm/L00.H03.k.topk-8'
    """
    return name.replace(f"{site.name}.", f"{partner(site).name}.")


def _chosen(what: str, asked: str | Sequence[int], n: int) -> list[int]:
    if asked == "all":
        return list(range(n))
    if isinstance(asked, str):
        raise ConfigError(f"{what} {asked!r} is not known; allowed: 'all' or numbers from 0 to {n - 1}")
    for number in asked:
        if not 0 <= number < n:
            raise ConfigError(f"{what} {number} does not exist; this model has {what}s 0 to {n - 1}")
    return sorted(set(asked))


def expand_sites(
    kinds: Iterable[str],
    layers: str | Sequence[int],
    heads: str | Sequence[int] | None,
    shape: ModelShape,
) -> tuple[Site, ...]:
    """Every site that kinds x layers x heads names in a model of this shape, sorted.

    ``heads`` None means whole layers for z and all heads for q, k and v.

    >>> shape = ModelShape(2, 2, 8, 4, 10, 16)
    >>> [s.name for s in expand_sites(["z"], "all", None, shape)]
    ['L00.z', 'L01.z']
    >>> [s.name for s in expand_sites(["q"], [1], "all", shape)]
    ['L01.H00.q', 'L01.H01.q']
    >>> expand_sites(["z"], [2], None, shape)
    Traceback (most recent call last):
    ...
    atlas.errors.ConfigError: layer 2 does not exist; this model has layers 0 to 1
    """
    sites: set[Site] = set()
    for kind in kinds:
        one_of("site", kind, KINDS)
        for layer in _chosen("layer", layers, shape.n_layers):
            whole = kind in STREAM_KINDS or (kind == "z" and heads is None)
            numbers = [None] if whole else _chosen("head", "all" if heads is None else heads, shape.n_heads)
            sites.update(Site(kind, layer, head) for head in numbers)
    if not sites:
        raise ConfigError(f"no site is named; allowed kinds: {', '.join(KINDS)}")
    return tuple(sorted(sites, key=lambda s: (s.layer, s.kind, -1 if s.head is None else s.head)))
