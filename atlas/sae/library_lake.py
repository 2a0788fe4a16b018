"""The library of imported SAEs between machines: what one imports all find (``ATLAS_LAKE_URL``).

The lake's is the one that counts. Copies in ``$ATLAS_HOME/saes`` stay, like what was imported without a lake.
No torch here.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from atlas.errors import ConflictError, SAEError
from atlas.sae.library import (
    CONFIG,
    WEIGHTS,
    folder_digest,
    folder_of,
    imported_names,
    note_digest,
    noted,
)
from atlas.settings import Settings
from atlas.store.atomic import discard

if TYPE_CHECKING:
    from atlas.store.lake.folders import Folders, Inventory

_WITH_SAES = ("train", "prune", "finetune", "imports")
"""Kinds of steps whose outputs hold SAEs."""


def digest_of_inventory(inventory: "Inventory") -> str:
    """The digest that ``folder_digest`` gives of the files of an inventory; SAEError if it is no SAE.

    >>> from atlas.store.lake.folders import Inventory
    >>> one = Inventory("a", {"cfg.json": (1, "00" * 32), "sae_weights.safetensors": (1, "00" * 32)})
    >>> digest_of_inventory(one) == hashlib.sha256(bytes(64)).hexdigest()
    True
    """
    total = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        if name not in inventory.files:
            raise SAEError(f"an imported SAE in the lake has no {name}; import it again")
        total.update(bytes.fromhex(inventory.files[name][1]))
    return total.hexdigest()


def share_imported(settings: Settings, name: str) -> None:
    """Give an SAE of this machine's library to the lake; nothing without a lake.

    Raises SAEError if the lake has another SAE of that name.
    """
    if settings.lake_url is None:
        return
    from atlas.store.lake.lake import Lake

    path = folder_of(settings.home, name)
    there, _ = Lake(settings).saes.publish(path.name, path)
    if digest_of_inventory(there) != folder_digest(path):
        raise SAEError(
            f"the lake already has another SAE called {name!r}; give this one a --name, or remove that one: "
            f"atlas import --remove {name}"
        )


def withdraw_imported(settings: Settings, name: str) -> bool:
    """Remove an SAE from the lake's library; whether it was there."""
    if settings.lake_url is None:
        return False
    from atlas.store.lake.lake import Lake

    saes, folder = Lake(settings).saes, folder_of(settings.home, name).name
    if saes.find(folder) is None:
        return False
    saes.remove(folder)
    return True


def bring_imported(settings: Settings, wanted: Sequence[str] = ("*",)) -> None:
    """Copy the SAEs of the lake's library whose names match (``*``) into this machine's, where they differ.

    One that only this machine has is given to the lake, so that a build finds it everywhere. Nothing without
    a lake.
    """
    if settings.lake_url is None or not wanted:
        return
    from atlas.store.lake.lake import Lake

    lake = Lake(settings)
    there = {folder.replace("+", "/") for folder in lake.saes.names()}
    for name in sorted(there | set(imported_names(settings.home))):
        if not any(fnmatchcase(name, pattern) for pattern in wanted):
            continue
        path = folder_of(settings.home, name)
        inventory = lake.saes.find(path.name) if name in there else None
        if inventory is None:
            lake.saes.publish(path.name, path)
        elif not path.is_dir() or folder_digest(path) != digest_of_inventory(inventory):
            discard(path)
            try:
                lake.saes.fetch(path.name, inventory, path)
            except ConflictError:  # another process of this machine brought it meanwhile
                continue
            note_digest(path, str(noted(path).get("source", "")))


def bring_trained(settings: Settings, name: str) -> None:
    """Copy here the outputs of the lake that hold a trained, pruned or finetuned SAE of that name.

    They then lie among the steps of this machine, where SAEs are looked for. Nothing without a lake.
    """
    if settings.lake_url is None:
        return
    from atlas.store.lake.lake import Lake

    lake = Lake(settings)
    for folder in lake.steps.names():
        path = settings.steps / folder
        if folder.split("-")[0] not in _WITH_SAES or path.is_dir():
            continue
        inventory = lake.steps.find(folder)
        if inventory is not None and name in _names_in(lake.steps, folder, inventory):
            lake.copy(path, Path.is_dir)


def _names_in(steps: "Folders", folder: str, inventory: "Inventory") -> set[str]:
    """Names of the SAEs in an output of the lake, from their configs alone."""
    found = set()
    for file in inventory.files:
        if not file.endswith(f"/{CONFIG}"):
            continue
        content = steps.remote.read(f"{steps.prefix}/{folder}/{inventory.attempt}/{file}")
        with suppress(ValueError, KeyError, TypeError):
            found.add(str(json.loads(content or b"")["metadata"]["head_atlas"]["name"]))
    return found
