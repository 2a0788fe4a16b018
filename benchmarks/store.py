"""A release as large as that of GPT-2's twelve attention SAEs: how long to publish, how large, how quick?

    python benchmarks/store.py [--scale 1] [--folder /tmp/store] [--keep] [--repeats 100]

Twelve whole-layer z SAEs, 344,064 features at scale 1, each with 20 top, 50 quantile, 5 random and 5
near-miss examples and every other table of such a build; the numbers are random (``store_rows.py``). Prints
the time of each stage, the bytes by table, and the latency of every query behind a view of the app: cold is
the first query of a new connection with nothing of the file in memory; new are queries that a connection
has not been asked before, with the file in the operating system's memory; warm are the same again, the
fastest of ``--tries``, and cpu their processor time. ``--release FILE`` measures a release that is already
there.
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import duckdb
import torch
from machine import processor
from store_queries import Draw, cases, cold, latency, opened, recall
from store_rows import write_reference, write_sae
from store_tables import N_LAYERS, Sae, make_sae

from atlas.store import release
from atlas.store.connection import open_release
from atlas.store.packing import stored_name
from atlas.tables import TABLES

WIDE_LAYERS = (5, 7)
WIDTH = 24_576
BLOCK = 262_136
"""Bytes of one of DuckDB's blocks that hold data."""


class Published(NamedTuple):
    path: Path
    seconds: float
    cpu_seconds: float
    peak_gb: float


def make_saes(scale: float) -> list[Sae]:
    sizes = [WIDTH * (2 if layer in WIDE_LAYERS else 1) for layer in range(N_LAYERS)]
    return [make_sae(layer, max(64, int(scale * size))) for layer, size in enumerate(sizes)]


def write_parts(folder: Path, scale: float) -> None:
    """Every part of the release, as the steps of a build leave them; says how long it took."""
    shutil.rmtree(folder, ignore_errors=True)
    saes = make_saes(scale)
    print(f"{len(saes)} SAEs, {sum(sae.d_sae for sae in saes):,} features", flush=True)
    start = time.perf_counter()
    write_reference(folder, saes)
    for sae in saes:
        write_sae(folder / sae.name.replace("/", "-"), sae)
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    print(f"parts: {time.perf_counter() - start:.1f} s, {n_bytes / 1e6:.0f} MB of Parquet", flush=True)


def publish(folder: Path, scale: float) -> Published:
    """Publish the parts; run in a process of its own, whose memory is then that of publishing."""
    parts: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((folder / "parts").rglob("*.parquet")):
        parts[path.stem].append(path)
    start, cpu = time.perf_counter(), time.process_time()
    info = release.publish(folder / "releases", "benchmark", parts, {"scale": str(scale)})
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Published(info.path, seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def table_bytes(con: duckdb.DuckDBPyConnection, names: list[str]) -> dict[str, int]:
    """Bytes of every table: a segment reaches to the next one in its block, or to the block's end."""
    segments: set[tuple[int, int, str]] = set()
    for name in names:
        stored = stored_name(TABLES[name]) if name in TABLES else name
        found = con.execute(
            "SELECT block_id, block_offset, additional_block_ids FROM pragma_storage_info(?)", [stored]
        )
        for block, offset, more in found.fetchall():
            segments.update([(block, offset, name)] if block >= 0 else [])
            segments.update((other, 0, name) for other in more or ())
    size: dict[str, int] = defaultdict(int)
    ordered = sorted(segments)
    for (block, offset, name), (other, begin, _) in pairwise([*ordered, (-1, 0, "")]):
        size[name] += (begin if other == block else BLOCK) - offset
    return size


def print_sizes(path: Path) -> None:
    con = open_release(path)
    rows = dict(con.execute("SELECT table_name, rows FROM manifest").fetchall())
    ((n_features,),) = con.execute("SELECT sum(d_sae) FROM saes").fetchall()
    sizes = table_bytes(con, list(rows))
    con.close()
    print(f"\n| table | rows | MB | bytes per row | KB per feature |\n|{'---|' * 5}")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if rows[name] > 5 * N_LAYERS:
            numbers = f"{size / 1e6:.1f} | {size / rows[name]:.1f} | {size / 1024 / n_features:.3f}"
            print(f"| {name} | {rows[name]:,} | {numbers} |")
    total = path.stat().st_size
    print(f"| the file | {sum(rows.values()):,} | {total / 1e6:.1f} | | {total / 1024 / n_features:.3f} |")


def print_latencies(path: Path, repeats: int, tries: int) -> None:
    con = open_release(path)
    asked = list(cases(Draw(con)))
    print(f"\nopening a release of which nothing is in memory: {opened(path):.0f} ms")
    first = [cold(path, case) for case in asked]
    recall(path)
    columns = ("view", "query", "cold ms", "new p50", "new p95", "warm p50", "warm p95", "cpu p50", "cpu p95")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for case, one in zip(asked, first, strict=True):
        times = " | ".join(f"{value:.1f}" for value in (one, *latency(path, case, repeats, tries)))
        print(f"| {case.view} | {case.name} | {times} |", flush=True)
    con.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/store"))
    parser.add_argument("--release", type=Path)
    parser.add_argument("--reuse", action="store_true", help="publish the parts that --keep left")
    parser.add_argument("--keep", action="store_true", help="keep the parts and the release")
    parser.add_argument("--repeats", type=int, default=60, help="arguments per query")
    parser.add_argument("--tries", type=int, default=3, help="of a warm query, of which the fastest counts")
    args = parser.parse_args()
    print(f"machine: {processor(torch.device('cpu'))}, {os.cpu_count()} cores, DuckDB {duckdb.__version__}")
    path = args.release
    if path is None:
        if not args.reuse:
            write_parts(args.folder / "parts", args.scale)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            path, seconds, cpu, peak = pool.apply(publish, (args.folder, args.scale))
        size = path.stat().st_size / 1e6
        print(f"publish: {seconds:.1f} s ({cpu:.0f} s of one core), {size:.0f} MB, peak memory {peak:.2f} GB")
    print_sizes(path)
    print_latencies(path, args.repeats, args.tries)
    if not (args.keep or args.release):
        shutil.rmtree(args.folder / "parts")
        shutil.rmtree(args.folder / "releases")


if __name__ == "__main__":
    main()
