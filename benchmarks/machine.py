"""What the benchmarks share: the machine in one line, its matrix-product ceiling, timing, random text."""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from atlas.corpus.tokens import TokenStoreMeta


class Seconds(NamedTuple):
    """Several runs of the same thing."""

    median: float
    best: float


class RandomText:
    """Random tokens in the shape of a token store."""

    def __init__(self, d_vocab: int, n_blocks: int, context: int = 128) -> None:
        self._tokens = np.random.default_rng(0).integers(0, d_vocab, (n_blocks, context))
        self.meta = TokenStoreMeta("random tokens", context, n_blocks, 0, "int64", 1, 0)

    def __len__(self) -> int:
        return len(self._tokens)

    def blocks(self, index: object) -> np.ndarray:
        return self._tokens[np.asarray(index)]


def timed(run: Callable[[], object], device: torch.device, repeats: int, warm: int = 1) -> Seconds:
    """Seconds of a run; the first ``warm`` runs are left out."""
    times = []
    for number in range(warm + repeats):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= warm:
            times.append(time.perf_counter() - start)
    return Seconds(median(times), min(times))


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_line(device: torch.device) -> str:
    threads = torch.get_num_threads()
    return f"machine: {processor(device)}, {threads} threads, {device}, torch {torch.__version__}"


def ceiling(
    device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, n: int = 1
) -> float:
    """The most floating-point operations per second seen in n products [a, b] x [b, c] at once."""
    a, b, c = shape
    left = torch.randn(n, a, b, device=device).to(dtype)
    right = torch.randn(n, c, b, device=device).to(dtype).transpose(1, 2)
    out = torch.empty(n, a, c, device=device, dtype=dtype)
    return 2 * n * a * b * c / timed(lambda: torch.bmm(left, right, out=out), device, 5).best
