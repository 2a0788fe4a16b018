"""Rows of an SAE's decoder from the files of this machine, if they are the SAE that a release describes.

Releases hold no weights. Files count only if the SHA-256 over their tensors is the one in the release. No
torch here: rows are read from the file one by one.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from atlas.errors import SAEError
from atlas.sae.library import CONFIG, WEIGHTS, folder_of
from atlas.sae.library_lake import bring_trained
from atlas.settings import Settings

Floats = npt.NDArray[np.float32]
_ORDER = ("W_enc", "b_enc", "b_mag", "W_dec", "b_dec", "threshold", "b_gate", "r_mag")
"""Tensors in the order of an SAE's digest; in a file, a gated SAE's b_enc is called b_mag."""


class Decoder:
    """The decoder of one SAE, in its file."""

    def __init__(self, path: Path) -> None:
        self._file: Any = _open(path)
        self._rows = self._file.get_slice("W_dec")

    def rows(self, features: npt.NDArray[np.int64]) -> Floats:
        """Rows of W_dec, [features, d_in]."""
        if len(features) == 0:
            return np.empty((0, self._rows.get_shape()[1]), np.float32)
        return np.concatenate([self._rows[int(f) : int(f) + 1] for f in features]).astype(np.float32)

    def cosines(self, feature: int, others: npt.NDArray[np.int64]) -> Floats:
        """Cosine of a decoder row with others of the same SAE; 0 where one of them is zero."""
        own, rows = self.rows(np.array([feature]))[0].astype(np.float64), self.rows(others).astype(np.float64)
        norms = np.linalg.norm(own) * np.linalg.norm(rows, axis=1)
        dots = rows @ own
        return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0).astype(np.float32)


def find_decoder(settings: Settings, sae: str, digest: str) -> Decoder | None:
    """The decoder of the SAE of that name whose tensors have that digest; None where it is not here."""
    for folder in _folders(settings, sae):
        path = folder / WEIGHTS
        try:
            if tensors_digest(path) == digest:
                return Decoder(path)
        except (OSError, SafetensorError, ValueError, TypeError):
            continue  # a damaged or unknown file holds no weights that could be believed
    return None


def tensors_digest(path: Path) -> str:
    """SHA-256 of the tensors, as float32 in a fixed order: what ``saes.digest`` holds."""
    total = hashlib.sha256()
    with _open(path) as file:
        there = set(file.keys())
        for name in _ORDER:
            if name in there:
                total.update(np.ascontiguousarray(file.get_tensor(name), np.float32).tobytes())
    return total.hexdigest()


def _open(path: Path) -> Any:
    return safe_open(str(path), framework="numpy")


def _folders(settings: Settings, sae: str) -> Iterator[Path]:
    """Folders that say they hold the SAE: the library's, then those of training steps."""
    with suppress(SAEError):  # a name that the library cannot have may still be a training's
        yield folder_of(settings.home, sae)
    bring_trained(settings, sae)
    for config in sorted(settings.steps.glob(f"*/*/{CONFIG}")):
        try:
            known = json.loads(config.read_text(encoding="utf8"))["metadata"]["head_atlas"]["name"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if known == sae:
            yield config.parent
