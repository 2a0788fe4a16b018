"""Files of other people, opened without trust: JSON, safetensors and pickles of tensors alone."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from atlas.errors import SAEError


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; SAEError if the file is missing or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise SAEError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SAEError(f"{str(path)!r} is not JSON: {_line(error)}") from None
    if not isinstance(found, dict):
        raise SAEError(f"{str(path)!r} is not a JSON object of keys")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; SAEError if it is missing, cut off or something else."""
    try:
        return load_file(path)
    except OSError as error:
        raise SAEError(f"{str(path)!r} cannot be read: {error.strerror or _line(error)}") from None
    except (ValueError, SafetensorError) as error:
        raise SAEError(f"{str(path)!r} is not a whole safetensors file: {_line(error)}") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pt`` file that holds a dict of tensors and nothing that could run.

    Raises:
        SAEError: the file is missing, cut off, holds anything beside tensors, or would run code.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise SAEError(f"{str(path)!r} cannot be read: {error.strerror or _line(error)}") from None
    except pickle.UnpicklingError as error:
        raise SAEError(_refused(path, str(error))) from None
    except Exception as error:  # noqa: BLE001 - damaged bytes make the unpickler raise almost anything
        raise SAEError(f"{str(path)!r} is not a whole PyTorch file: {_line(error)}") from None
    if isinstance(found, dict) and isinstance(found.get("sae"), dict):
        found = found["sae"]
    if not isinstance(found, dict) or not found:
        raise SAEError(f"{str(path)!r} holds no dict of tensors")
    other = [key for key, value in found.items() if not (isinstance(key, str) and _plain(value))]
    if other:
        raise SAEError(f"{str(path)!r} holds more than plain tensors: {other[0]!r}")
    return found


def _plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized


def _refused(path: Path, message: str) -> str:
    if "global" in message.lower() or "unsupported" in message.lower():
        return f"{str(path)!r} is a pickle that holds more than tensors and could run code; refused"
    return f"{str(path)!r} is not a whole PyTorch file"


def whole(where: str, config: dict[str, Any], key: str, *, low: int = 1) -> int:
    """A whole number that the config has to give; SAEError naming the value."""
    value = config.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise SAEError(f"{where}: {key} {value!r} is not allowed; a whole number of {low} or more is needed")
    return value


def maybe_whole(where: str, config: dict[str, Any], key: str, *, low: int = 0) -> int | None:
    """A whole number, or None where the config does not give it."""
    return None if config.get(key) is None else whole(where, config, key, low=low)


def maybe_text(config: dict[str, Any], key: str) -> str | None:
    """A text, or None where the config gives none."""
    value = config.get(key)
    return value if isinstance(value, str) and value else None


def maybe_number(config: dict[str, Any], key: str) -> float | None:
    """A number, or None where the config gives none."""
    value = config.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
