"""Who is acting, and what they may do: asked by the functions that write, not by the buttons.

A process has one source that tells who is acting now. On the command line it is the user of the operating
system, who may do everything: who can run commands can also change the files. The app puts a source of its
own in this place, which looks up the login of the browser session at every question, so that a login that
ended, or a role that changed, counts at the very next write.
"""

import getpass
import os
from collections.abc import Callable
from dataclasses import dataclass

from atlas.errors import AccessError, one_of

ROLES = ("reader", "annotator", "admin")
"""Each may do what those before it may."""
ACTIONS = {
    "read": "reader",
    "annotate": "annotator",
    "adjudicate": "admin",
    "jobs": "admin",
    "imports": "admin",
    "restore": "admin",
    "users": "admin",
}
"""Each action and the least role that may do it."""


@dataclass(frozen=True)
class Actor:
    """Somebody who asks for something to be done."""

    name: str
    role: str
    known: bool = False
    """Whether the name was proved by a login; then every write carries this name and no other."""


def may(role: str, action: str) -> bool:
    """Whether a role allows an action; ConfigError for one that does not exist.

    >>> may("annotator", "annotate"), may("annotator", "jobs"), may("admin", "jobs")
    (True, False, True)
    """
    one_of("role", role, ROLES)
    one_of("action", action, ACTIONS)
    return ROLES.index(role) >= ROLES.index(ACTIONS[action])


def os_user() -> Actor:
    """The user of the operating system, under the name that ``ATLAS_ANNOTATOR`` gives, as an admin."""
    name = os.environ.get("ATLAS_ANNOTATOR") or os.environ.get("USER")
    if not name:
        try:
            name = getpass.getuser()
        except (KeyError, OSError):  # a container's user without an entry in /etc/passwd
            name = f"uid-{os.getuid()}"
    return Actor(name, "admin")


class _Source:
    """Tells who is acting in this process; replaced as a whole by :func:`use_source`."""

    actor: Callable[[], Actor | None] = staticmethod(os_user)


def use_source(source: Callable[[], Actor | None]) -> None:
    """Let ``source`` tell, from now on, who is acting in this process; None = nobody is logged in."""
    _Source.actor = staticmethod(source)


def actor() -> Actor:
    """Who is acting now; AccessError when nobody is logged in."""
    found = _Source.actor()
    if found is None:
        raise AccessError("nobody is logged in here, or the login has ended; log in again")
    return found


def demand(action: str, *, annotator: str | None = None) -> Actor:
    """Return who is acting, or raise AccessError when they may not do this.

    ``annotator`` is the name that a write is to carry: with a login it must be the login's own.

    >>> demand("annotate", annotator="anybody").role
    'admin'
    """
    who = actor()
    if not may(who.role, action):
        raise AccessError(
            f"{who.name} is {who.role} and may not do this ({action}); "
            f"allowed for: {', '.join(r for r in ROLES if may(r, action))}"
        )
    if annotator is not None and who.known and annotator != who.name:
        raise AccessError(f"{who.name} cannot write as {annotator!r}; allowed: {who.name!r}")
    return who
