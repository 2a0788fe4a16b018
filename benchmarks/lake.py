"""How quick is a lake: megabytes per second up and down, and milliseconds per question?

    python benchmarks/lake.py [--mb 256] [--url s3://BUCKET/PREFIX]

Without ``--url`` it measures a folder and the S3 server of the tests on loopback (moto, Python, one request
at a time: a floor, not what a real store gives). Up and down include SHA-256 of every byte and the check of
what came; behind them, megabytes per second of this process's own processor time, which is what limits a fast
store. Then the questions that a build and a reader ask.
"""

import argparse
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from atlas.store.lake.folders import Folders
from atlas.store.lake.remote import Remote
from atlas.store.lake.shelf import Shelf, Version
from tests.s3_server import S3Server

SIZES = {"1 file": 1, "64 files": 64, "1,000 files": 1000}
ASKED = 20


def make(folder: Path, total: int, n: int) -> None:
    """n files of random bytes, together ``total``."""
    folder.mkdir(parents=True)
    for number in range(n):
        (folder / f"{number:04d}").write_bytes(os.urandom(total // n))


def seconds(work: Callable[[], object]) -> float:
    return both(work)[0]


def both(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of this process's processor time."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def throughput(remote: Remote, work: Path, total: int) -> None:
    steps = Folders(remote, "steps")
    for what, n in SIZES.items():
        size = total if n < 1000 else total // 16  # small files cost requests, not bytes
        folder, copy, name = work / f"made-{n}", work / f"copy-{n}", f"bench-{n}"
        make(folder, size, n)
        up = both(lambda f=folder, m=name: steps.publish(m, f))
        inventory = steps.find(name)
        assert inventory is not None
        down = both(lambda i=inventory, c=copy, m=name: steps.fetch(m, i, c))
        print(f"  {what:>12} of {size / n / 1e6:8.3f} MB", end="")
        for way, (clock, cpu) in (("up", up), ("down", down)):
            print(f"   {way} {size / clock / 1e6:7.1f} MB/s ({size / cpu / 1e6:6.1f})", end="")
        print(flush=True)
        shutil.rmtree(folder)
        shutil.rmtree(copy)


def latency(remote: Remote) -> None:
    steps, shelf = Folders(remote, "steps"), Shelf(remote)
    version = Version(1, "bench-v0001.duckdb", "d", "2026-01-01", 0, "s", 0)
    shelf.change("bench", lambda index: index.with_version(version))
    asked: dict[str, Callable[[int], object]] = {
        "is an output there (it is)": lambda _: steps.is_whole("bench-1"),
        "is an output there (it is not)": lambda _: steps.is_whole("none"),
        "which release is current": lambda _: shelf.index("bench"),
        "make another one current": lambda i: shelf.change(
            "bench", lambda index: index.with_version(replace(version, version=i + 2))
        ),
    }
    for what, ask in asked.items():
        total = seconds(lambda a=ask: [a(i) for i in range(ASKED)])
        print(f"  {what:<32} {1000 * total / ASKED:7.1f} ms", flush=True)


def measure(url: str, work: Path, total: int) -> None:
    remote = Remote(url)
    print(remote.url, flush=True)
    throughput(remote, work, total)
    latency(remote)
    for n in SIZES.values():
        remote.remove(f"steps/bench-{n}/")
    remote.remove("releases/bench/")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=256, help="megabytes per case")
    parser.add_argument("--url", help="a lake to measure; its steps/bench-* and releases/bench are removed")
    arguments = parser.parse_args()
    total = arguments.mb * 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sha = seconds(lambda: hashlib.sha256(bytes(total)))
        print(f"SHA-256 alone: {total / sha / 1e6:.0f} MB/s", flush=True)
        if arguments.url:
            measure(arguments.url, work, total)
            return
        measure(str(work / "lake"), work, total)
        server = S3Server()
        server.start()
        try:
            os.environ.update(server.environment())
            measure(server.bucket(), work, total)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
