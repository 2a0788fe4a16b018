"""Who holds a lease: a process, named so that others can tell whether it is still there."""

import os
import secrets
import socket
from pathlib import Path


def _start_of(pid: int) -> str | None:
    """When a process on this machine started, in clock ticks since boot; None when it is gone or unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf8")
    except OSError:
        return None
    # The second field, the command's name, may itself hold spaces and brackets.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def new_owner() -> str:
    """A name for one holder in this process: ``host/pid/start/token``; two calls never give the same."""
    pid = os.getpid()
    return f"{socket.gethostname()[:100]}/{pid}/{_start_of(pid) or 0}/{secrets.token_hex(6)}"


def is_dead(owner: str) -> bool:
    """Whether a holder's process is certainly gone; False for one on another machine, or in doubt.

    >>> is_dead(new_owner())
    False
    >>> is_dead("elsewhere/1/0/abc")
    False
    """
    host, _, rest = owner.partition("/")
    pid, _, rest = rest.partition("/")
    start = rest.partition("/")[0]
    if host != socket.gethostname()[:100] or not pid.isdigit() or not Path("/proc/self/stat").exists():
        return False
    return _start_of(int(pid)) != start
