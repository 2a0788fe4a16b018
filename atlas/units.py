"""What a step counts while it works: the name of one unit, and how many tokens it stands for."""

from dataclasses import dataclass

from atlas.configs import BuildConfig


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
