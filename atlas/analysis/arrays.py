"""Arrays in a folder: memory-mapped, so that a part of them can be looked at, and checked as a whole."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from atlas.errors import StoreError

# What numpy raises for a file that is missing, empty, cut short, altered, or not one of its own.
UNREADABLE = (OSError, ValueError, KeyError, EOFError, IndexError, TypeError, BadZipFile)
_CHECKSUMS = "checksums.npz"


def save_arrays(folder: Path, arrays: Mapping[str, npt.NDArray]) -> None:
    """Write arrays as flat files into a new folder, with a checksum of each."""
    folder.mkdir()
    flat = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    for name, array in flat.items():
        np.save(folder / f"{name}.npy", array)
    sums = {name: np.array(_checksum(array), np.uint32) for name, array in flat.items()}
    np.savez(folder / _CHECKSUMS, allow_pickle=False, **sums)


def open_arrays(folder: Path, names: tuple[str, ...]) -> dict[str, npt.NDArray]:
    """The arrays of those names, memory-mapped; StoreError if a file is missing, cut short or altered."""
    try:
        found = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        with np.load(folder / _CHECKSUMS, allow_pickle=False) as sums:
            wrong = [name for name, array in found.items() if int(sums[name]) != _checksum(array)]
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"arrays in {str(folder)!r} cannot be read: {reason}") from None
    if wrong:
        raise StoreError(f"{wrong[0]}.npy in {str(folder)!r} is damaged: its checksum is another one")
    return found


def _checksum(array: npt.NDArray) -> int:
    return zlib.crc32(np.asarray(array).reshape(-1).view(np.uint8).data) if array.size else 0
