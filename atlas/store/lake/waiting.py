"""A lock between the processes of one machine that waits for its turn."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atlas.store.atomic import disk_errors


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` for the block, waiting for it; it ends with the process."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
