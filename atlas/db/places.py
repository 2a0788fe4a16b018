"""What a comment or an agreed verdict is about: a head of a model, or a feature of an SAE."""

from dataclasses import dataclass
from typing import Any

from atlas.db.notes import check_index, check_name


@dataclass(frozen=True)
class HeadPlace:
    """A head of a model."""

    model: str
    layer: int
    head: int

    kind = "head"

    @property
    def text(self) -> str:
        """As one text, unique among heads."""
        return f"{self.model} L{self.layer}H{self.head}"

    @property
    def key(self) -> dict[str, Any]:
        """The columns that say so."""
        return {"kind": self.kind, "model": self.model, "layer": self.layer, "head": self.head}

    def check(self) -> None:
        """ConfigError for a name or index that is not allowed."""
        check_name("model", self.model)
        check_index("layer", self.layer, 2**15 - 1)
        check_index("head", self.head, 2**15 - 1)


@dataclass(frozen=True)
class FeaturePlace:
    """A feature of an SAE."""

    sae: str
    feature: int

    kind = "feature"

    @property
    def text(self) -> str:
        """As one text, unique among features."""
        return f"{self.sae} {self.feature}"

    @property
    def key(self) -> dict[str, Any]:
        """The columns that say so."""
        return {"kind": self.kind, "sae": self.sae, "feature": self.feature}

    def check(self) -> None:
        """ConfigError for a name or index that is not allowed."""
        check_name("sae", self.sae)
        check_index("feature", self.feature, 2**31 - 1)


Place = HeadPlace | FeaturePlace
