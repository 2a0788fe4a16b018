"""Every error that Head Atlas raises on purpose, in one family.

A message names the value that was wrong and what was allowed. The command line prints it as one
line and exits with code 2; nothing else is caught there, so a traceback always means a bug.
"""

from collections.abc import Iterable


class AtlasError(Exception):
    """Something the user can act on; the parent of every deliberate error."""


class ConfigError(AtlasError):
    """A configuration, flag or setting has an unknown key or a value that is not allowed."""


class ModelError(AtlasError):
    """A language model cannot be found, read, or lacks what was asked of it."""


class CorpusError(AtlasError):
    """A text source cannot be found or read, or holds too little text."""


class SAEError(AtlasError):
    """An SAE file or its tensors are missing, damaged, or of the wrong shape."""


class StoreError(AtlasError):
    """A table, a release or the disk beneath them cannot be read or written."""


class QueryError(AtlasError):
    """A user's SQL was refused, failed, or ran past its bounds."""


class DatabaseError(AtlasError):
    """The run and annotation database cannot be reached or is not at the schema of this version."""


class AccessError(AtlasError):
    """Nobody is logged in, or the one who is may not do this."""


class ConflictError(AtlasError):
    """Somebody else holds or has changed what this write would replace."""


class Cancelled(AtlasError):  # noqa: N818 - an outcome more than an error
    """The user asked the work to stop; what was finished is kept."""


class HandedBack(Cancelled):
    """The process was asked to end: the work is somebody else's now, who goes on from what was kept."""


def one_of(
    what: str, value: object, allowed: Iterable[object], error: type[AtlasError] = ConfigError
) -> None:
    """Raise ``error`` unless ``value`` is among ``allowed``, naming both.

    >>> one_of("site", "z", ["z", "q"])
    >>> one_of("site", "w", ["z", "q"])
    Traceback (most recent call last):
    ...
    atlas.errors.ConfigError: site 'w' is not known; allowed: z, q
    """
    options = list(allowed)
    if value not in options:
        raise error(f"{what} {value!r} is not known; allowed: {', '.join(map(str, options))}")
