"""Our SAEs in other people's formats."""

from collections.abc import Iterator
from pathlib import Path

from atlas.errors import SAEError, one_of
from atlas.interop.formats import BY_NAME, WRITABLE
from atlas.sae.files import CONFIG, load_sae
from atlas.sae.library import find_imported, imported_names
from atlas.sae.library_lake import bring_imported, bring_trained
from atlas.sae.model import SAE
from atlas.settings import Settings
from atlas.store.atomic import atomic_dir


def find_sae(settings: Settings, name: str) -> SAE:
    """The SAE of that name: from the library, or the newest that a build's training step left.

    Raises:
        SAEError: neither has one of that name, which lists what there is.
    """
    bring_imported(settings, [name])
    if name in imported_names(settings.home):
        return load_sae(find_imported(settings.home, name).path)
    there = set(imported_names(settings.home))
    bring_trained(settings, name)
    for folder in _newest_first(settings.steps):
        found = name_in(folder)
        if found == name:
            return load_sae(folder)
        if found is not None:
            there.add(found)
    listed = ", ".join(sorted(there)[:40]) or "none yet"
    raise SAEError(f"no SAE is called {name[:120]!r}, neither imported nor trained here; there are: {listed}")


def _newest_first(steps: Path) -> Iterator[Path]:
    """Folders of trained SAEs, those of the latest step first."""
    folders = [path.parent for path in steps.glob(f"*/*/{CONFIG}") if not path.parts[-3].startswith(".")]
    yield from sorted(folders, key=lambda f: (-f.parent.stat().st_mtime_ns, str(f)))


def name_in(folder: Path) -> str | None:
    """The name of the SAE in a folder of ours, read from its config alone; None if it holds none."""
    import json

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
        return str(config["metadata"]["head_atlas"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def export(sae: SAE, folder: Path, format_name: str) -> None:
    """Write the SAE into a new folder in another format; whole or not at all.

    Raises:
        SAEError: the format is not known or cannot say what the SAE is.
        ConflictError: the folder is already there.
    """
    one_of("format", format_name, WRITABLE, SAEError)
    format_ = BY_NAME[format_name]
    if format_.write is None or format_.allows is None:
        raise SAEError(f"{format_name} is only read; written are {', '.join(WRITABLE)}")
    why = format_.allows(sae)
    if why is not None:
        raise SAEError(f"{format_name} cannot say what SAE {sae.info.name!r} is: {why}; saelens can")
    with atomic_dir(folder.absolute()) as work:
        format_.write(sae, work)
