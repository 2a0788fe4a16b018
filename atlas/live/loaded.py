"""Models and SAEs that stay loaded between live calls: the latest model, and the SAEs used last.

SAEs are kept up to a bound of memory; the one used longest ago goes first. What is loaded must be what the
release was made with: digests of the model's files and of the SAE's tensors are compared.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from atlas.configs import ModelConfig
from atlas.errors import ModelError, SAEError
from atlas.interop.exporting import name_in
from atlas.lm.load import LanguageModel, load_model
from atlas.lm.runtime import prepare_torch
from atlas.sae.files import CONFIG, load_sae
from atlas.sae.library import folder_of
from atlas.sae.library_lake import bring_trained
from atlas.sae.model import SAE
from atlas.settings import Settings, load_settings

MOST_BYTES = 2_000_000_000


def size_of(sae: SAE) -> int:
    """Bytes of the SAE's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in sae.tensors().values())


class Loaded:
    """What this process has loaded."""

    def __init__(self, settings: Settings, most_bytes: int = MOST_BYTES) -> None:
        self.settings, self.most_bytes = settings, most_bytes
        self.device = prepare_torch(settings)
        self.saes: OrderedDict[tuple[str, str], SAE] = OrderedDict()

    def model(self, asked: Mapping[str, Any]) -> LanguageModel:
        """The model ``name`` with ``processing``; its files must have ``digest``, where that is given.

        Raises:
            ModelError: the model is not here, or it is another one than the release was made with.
        """
        model = load_model(ModelConfig(asked["name"], asked["processing"]), self.device)
        wanted = asked.get("digest")
        if wanted and model.files.digest != wanted:
            raise ModelError(
                f"model {model.name!r} on this machine has other weights than the one that the release was "
                "made with; live calls need the same files"
            )
        return model

    def sae(self, asked: Mapping[str, Any]) -> SAE:
        """The SAE ``name`` whose tensors have ``digest``.

        Raises:
            SAEError: no SAE of that name, or none with these tensors, is on this machine.
        """
        key = (str(asked["name"]), str(asked["digest"]))
        if key not in self.saes:
            sae = _find(self.settings, *key).to(self.device)
            self._make_room(size_of(sae))
            self.saes[key] = sae
        self.saes.move_to_end(key)
        return self.saes[key]

    def _make_room(self, needed: int) -> None:
        kept = sum(map(size_of, self.saes.values()))
        while self.saes and kept + needed > self.most_bytes:
            kept -= size_of(self.saes.popitem(last=False)[1])


def _find(settings: Settings, name: str, digest: str) -> SAE:
    found = False
    for folder in _folders(settings, name):
        found = True
        sae = load_sae(folder)
        if sae.digest() == digest:
            return sae
    if found:
        raise SAEError(f"the weights of SAE {name!r} on this machine are not those of the release")
    raise SAEError(f"the weights of SAE {name!r} are not on this machine, so nothing can be computed with it")


def _folders(settings: Settings, name: str) -> Iterator[Path]:
    """Folders that may hold the SAE: the library's, then those of training steps, the latest first."""
    imported = folder_of(settings.home, name)
    if (imported / CONFIG).is_file():
        yield imported
    bring_trained(settings, name)
    steps = [path.parent for path in settings.steps.glob(f"*/*/{CONFIG}") if path.parts[-3][0] != "."]
    for folder in sorted(steps, key=lambda f: (-f.parent.stat().st_mtime_ns, str(f))):
        if name_in(folder) == name:
            yield folder


_KEPT: list[Loaded] = []


def loaded() -> Loaded:
    """What this process has loaded; the same object at every call."""
    if not _KEPT:
        _KEPT.append(Loaded(load_settings()))
    return _KEPT[0]
