"""The lake as a step uses it: inputs copied here and held, its state kept elsewhere, its output published."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from atlas.settings import Settings
from atlas.store.atomic import discard, sweep_for
from atlas.store.lake.cache import Cache, Held
from atlas.store.lake.folders import Folders
from atlas.store.lake.opening import lake_url_of
from atlas.store.lake.remote import Remote
from atlas.store.lake.shelf import Shelf
from atlas.store.lake.states import States
from atlas.store.lake.waiting import exclusive

Whole = Callable[[Path], bool]
"""Whether a folder of this disk has all its files."""


class Lake:
    """Everything in one lake, and the copies of it in one home."""

    def __init__(self, settings: Settings) -> None:
        self.remote = Remote(*lake_url_of(settings))
        self.steps, self.states = Folders(self.remote, "steps"), States(self.remote)
        self.saes, self.shelf = Folders(self.remote, "saes"), Shelf(self.remote)
        self.cache = Cache(settings.local, int(settings.lake_cache_gb * 1e9))
        self.seconds = settings.lake_seconds

    def copy(self, path: Path, is_whole: Whole, held: Held | None = None) -> bool:
        """Bring a step's output to this disk, where it lies under its own name; False if the lake has none.

        A whole copy that is there is taken. ``held`` keeps it from being taken away.
        """
        if held is not None:
            held.add(path)
        if is_whole(path):
            self.cache.touch(path)
            return True
        with exclusive(path.with_name(f".copying-{path.name}")):
            if is_whole(path):
                return True
            inventory = self.steps.find(path.name)
            if inventory is None:
                return False
            sweep_for(path)
            discard(path)
            self.cache.make_room(inventory.size)
            self.steps.fetch(path.name, inventory, path)
            self.cache.add(path, inventory.size)
        return True

    def publish(self, path: Path, is_whole: Whole, *, replace: bool = False) -> None:
        """Make a finished output of this disk the lake's; if another is there already, take that one."""
        inventory, same = self.steps.publish(path.name, path, replace=replace)
        if same:
            self.cache.add(path, inventory.size)
        else:
            discard(path)
            self.copy(path, is_whole)
        self.cache.make_room(0)

    @contextmanager
    def working(self, name: str, scratch: Path) -> Iterator[Held]:
        """While a step works: copies that it asks for are held, what it saves on its way is uploaded."""
        with ExitStack() as stack:
            held = stack.enter_context(self.cache.holding())
            stack.enter_context(self.states.following(name, scratch, self.seconds))
            yield held

    def orphans(self, before: float) -> dict[str, int]:
        """Keys and bytes of what dead writers left in the lake before a time (seconds since 1970)."""
        return self.steps.orphans(before) | self.saes.orphans(before) | self.shelf.orphans(before)

    def delete(self, keys: list[str]) -> None:
        """Remove objects by key."""
        self.remote.delete(keys)


def lake_of(settings: Settings) -> Lake | None:
    """The lake of these settings; None where they set none, and outputs are folders of ``ATLAS_HOME``."""
    return None if settings.lake_url is None else Lake(settings)
