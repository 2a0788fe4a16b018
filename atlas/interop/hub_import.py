"""Importing from the hub: list, download what is missing, keep each SAE as soon as it is whole."""

from collections.abc import Iterator
from pathlib import Path

from atlas.errors import SAEError
from atlas.interop.foreign import Given
from atlas.interop.formats import Found, find
from atlas.interop.hub import HubFile, HubFolder, Progress, cached, download, list_files, missing_bytes
from atlas.interop.importing import Outcome, one_name, outcome
from atlas.sae.library import Imported, find_imported, imported_names
from atlas.store.atomic import discard, lock

KISSANE_GPT2 = HubFolder("ckkissane/attn-saes-gpt2-small-all-layers", "")
"""The 12 published attention SAEs of GPT-2 small, one for z of each layer."""


class HubImport:
    """The SAEs of a hub folder, listed once; ``total_bytes`` is what is still to be downloaded.

    Raises:
        SAEError: the hub cannot be reached, or what is there is of no known format.
    """

    def __init__(self, home: Path, place: HubFolder, only: str | None = None) -> None:
        self.home, self.place = home, place
        self.downloads = home / "downloads" / "+".join(place.name.removeprefix("hf:").split("/"))
        self.files = list_files(place)
        self.found = find(self.files, only)
        if not self.found:
            raise SAEError(f"{place.name} holds no SAE of a known format among its {len(self.files)} files")
        self.there = {entry.source: entry for entry in _readable(home)}
        self.cached = {name: cached(place.repo, file) for name, file in self._missing().items()}
        self.total_bytes = sum(
            missing_bytes(file, self.downloads / name)
            for name, file in self._missing().items()
            if self.cached[name] is None
        )

    def run(self, given: Given, progress: Progress) -> Iterator[Outcome]:
        """Import them one after another; whatever stops it, those before stay.

        Raises:
            SAEError: the hub stopped answering, or one name is given for several SAEs.
            ConflictError: another process imports from the same place right now.
        """
        one_name(given, self.found)
        with lock(self.downloads.with_name(f".{self.downloads.name}.lock")):
            for item in self.found:
                source = self._source(item)
                if source in self.there and given == Given():
                    yield Outcome(item.place.at, self.there[source], new=False, error=None)
                    continue
                for name, file in self._wanted(item).items():
                    self._bring(name, file, progress)
                label = Path(item.place.at).stem or self.place.repo.split("/")[-1]
                yield outcome(self.home, item, self.downloads, given, source, label)
                for name in item.place.files:
                    discard(self.downloads / name)
            discard(self.downloads)

    def _wanted(self, item: Found) -> dict[str, HubFile]:
        return {name: self.files[name] for name in item.place.files}

    def _missing(self) -> dict[str, HubFile]:
        """Files of the SAEs that the library does not have."""
        items = (item for item in self.found if self._source(item) not in self.there)
        return {name: file for item in items for name, file in self._wanted(item).items()}

    def _source(self, item: Found) -> str:
        """Names an SAE with the content of its files, so that a changed one is another."""
        content = "+".join(file.digest[:12] for file in self._wanted(item).values())
        return f"{self.place.name}/{item.place.at}@{content}"

    def _bring(self, name: str, file: HubFile, progress: Progress) -> None:
        target, ready = self.downloads / name, self.cached.get(name)
        if target.exists():
            return
        if ready is None:
            download(self.place.repo, file, target, progress)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(ready.resolve())


def _readable(home: Path) -> Iterator[Imported]:
    for name in imported_names(home):
        try:
            yield find_imported(home, name)
        except SAEError:
            continue
