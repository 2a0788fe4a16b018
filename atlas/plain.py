"""Dataclasses as plain data (dicts, lists, scalars), read back strictly, and digests of them."""

import dataclasses
import hashlib
import json
import types
import typing
from typing import Any, TypeVar

from atlas.errors import ConfigError, one_of

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """A config as dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    return value


def digest_of(plain: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of dicts, lists and scalars.

    >>> digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def from_plain(cls: type[T], plain: Any, where: str = "") -> T:
    """Build a config dataclass from dicts, lists and scalars, refusing unknown keys and wrong types.

    >>> @dataclasses.dataclass(frozen=True)
    ... class ModelConfig:
    ...     name: str = "docs-12l"
    ...     processing: str = "raw"
    >>> from_plain(ModelConfig, {"name": "gpt2", "procesing": "raw"})
    Traceback (most recent call last):
    ...
    atlas.errors.ConfigError: key 'procesing' is not known; allowed: name, processing
    """
    if not isinstance(plain, dict):
        raise ConfigError(f"{where or cls.__name__} {plain!r} is not a table of keys")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in plain:
        one_of(f"{where + ' ' if where else ''}key", key, names)
    return cls(
        **{key: _typed(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in plain.items()}
    )


def _typed(hint: Any, value: Any, where: str) -> Any:
    """``value`` as ``hint`` asks, or ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _first_fit(args, value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} {value!r} is not a list")
        return tuple(_typed(args[0], item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where} {value!r} is not {_readable(hint)}")
    return value


def _first_fit(options: tuple[Any, ...], value: Any, where: str) -> Any:
    for option in options:
        if option is type(None):
            if value is None:
                return None
            continue
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            # A table can only be meant for it, so what is wrong inside is what to say.
            return _typed(option, value, where)
        try:
            return _typed(option, value, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where} {value!r} is not {' or '.join(_readable(o) for o in options)}")


def _readable(hint: Any) -> str:
    names = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "unset",
    }
    if dataclasses.is_dataclass(hint):
        return "a table of keys"
    return names.get(hint, "a list" if typing.get_origin(hint) is tuple else str(hint))
