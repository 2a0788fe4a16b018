"""Releases by settings: files in ``$ATLAS_HOME/releases``, or those of a lake (``ATLAS_LAKE_URL``).

The same functions as in ``atlas.store.release``, which they call where no lake is set.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from atlas.settings import Settings
from atlas.store import release
from atlas.store.release import ReleaseInfo


def current(
    settings: Settings, name: str | None = None, *, wait: bool = True, fresh: bool = False
) -> ReleaseInfo:
    """The current version of ``name``, or of the release published last; its file is on this disk.

    With a lake it may be up to ``ATLAS_LAKE_SECONDS`` out of date; with ``fresh`` it is not, and the file may
    be elsewhere. With ``wait`` False an older copy may be given while the newest is copied.
    """
    if settings.lake_url is None:
        return release.current(settings.releases, name)
    from atlas.store.lake.releases import releases_of

    lake = releases_of(settings)
    return lake.newest(name) if fresh else lake.current(name, wait=wait)


def list_releases(settings: Settings) -> list[ReleaseInfo]:
    """Every version of every release, by name, then version."""
    if settings.lake_url is None:
        return release.list_releases(settings.releases)
    from atlas.store.lake.releases import releases_of

    return releases_of(settings).all()


def names(settings: Settings) -> list[str]:
    """Names of the releases that have a current version."""
    if settings.lake_url is None:
        return sorted(p.parent.name for p in settings.releases.glob(f"*/{release.CURRENT}"))
    from atlas.store.lake.releases import releases_of

    return releases_of(settings).names()


def publish(
    settings: Settings, name: str, tables: Mapping[str, Sequence[Path]], provenance: Mapping[str, str]
) -> ReleaseInfo:
    """Build the next version of release ``name`` and make it current (see ``release.publish``)."""
    if settings.lake_url is None:
        return release.publish(settings.releases, name, tables, provenance)
    from atlas.store.lake.releases import releases_of

    return releases_of(settings).publish(name, tables, provenance)


def remove(settings: Settings, label: str, *, force: bool = False) -> ReleaseInfo:
    """Remove ``NAME@VERSION``; the current version only with ``force`` (see ``release.remove``)."""
    if settings.lake_url is None:
        return release.remove(settings.releases, label, force=force)
    from atlas.store.lake.releases import releases_of

    return releases_of(settings).remove(label, force=force)


def place(settings: Settings) -> str:
    """Where releases lie, as it may be shown."""
    if settings.lake_url is None:
        return str(settings.releases)
    from atlas.store.lake.errors import shown_url

    return shown_url(settings.lake_url)
