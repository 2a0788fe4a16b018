"""What a worker says of itself in the table of workers: queues, device, how many steps at once."""

import os
import shutil
import socket
import subprocess
from functools import lru_cache
from typing import Any

from atlas import __version__
from atlas.db.workers import WorkerRow, forget_worker, note_worker
from atlas.settings import Settings


@lru_cache(maxsize=1)
def _gpus() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs here, without importing torch: a worker's parent forks."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in said.splitlines() if line.strip())


def device_text(settings: Settings) -> str:
    """What this machine computes on, for people: ``cpu, 16 cores`` or ``cuda: NVIDIA H200``."""
    names = _gpus()
    if settings.device == "cpu" or (settings.device == "auto" and not names):
        cores = settings.threads or os.cpu_count() or 1
        return f"cpu, {cores} core{'s' if cores > 1 else ''}"
    wanted = "cuda" if settings.device == "auto" else settings.device
    number = wanted.partition(":")[2]
    at = int(number) if number.isdigit() else 0
    return f"{wanted}: {names[at]}" if at < len(names) else wanted


def note(settings: Settings, sender: Any) -> None:
    """Say that the worker of a Celery consumer lives."""
    row = WorkerRow(
        name=sender.hostname,
        host=socket.gethostname()[:100],
        pid=os.getpid(),
        queues=tuple(sorted(sender.app.amqp.queues.consume_from)),
        device=device_text(settings),
        concurrency=sender.controller.concurrency,
        version=__version__,
    )
    note_worker(settings, row)


def forget(settings: Settings, sender: Any) -> None:
    """Say that the worker ends; ``sender`` is Celery's controller."""
    forget_worker(settings, sender.hostname)
