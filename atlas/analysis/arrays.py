"""Arrays in a folder: memory-mapped, so that a part of them can be looked at, and checked as a whole."""

import threading
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
_READING = threading.Lock()
"""numpy reads a file's header with Python's parser, whose depth Python 3.11 counts for all threads
together: of two that parse at once, one may get a SystemError."""


def save_arrays(folder: Path, arrays: Mapping[str, npt.NDArray]) -> None:
    """Write arrays as flat files into a new folder, with a checksum of each."""
    folder.mkdir()
    flat = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    for name, array in flat.items():
        np.save(folder / f"{name}.npy", array)
    sums = {name: np.array(_checksum(array), np.uint32) for name, array in flat.items()}
    np.savez(folder / _CHECKSUMS, allow_pickle=False, **sums)


def read_npy(path: Path) -> npt.NDArray:
    """The array of an .npy file; one of UNREADABLE where it has none."""
    with _READING:
        array: npt.NDArray = np.load(path, allow_pickle=False)
    return array


def read_npz(path: Path) -> dict[str, npt.NDArray]:
    """The arrays of an .npz file by name; one of UNREADABLE where it is not whole."""
    with _READING, np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def open_arrays(folder: Path, names: tuple[str, ...]) -> dict[str, npt.NDArray]:
    """The arrays of those names, memory-mapped; StoreError if a file is missing, cut short or altered."""
    try:
        with _READING:
            found = {n: np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in names}
        sums = read_npz(folder / _CHECKSUMS)
        wrong = [name for name, array in found.items() if int(sums[name]) != _checksum(array)]
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"arrays in {str(folder)!r} cannot be read: {reason}") from None
    if wrong:
        raise StoreError(f"{wrong[0]}.npy in {str(folder)!r} is damaged: its checksum is another one")
    return found


def _checksum(array: npt.NDArray) -> int:
    return zlib.crc32(np.asarray(array).reshape(-1).view(np.uint8).data) if array.size else 0
