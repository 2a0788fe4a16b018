"""What a step costs, and what an SAE costs per token: the parts that estimates are made of."""

from collections.abc import Iterable
from dataclasses import dataclass

from atlas.configs import SAEConfig
from atlas.pipeline.plan import Plan
from atlas.sae.library import find_imported
from atlas.settings import Settings
from atlas.sites import Site

FIRING = 50
"""Features taken to fire per token in an SAE whose architecture does not fix their number."""


@dataclass(frozen=True)
class Cost:
    """What a step takes; None where nothing is known about its kind."""

    tokens: int | None = 0
    flops: float | None = 0.0
    bytes: int | None = 0

    def __add__(self, other: "Cost") -> "Cost":
        """Both together; what is unknown adds nothing."""
        return Cost(
            (self.tokens or 0) + (other.tokens or 0),
            (self.flops or 0.0) + (other.flops or 0.0),
            (self.bytes or 0) + (other.bytes or 0),
        )


@dataclass(frozen=True)
class Width:
    """What an SAE's cost depends on."""

    site: Site
    d_in: int
    d_sae: int
    active: int
    """Features that fire per token."""
    dense: bool
    """Whether training multiplies with all features (relu, jumprelu, gated) or the active ones alone."""
    gated: bool = False

    @property
    def encode(self) -> int:
        """FLOPs of a token's pre-activations: 2 d_in d_sae."""
        return 2 * self.d_in * self.d_sae

    @property
    def decode(self) -> int:
        """FLOPs of a token's reconstruction from its active features: 2 d_in active."""
        return 2 * self.d_in * self.active

    @property
    def training(self) -> int:
        """FLOPs of a training token.

        Dense: encoder and decoder forward (2 + 2), their weights' gradients (2 + 2) and the features' (2),
        each times d_in d_sae; a gated SAE decodes a second time for its auxiliary error (2 + 2). With k
        features: dense pre-activations, 2 d_in d_sae; all else with active features, 8 d_in active.

        >>> Width(Site("z", 0), 8, 32, 4, dense=True).training, Width(Site("z", 0), 8, 32, 4, False).training
        (2560, 768)
        """
        if self.dense:
            return (14 if self.gated else 10) * self.d_in * self.d_sae
        return self.encode + 8 * self.d_in * self.active

    @property
    def bytes(self) -> int:
        """Bytes of the stored SAE: W_enc, W_dec, b_enc, b_dec in float32."""
        return 4 * (2 * self.d_in * self.d_sae + self.d_sae + self.d_in)


def _of_config(sae: SAEConfig, site: Site, d_in: int) -> Width:
    d_sae = sae.width(d_in)
    active = min(sae.k if sae.has_k else FIRING, d_sae)
    return Width(site, d_in, d_sae, active, not sae.has_k, sae.architecture == "gated")


def widths(plan: Plan, settings: Settings) -> tuple[Width, ...]:
    """The SAEs of a plan, in its order."""
    n_sites = sum(len(part) for part in plan.parts)
    out = []
    for number, member in enumerate(plan.saes):
        if number < n_sites * len(plan.config.sae):
            sae = plan.config.sae[number // n_sites]
            out.append(_of_config(sae, member.site, member.site.d_in(plan.shape)))
        else:
            found = find_imported(settings.home, member.name)
            out.append(Width(found.site, found.d_in, found.d_sae, min(FIRING, found.d_sae), dense=True))
    return tuple(out)


def total(costs: Iterable[Cost]) -> Cost:
    """All costs together.

    >>> total([Cost(1, 2.0, 3), Cost(None, None, None), Cost(10, 20.0, 30)])
    Cost(tokens=11, flops=22.0, bytes=33)
    """
    return sum(costs, Cost())
