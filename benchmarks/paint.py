"""When does a browser show something of a page, and when the page itself?

    python benchmarks/paint.py [--home /tmp/store] [--repeats 3] [--views atlas,head]

Chromium opens each view of the app (served as ``atlas app`` serves it) twice: with nothing of the app on the
browser's disk, and again. Milliseconds from the address to the first contentful paint, to the view's heading
and to the last change of the page (until half a second passes without any), the fastest of ``--repeats``;
seconds that the page's main thread worked (``Performance.getMetrics``), and what came over the network.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

from playwright.sync_api import BrowserContext, sync_playwright
from served import Server
from views import asked

CHROMIUM = os.environ.get("ATLAS_CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
VIEWS = ("atlas", "head", "feature", "search", "overview", "sql")
_WATCH = """
window.seen = {};
new MutationObserver(() => {
    const now = performance.now();
    window.seen.last = now;
    if (!window.seen.heading && document.querySelector('.ha-title h1')) window.seen.heading = now;
}).observe(document, {subtree: true, childList: true});
"""
_DONE = "window.seen.heading && performance.now() - window.seen.last > 500"


class Shown(NamedTuple):
    """Milliseconds to the first paint, the heading and the last change; of work; kilobytes, requests."""

    paint: float
    heading: float
    last: float
    work: float
    kilobytes: float
    requests: float


def opened(context: BrowserContext, address: str) -> Shown:
    """One page, from its address to its last change."""
    page = context.new_page()
    page.add_init_script(_WATCH)
    tools = context.new_cdp_session(page)
    tools.send("Performance.enable")
    page.goto(address, wait_until="commit")
    page.wait_for_function(_DONE, timeout=60_000)
    paint, heading, last, n_bytes, n = page.evaluate(
        """() => {
            const files = performance.getEntriesByType('resource');
            return [performance.getEntriesByName('first-contentful-paint')[0].startTime, seen.heading,
                seen.last, files.reduce((sum, one) => sum + one.transferSize, 0), files.length];
        }"""
    )
    metrics = {m["name"]: m["value"] for m in tools.send("Performance.getMetrics")["metrics"]}
    page.close()
    return Shown(paint, heading, last, 1000 * metrics["TaskDuration"], n_bytes / 1000, n)


def _print(name: str, found: list[Shown]) -> None:
    best = Shown(*(min(column) for column in zip(*found, strict=True)))
    print(f"| {name} | {' | '.join(f'{value:,.0f}' for value in best)} |", flush=True)


def measure(server: Server, pages: Mapping[str, str], repeats: int) -> None:
    """Prints a row per view and state of the browser's disk."""
    columns = ("view", "first paint", "heading", "last change", "main thread", "KB", "files")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with sync_playwright() as driver:
        for name, query in pages.items():
            first, again = [], []
            for _ in range(repeats):
                with tempfile.TemporaryDirectory() as profile:
                    context = driver.chromium.launch_persistent_context(
                        profile,
                        executable_path=CHROMIUM,
                        args=FLAGS,
                        viewport={"width": 1400, "height": 1000},
                    )
                    context.new_page().goto("about:blank")
                    address = f"http://127.0.0.1:{server.port}/{name}?{query}"
                    first.append(opened(context, address))
                    again.append(opened(context, address))
                    context.close()
            _print(f"{name}, first visit", first)
            _print(f"{name}, again", again)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path("/tmp/store"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--views", default=",".join(VIEWS))
    args = parser.parse_args()
    known = asked(args.home)
    pages = {name: urlencode(known[name][0]) for name in args.views.split(",")}
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with Server(args.home) as server:
        measure(server, pages, args.repeats)


if __name__ == "__main__":
    main()
