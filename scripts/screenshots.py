"""Pictures of every view of the current release, for the README and for looking at the app.

Starts the app on a free port, drives the system's Chromium, and writes PNG files. Run it as

    python scripts/screenshots.py --out docs/img                  # what the repository keeps
    python scripts/screenshots.py --out /some/folder --all        # light and dark, 1400 and 800 px
"""

import argparse
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from atlas.cli.app import streamlit_command

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
QUERY = "SELECT+sae,+l0,+variance_explained,+ce_recovered,+alive+FROM+sae_summary+ORDER+BY+layer"
TRACED = urlencode(
    {"text": "import numpy as np", "sae": "docs-12l/L05.z.topk-768", "feature": 229, "position": 4}
)
VIEWS = {
    "overview": ("overview", "canvas", 1250),
    "atlas": ("atlas?colour=induction", ".cell", 900),
    "atlas-progress": ("atlas", ".cell", 900),
    "head": ("head?head={head}", ".card", 1500),
    "feature": ("feature{feature}", ".row", 2000),
    "search": ("search?by=at&q=return&range=density:..0.05", ".group", 900),
    "compare": ("compare?one=L5H1&other=L5H6", ".group", 1100),
    "try": ("try?text=def+read(path):%0A++++return+path.read_text()", ".group", 1000),
    "sql": (
        f"sql?q={QUERY}",
        "canvas",
        950,
    ),
    "training": ("training", ".vega-embed", 1500),
    "jobs": ("jobs", "h1", 700),
    "queue": ("queue", "h1", 900),
    "survey": ("survey", "h1", 620),
    "induction": ("induction", ".vega-embed", 1500),
    "tasks": ("tasks", ".vega-embed", 1000),
    "circuit": (f"circuit?{TRACED}", ".ha-tree", 1100),
    "qk": ("qk", ".vega-embed", 1500),
    "ioi": ("ioi", ".vega-embed", 1300),
    "agreement": ("agreement", "canvas", 1300),
}
ON_DEMAND = ("qk", "ioi", "agreement")
"""Views of what not every release has: q and k SAEs, what `atlas ioi` makes, finished notes of two people."""
WAIT_MS = 120_000


@contextmanager
def served(port: int) -> Iterator[str]:
    """The app on a port of this machine, until the block ends."""
    with tempfile.TemporaryFile() as log:
        command = streamlit_command(port, "127.0.0.1")
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            for _ in range(150):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1).read()
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def settle(page: Page, selector: str) -> None:
    """Wait until the view is drawn and nothing moves any more."""
    page.wait_for_selector(selector, state="visible", timeout=WAIT_MS)
    page.wait_for_function(
        "() => !document.querySelector('[data-testid=stStatusWidget], [data-stale=true]')", timeout=WAIT_MS
    )
    page.wait_for_timeout(900)


def shoot(browser: Browser, url: str, file: Path, selector: str, scheme: str, size: tuple[int, int]) -> None:
    """One picture of one view, reduced to 256 colours."""
    viewport = {"width": size[0], "height": size[1]}
    context = browser.new_context(color_scheme=scheme, viewport=viewport)
    page = context.new_page()
    page.goto(url)
    settle(page, selector)
    raw = file.with_suffix(".raw.png")
    page.screenshot(path=raw)
    Image.open(raw).convert("RGB").quantize(256).save(file, optimize=True)
    raw.unlink()
    context.close()
    print(f"{file}  {file.stat().st_size // 1024} KiB")


def main() -> int:
    """Take the pictures that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--all", action="store_true", help="light and dark, 1400 and 800 px")
    of_builds = [name for name in VIEWS if name not in ON_DEMAND]
    parser.add_argument("--views", nargs="*", choices=[*VIEWS], default=of_builds)
    parser.add_argument("--head", default="L0H0", help="the head that is shown")
    parser.add_argument("--feature", nargs=2, metavar=("SAE", "NUMBER"), help="the feature that is shown")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    feature = "?" + urlencode({"sae": args.feature[0], "feature": args.feature[1]}) if args.feature else ""
    args.out.mkdir(parents=True, exist_ok=True)
    kinds = (
        [("light", 1400), ("dark", 1400), ("light", 800), ("dark", 800)] if args.all else [("light", 1400)]
    )
    with served(free_port()) as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=args.chromium, args=list(FLAGS))
        for name in args.views:
            path, selector, height = VIEWS[name]
            for scheme, width in kinds if args.all else kinds[:1]:
                file = args.out / (f"{name}-{scheme}-{width}.png" if args.all else f"{name}.png")
                shoot(
                    browser,
                    f"{url}/{path.format(head=args.head, feature=feature)}",
                    file,
                    selector,
                    scheme,
                    (width, height),
                )
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
