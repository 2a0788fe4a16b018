"""One [[sae]] table with a ``sweep``, written out as one table per combination of the swept values.

    sweep = { l1_coefficient = [0.1, 1.0], d_sae = [128, 256] }

stands for four SAEs. A field that an SAE's name does not show anyway becomes part of its label.
"""

import itertools
from typing import Any

from atlas.errors import ConfigError

SHOWN = ("architecture", "d_sae", "expansion")
"""Fields that every SAE's name shows: its architecture and its width."""
MOST = 1000


def expand_sweeps(plain: Any) -> Any:
    """A config as read from a file, its sweeps written out; the last named field varies fastest.

    Raises:
        ConfigError: a sweep is not a table of lists, a list is empty, or there are too many combinations.

    >>> swept = {"sae": [{"k": 8, "sweep": {"d_sae": [64, 128], "lr": [0.001, 1e-05]}}]}
    >>> [(sae["d_sae"], sae["lr"], sae["label"]) for sae in expand_sweeps(swept)["sae"]]
    [(64, 0.001, 'lr-0.001'), (64, 1e-05, 'lr-1e-05'), (128, 0.001, 'lr-0.001'), (128, 1e-05, 'lr-1e-05')]
    """
    if not isinstance(plain, dict) or not isinstance(plain.get("sae"), list):
        return plain
    return plain | {"sae": [one for sae in plain["sae"] for one in _expanded(sae)]}


def _expanded(sae: Any) -> list[Any]:
    if not isinstance(sae, dict) or "sweep" not in sae:
        return [sae]
    base = {key: value for key, value in sae.items() if key != "sweep"}
    sweep = _checked(sae["sweep"])
    out = []
    for values in itertools.product(*sweep.values()):
        chosen = dict(zip(sweep, values, strict=True))
        labels = [f"{key}-{_written(value)}" for key, value in chosen.items() if key not in (*SHOWN, "label")]
        label = chosen.get("label", base.get("label"))
        parts = [str(part) for part in (label, *labels) if part is not None]
        out.append(base | chosen | ({"label": "-".join(parts)} if parts else {}))
    return out


def _checked(sweep: Any) -> dict[str, list[Any]]:
    if not isinstance(sweep, dict) or not sweep:
        raise ConfigError(f"sweep {sweep!r} is not a table of lists, such as {{ k = [8, 16] }}")
    n = 1
    for key, values in sweep.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"sweep of {key} {values!r} is not a list of values, such as [8, 16]")
        n *= len(values)
    if n > MOST:
        raise ConfigError(f"sweep of {', '.join(sweep)} has {n} combinations; allowed: up to {MOST}")
    return sweep


def _written(value: Any) -> str:
    """A value as it stands in a label."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return "-".join(_written(v) for v in value)
    return f"{value:.12g}" if isinstance(value, int | float) else str(value)


def read_sweep(text: str) -> tuple[str, list[Any]]:
    """A sweep as written on the command line.

    >>> read_sweep("l1_coefficient=0.1,1,10")
    ('l1_coefficient', [0.1, 1, 10])
    >>> read_sweep("tied_start=true,false")
    ('tied_start', [True, False])
    """
    key, equals, values = text.partition("=")
    if not key or not equals or not all(values.split(",")):
        raise ConfigError(f"sweep {text!r} cannot be read; write it like l1_coefficient=0.1,1,10")
    return key, [_value(value.strip()) for value in values.split(",")]


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
