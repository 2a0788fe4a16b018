"""From other people's files into the library: read, checked against the model, written as a whole."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from atlas.errors import AtlasError, ConflictError, ModelError, SAEError
from atlas.interop.foreign import Given
from atlas.interop.formats import Found, find_at, read
from atlas.lm.files import ModelFiles, bundled_models, find_model, read_shape
from atlas.sae.files import load_sae, save_sae
from atlas.sae.library import Imported, find_imported, folder_of, note_digest
from atlas.sae.model import SAE
from atlas.sites import ModelShape
from atlas.store.atomic import atomic_dir


class Outcome(NamedTuple):
    """What became of one SAE: the library's entry and whether it is new, or what was wrong."""

    at: str
    entry: Imported | None
    new: bool
    error: AtlasError | None


def import_path(home: Path, path: Path, given: Given, only: str | None = None) -> Iterator[Outcome]:
    """Import every SAE of a folder, or the one that a file belongs to.

    Raises:
        SAEError: nothing of a known format is there, or several are where one name is given.
    """
    root, found = find_at(path, only)
    one_name(given, found)
    for item in found:
        at = item.under(root)
        yield outcome(home, item, root, given, str(at), at.stem if at.is_file() else at.name)


def one_name(given: Given, found: list[Found]) -> None:
    """SAEError where one name is given for several SAEs."""
    if given.name is not None and len(found) > 1:
        places = ", ".join(item.place.at for item in found[:4])
        raise SAEError(f"--name is for one SAE, and there are {len(found)}: {places}, ...; name one of them")


def outcome(home: Path, item: Found, root: Path, given: Given, source: str, label: str) -> Outcome:
    """Read, check and keep one SAE; an error is part of the outcome, for others may follow."""
    try:
        sae = read(item, root, given, source)
        check_model(sae, given.model)
        entry, new = keep(home, sae, None if given.name else label, source)
    except AtlasError as error:
        return Outcome(item.place.at, None, new=False, error=error)
    return Outcome(item.place.at, entry, new, None)


def keep(home: Path, sae: SAE, label: str | None, source: str = "") -> tuple[Imported, bool]:
    """Write an SAE into the library; whether it is new.

    Another SAE of the same name keeps its place: this one then gets ``label`` behind its name, where one is
    given.

    Raises:
        SAEError: the name belongs to another SAE, or is no name.
    """
    names = [sae.info.name]
    if label:
        names.append(f"{sae.info.name}-{re.sub(r'[^A-Za-z0-9._-]+', '_', label)}"[:120])
    for name in names:
        named = replace(sae, info=replace(sae.info, name=name))
        path = folder_of(home, name)
        if not path.is_dir():
            try:
                with atomic_dir(path) as work:
                    save_sae(named, work)
                    note_digest(work, source)
                return find_imported(home, name), True
            except ConflictError:
                pass
        if _same(named, path):
            return find_imported(home, name), False
    raise SAEError(
        f"the library already has another SAE called {names[-1]!r}; give this one another name (--name), or "
        f"remove that one: atlas import --remove {names[-1]}"
    )


def _same(sae: SAE, path: Path) -> bool:
    """Whether the library's SAE is this one, wherever it was read from and by which version."""
    there = load_sae(path)
    alike = replace(there.info, settings="", code_version="") == replace(
        sae.info, settings="", code_version=""
    )
    return alike and there.digest() == sae.digest()


def check_model(sae: SAE, model: str | None = None) -> None:
    """Refuse an SAE that cannot belong to its model, where the model's sizes are at hand.

    Raises:
        SAEError: the layer or the head does not exist, or d_in is another.
    """
    info = sae.info
    shape = known_shape(model or info.model)
    if shape is None:
        return
    site, where = info.site, f"SAE {info.name!r}"
    if site.layer >= shape.n_layers:
        raise SAEError(
            f"{where} reads {site.name}, and {info.model} has layers 0 to {shape.n_layers - 1}"
            + (" (the last layer's resid_post is no site)" if site.kind == "resid_pre" else "")
        )
    if site.head is not None and site.head >= shape.n_heads:
        raise SAEError(f"{where} reads {site.name}, and {info.model} has heads 0 to {shape.n_heads - 1}")
    if sae.d_in != site.d_in(shape):
        raise SAEError(f"{where} has d_in {sae.d_in}, and {site.name} of {info.model} has {site.d_in(shape)}")


def known_shape(model: str) -> ModelShape | None:
    """The sizes of a model that is bundled, on this disk or in the Hugging Face cache; else None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if model in bundled_models() or Path(model).expanduser().is_dir():
            return read_shape(find_model(model))
        config = try_to_load_from_cache(model, "config.json")
        if not isinstance(config, str):
            return None
        return read_shape(ModelFiles(model, Path(config).parent, "hub", ""))
    except (ModelError, HFValidationError, OSError, RuntimeError):
        return None
