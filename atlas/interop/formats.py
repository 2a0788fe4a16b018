"""The registry: every format, how it is found in a tree of files, read, and written."""

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from atlas.errors import SAEError, one_of
from atlas.interop import dictionary_learning, kissane, openmoss, openmoss_old, saelens, sparsify
from atlas.interop.foreign import Foreign, Given, Place, to_sae
from atlas.interop.hooks import model_called
from atlas.sae.files import load_sae
from atlas.sae.model import SAE
from atlas.sites import Site


class Format(NamedTuple):
    """One format. ``allows`` says why an SAE cannot be written in it; None: it can."""

    name: str
    what: str
    places: Callable[[Collection[str]], list[Place]]
    read: Callable[[Path], Foreign]
    write: Callable[[SAE, Path], None] | None = None
    allows: Callable[[SAE], str | None] | None = None


FORMATS = (
    Format(
        "saelens",
        "cfg.json + sae_weights.safetensors",
        saelens.places,
        saelens.read,
        saelens.write,
        saelens.allows,
    ),
    Format("kissane", "NAME.pt + NAME_cfg.json", kissane.places, kissane.read),
    Format(
        "sparsify",
        "cfg.json + sae.safetensors",
        sparsify.places,
        sparsify.read,
        sparsify.write,
        sparsify.allows,
    ),
    Format(
        "dictionary_learning",
        "config.json + ae.pt",
        dictionary_learning.places,
        dictionary_learning.read,
        dictionary_learning.write,
        dictionary_learning.allows,
    ),
    Format(
        "openmoss",
        "config.json + sae_weights.safetensors",
        openmoss.places,
        openmoss.read,
        openmoss.write,
        openmoss.allows,
    ),
    Format("openmoss-old", "hyperparams.json + weights", openmoss_old.places, openmoss_old.read),
)
BY_NAME = {format_.name: format_ for format_ in FORMATS}
WRITABLE = tuple(format_.name for format_ in FORMATS if format_.write is not None)


class Found(NamedTuple):
    """An SAE in a tree of files, not read yet."""

    format: Format
    place: Place

    def under(self, root: Path) -> Path:
        """Its path below the tree's root."""
        return root / self.place.at


def find(names: Collection[str], only: str | None = None) -> list[Found]:
    """The SAEs of a tree of relative file names, by where they lie; of one format if it is named.

    >>> [(f.format.name, f.place.at) for f in find({"a/cfg.json", "a/sae.safetensors", "b.txt"})]
    [('sparsify', 'a')]
    """
    if only is not None:
        one_of("format", only, BY_NAME)
    names = frozenset(names)
    found = [
        Found(format_, place)
        for format_ in FORMATS
        if only in (None, format_.name)
        for place in format_.places(names)
    ]
    return sorted(found, key=lambda f: (_numbers(f.place.at), f.format.name))


def _numbers(text: str) -> list[tuple[int, str]]:
    """A key that puts L2 before L10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def tree(path: Path) -> tuple[Path, set[str]]:
    """The root folder of what the user named and the files below it; a file stands for its folder.

    Raises:
        SAEError: there is nothing at the path.
    """
    try:
        if path.is_file():
            near = {p.name for p in path.parent.iterdir() if p.is_file()}
            return path.parent, near
        if path.is_dir():
            return path, {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    except OSError as error:
        raise SAEError(f"{str(path)[:200]!r} cannot be read: {error.strerror}") from None
    raise SAEError(f"there is no file or folder {str(path)!r}; a hub repository is written hf:OWNER/REPO")


def find_at(path: Path, only: str | None = None) -> tuple[Path, list[Found]]:
    """The root and the SAEs of a folder, or the one SAE that a file belongs to.

    Raises:
        SAEError: there is nothing there, or no SAE of a known format.
    """
    path = path.absolute()
    root, names = tree(path)
    found = find(names, only)
    if path.is_file():
        found = [f for f in found if path.name in f.place.files]
    if not found:
        looked = ", ".join(f"{f.name} ({f.what})" for f in FORMATS if only in (None, f.name))
        raise SAEError(f"{str(path)!r} holds no SAE of a known format; looked for {looked}")
    return root, found


def read(found: Found, root: Path, given: Given, source: str) -> SAE:
    """Read one SAE; ``source`` is kept with it and says where it came from.

    Raises:
        SAEError: whatever is wrong with its files, in one line.
    """
    path = found.under(root)
    if found.format.name == "saelens" and saelens.is_ours(path):
        return _as_given(load_sae(path), given)
    return to_sae(f"{found.format.name} SAE {str(path)!r}", found.format.read(path), given, source)


def _as_given(sae: SAE, given: Given) -> SAE:
    """An SAE that Head Atlas wrote, with what the user says put over it."""
    info = sae.info
    model, rest = info.model, info.name.split("/", 1)[-1]
    if given.model is not None:
        model = model_called(given.model)
    name = given.name or (info.name if given.model is None else rest)
    changed = replace(
        info,
        model=model,
        site=Site.parse(given.site) if given.site else info.site,
        processing=given.processing or info.processing,
        name=name if "/" in name else f"{model}/{name}",
    )
    return replace(sae, info=changed)
