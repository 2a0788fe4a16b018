"""What a step counts while it works, how many tokens a unit stands for, and amounts as people write them."""

from collections.abc import Iterable
from dataclasses import dataclass

from atlas.configs import BuildConfig
from atlas.errors import ConfigError

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@dataclass(frozen=True)
class Unit:
    """One unit of a step's progress."""

    name: str
    tokens: int | None = None
    """Tokens of text in a unit; None where a unit is no text."""


def unit_of(kind: str, config: BuildConfig) -> Unit:
    """What a step of a kind counts.

    >>> unit_of("train", BuildConfig()), unit_of("shard", BuildConfig())
    (Unit(name='steps', tokens=4096), Unit(name='blocks', tokens=128))
    >>> unit_of("publish", BuildConfig())
    Unit(name='', tokens=None)
    """
    context, batch = config.corpus.context, config.train.batch
    known = {
        "tokens": Unit("blocks", context),
        "train": Unit("steps", batch),
        "imports": Unit("SAEs"),
        "prune": Unit("tokens", 1),
        "finetune": Unit("steps", batch),
        "evaluate": Unit("splices"),
        "heads": Unit("blocks", context),
        "shard": Unit("blocks", context),
        "effects": Unit("blocks", context),
        "summarise": Unit("features"),
        "dfa": Unit("blocks", context),
        "attribute": Unit("features"),
        "pair": Unit("experiments"),
    }
    return known.get(kind, Unit(""))


def units_of(config_json: str, kinds: Iterable[str]) -> dict[str, Unit]:
    """What each kind of step of a build counts; nothing where its config is of another version.

    >>> units_of('{"no": "config"}', ["shard"])
    {}
    """
    try:
        config = BuildConfig.from_json(config_json)
    except (ConfigError, ValueError):
        return {}
    return {kind: unit_of(kind, config) for kind in kinds}


def amount(value: float | None) -> str:
    """Three digits and a prefix for a power of 1000; nothing for nothing, ? for unknown.

    >>> amount(None), amount(0), amount(512), amount(2_000_000), amount(1.234e15)
    ('?', '', '512', '2 M', '1.23 P')
    """
    if value is None:
        return "?"
    if not value:
        return ""
    power = 0
    while value >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {_PREFIXES[power]}".rstrip()
