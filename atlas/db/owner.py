"""Who holds a lease: a process, named so that others can tell whether it is still there."""

import os
import secrets
import socket
from pathlib import Path

OWNER_LENGTH = 200


def _start_of(pid: int) -> str | None:
    """When a process on this machine started, in clock ticks since boot; None when it is gone or unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf8")
    except OSError:
        return None
    # The second field, the command's name, may itself hold spaces and brackets.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def new_owner(worker: str = "") -> str:
    """A name for one holder in this process: ``host/pid/start/token``; two calls never give the same.

    A process of a worker adds the worker's name, ``NAME@HOST``, as ``/NAME``.
    """
    pid = os.getpid()
    owner = f"{socket.gethostname()[:100]}/{pid}/{_start_of(pid) or 0}/{secrets.token_hex(6)}"
    name = worker.partition("@")[0]
    return f"{owner}/{name}"[:OWNER_LENGTH] if name else owner


def worker_of(owner: str) -> str:
    """The worker ``NAME@HOST`` that a holder belongs to; empty for a build in its own process.

    >>> worker_of(new_owner("gpu-1@box")) == f"gpu-1@{socket.gethostname()[:100]}"
    True
    >>> worker_of("box/12/99/abc")
    ''
    """
    parts = owner.split("/", 4)
    return f"{parts[4]}@{parts[0]}" if len(parts) == 5 else ""


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
