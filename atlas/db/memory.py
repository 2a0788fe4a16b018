"""How much memory this process has held: since it began or, on Linux, since it was last asked to forget."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def forget_peak() -> None:
    """Begin to measure the peak anew, where the system can (proc(5), clear_refs)."""
    with suppress(OSError):
        _FORGET.write_text(_RESET_PEAK, encoding="ascii")


def peak_rss_mb() -> float:
    """The most memory this process has held, in MB (10^6 bytes): since ``forget_peak``, if that works here.

    >>> forget_peak()
    >>> peak_rss_mb() > 1
    True
    """
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
