"""How torch runs on this machine: device, threads, memory."""

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

from atlas.errors import ConfigError
from atlas.settings import Settings

T = TypeVar("T")
R = TypeVar("R")

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX, _ONE_GB = -3, -1, -8, 1 << 30


def prepare_torch(settings: Settings) -> torch.device:
    """Set threads and the allocator, and return the device that ``ATLAS_DEVICE`` names.

    glibc gives every tensor above 32 MB back to the system and asks for it anew, page by page. Keeping
    freed memory makes a forward pass of a small model about twice as fast on a CPU.

    Raises:
        ConfigError: the device is unknown to torch or not on this machine.
    """
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_THRESHOLD, _ONE_GB)
            libc.mallopt(_M_TRIM_THRESHOLD, _ONE_GB)
            # Other threads' own arenas would give their memory back all the same.
            libc.mallopt(_M_ARENA_MAX, 1)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return _device(settings.device)


@contextmanager
def lanes() -> Iterator[ThreadPoolExecutor]:
    """A pool of as many threads as torch uses, in each of which torch uses one.

    For work that falls into independent parts (SAEs, ranges of features): no part waits for the others at
    every product, and what a part computes does not depend on the number of threads. When the block is left
    by an exception, parts that have not begun are forgotten and those that have are waited for.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        pool.shutdown()
        torch.set_num_threads(threads)


def in_lanes(work: Callable[[T], R], items: Iterable[T], device: torch.device) -> list[R]:
    """What ``work`` gives for each item; on a CPU side by side, on a GPU one after the other."""
    if device.type != "cpu":
        return [work(item) for item in items]
    with lanes() as pool:
        return list(pool.map(work, items))


class _Batches:
    """How often the usual batch is halved in this process."""

    halvings = 0


@contextmanager
def smaller_batches(halvings: int) -> Iterator[None]:
    """In the block, passes over the text read batches of 1/2^halvings of the usual size."""
    before, _Batches.halvings = _Batches.halvings, halvings
    try:
        yield
    finally:
        _Batches.halvings = before


def batch_of(usual: int) -> int:
    """How many blocks a pass over the text reads at once, where ``usual`` is what suits most machines.

    >>> with smaller_batches(2):
    ...     batch_of(16), batch_of(2)
    (4, 1)
    """
    return max(1, usual >> _Batches.halvings)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"ATLAS_DEVICE={name!r} cannot be used; allowed: auto, cpu, cuda, cuda:N ({reason})"
        ) from None
    return device
