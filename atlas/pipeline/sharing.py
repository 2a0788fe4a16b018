"""Outputs of steps between machines: nothing to do on a shared disk, copies and uploads with a lake."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from atlas.settings import Settings

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from atlas.store.lake.cache import Held
    from atlas.store.lake.lake import Lake

Whole = Callable[[Path], bool]
"""Whether a folder of this disk has all its files."""


class Shared(Protocol):
    """Where the outputs of steps are that other machines made, and where this one's go."""

    def has(self, path: Path, is_whole: Whole) -> bool:
        """Whether an output is there, whole, for everybody."""

    def bring(self, path: Path, is_whole: Whole) -> None:
        """Copy an output to its place on this disk if it is not there; nothing if it is nowhere."""

    def give(self, path: Path, is_whole: Whole, *, replace: bool = False) -> bool:
        """Make a whole output on this disk everybody's; False if it is not whole or all see it anyway."""

    def working(self, path: Path, scratch: Path) -> "AbstractContextManager[Shared]":
        """Around the making of an output: inputs stay, nobody else makes it, what it saves is shared."""


class _Disk:
    """Everybody reads the same folders."""

    def has(self, path: Path, is_whole: Whole) -> bool:
        return is_whole(path)

    def bring(self, path: Path, is_whole: Whole) -> None:
        pass

    def give(self, path: Path, is_whole: Whole, *, replace: bool = False) -> bool:  # noqa: ARG002
        return False

    @contextmanager
    def working(self, path: Path, scratch: Path) -> Iterator[Shared]:  # noqa: ARG002
        yield self


class _InLake:
    """Outputs are in the lake; folders of this disk are copies."""

    def __init__(self, settings: Settings, lake: "Lake", held: "Held | None" = None) -> None:
        self.settings, self.lake, self.held = settings, lake, held

    def has(self, path: Path, is_whole: Whole) -> bool:  # noqa: ARG002
        return self.lake.steps.is_whole(path.name)

    def bring(self, path: Path, is_whole: Whole) -> None:
        self.lake.copy(path, is_whole, self.held)

    def give(self, path: Path, is_whole: Whole, *, replace: bool = False) -> bool:
        if not is_whole(path):
            return False
        self.lake.publish(path, is_whole, replace=replace)
        return True

    @contextmanager
    def working(self, path: Path, scratch: Path) -> Iterator[Shared]:
        from atlas.db.locks import locked

        with locked(self.settings, f"step {path.name}"), self.lake.working(path.name, scratch) as held:
            yield _InLake(self.settings, self.lake, held)


NOT_SHARED: Shared = _Disk()


def shared_of(settings: Settings) -> Shared:
    """How outputs are shared by these settings."""
    if settings.lake_url is None:
        return NOT_SHARED
    from atlas.store.lake.lake import Lake

    return _InLake(settings, Lake(settings))
