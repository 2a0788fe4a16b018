"""What can be asked live: names of calls, and the function behind each.

A call is a function of keyword arguments that JSON can carry, giving what JSON can carry; the modules are
imported when a call is made. To add one: a function in ``atlas.live.rooms`` (or any room of torch), and a
line here.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from atlas.errors import ConfigError, one_of

CALLS = {
    "warm": "atlas.live.rooms:warm",
    "feature_on_text": "atlas.live.rooms:feature_on_text",
    "feature_on_blocks": "atlas.live.rooms:feature_on_blocks",
    "features_on_text": "atlas.live.rooms:features_on_text",
    "circuit_firing": "atlas.live.circuits:firing",
    "circuit_trace": "atlas.live.circuits:trace",
}
"""Each call, and where its function is."""


def answer(name: str, given: Mapping[str, Any]) -> Any:
    """Carry out a call.

    Raises:
        ConfigError: there is no such call, or it does not take these arguments.
    """
    one_of("live call", name, CALLS)
    module, _, function = CALLS[name].partition(":")
    call = getattr(import_module(module), function)
    try:
        return call(**given)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise
        raise ConfigError(f"live call {name!r} does not take these arguments: {error}") from None
