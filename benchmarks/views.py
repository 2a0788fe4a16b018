"""How long does the server take to draw each view of a release? And what does a session cost in memory?

    python benchmarks/views.py [--home /tmp/store] [--repeats 3] [--sessions 50]

Every view is run as Streamlit runs it for a browser (its AppTest: the script, without the network), once
after everything kept was forgotten (cold), then again with other heads and features (new) and with the same
(warm).
``--home`` is an ATLAS_HOME; ``benchmarks/store.py --keep`` leaves a release of GPT-2's size there. With
``--sessions`` that many sessions are opened beside each other, each on another head, and the growth of the
process's memory is divided by their number.
"""

import argparse
import logging
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Spent(NamedTuple):
    """Milliseconds of a run: by the clock, and of processors, which other work hardly changes."""

    wall: float
    cpu: float


def resident_mb() -> float:
    """Memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def asked(saes: list[Any], n_heads: int) -> dict[str, list[dict[str, str]]]:
    """Addresses of every view: the first is asked cold and warm, the others are new."""
    ref = saes[len(saes) // 2]
    features = [{"sae": saes[i % len(saes)].sae, "feature": str(101 * (i + 1))} for i in range(4)]
    return {
        "atlas": [{}, {"colour": "induction"}, {"colour": "n_induction"}],
        "head": [{"head": f"L{ref.layer}H{h % n_heads}"} for h in range(4)],
        "feature": features,
        "search": [{}, {"family": "induction"}, {"by": "at", "q": "e"}, {"range": "density:0.001..0.01"}],
        "compare": [{"one": "L0H0", "other": f"L0H{h % n_heads}"} for h in range(1, 4)],
        "overview": [{}],
        "training": [{}],
        "sql": [{}],
    }


def run(view: str, params: dict[str, str]) -> tuple[Any, Spent]:
    """One run of a view and what it took."""
    from streamlit.testing.v1 import AppTest
    from streamlit.util import calc_hash

    from atlas.cli.app import main_file

    at = AppTest.from_file(str(main_file()), default_timeout=300)
    at._page_hash = calc_hash(view)
    for name, value in params.items():
        at.query_params[name] = value
    start, cpu = time.perf_counter(), time.process_time()
    at.run()
    spent = Spent(1000 * (time.perf_counter() - start), 1000 * (time.process_time() - cpu))
    if at.exception:
        raise SystemExit(f"{view} {params}: {at.exception[0].message}")
    return at, spent


def _nothing() -> Spent:
    """What Streamlit's own machinery takes around a script that draws nothing."""
    from streamlit.testing.v1 import AppTest

    at = AppTest.from_string("import streamlit")
    start, cpu = time.perf_counter(), time.process_time()
    at.run()
    return Spent(1000 * (time.perf_counter() - start), 1000 * (time.process_time() - cpu))


def median(found: Sequence[Spent]) -> Spent:
    """The median of each kind of time by itself."""
    return Spent(*(statistics.median(one) for one in zip(*found, strict=True)))


def times(repeats: int) -> Iterator[tuple[str, Spent, Spent, Spent]]:
    """View, cold, the median of new addresses, the median of the same address again."""
    import streamlit as st

    scope = _scope()
    for view, addresses in asked(list(scope.z_saes.values()), scope.model.n_heads).items():
        st.cache_resource.clear()
        _, cold = run(view, addresses[0])
        fresh = [run(view, params)[1] for params in addresses[1:]] or [cold]
        warm = [run(view, addresses[0])[1] for _ in range(repeats)]
        yield view, cold, median(fresh), median(warm)


def _scope() -> Any:
    from app import state

    return state.scope()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path("/tmp/store"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=0)
    args = parser.parse_args()
    os.environ["ATLAS_HOME"] = str(args.home)
    logging.disable(logging.WARNING)  # Streamlit says at every call that no browser is there
    run("atlas", {})  # imports
    base = median([_nothing() for _ in range(5)])
    print(f"an empty script: {base.wall:.0f} ms ({base.cpu:.0f} of a processor), part of every number below")
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("| view | cold ms (processor) | new ms (processor) | warm ms (processor) |\n|---|---|---|---|")
    for view, *spent in times(args.repeats):
        told = " | ".join(f"{one.wall:.0f} ({one.cpu:.0f})" for one in spent)
        print(f"| {view} | {told} |", flush=True)
    if args.sessions:
        scope = _scope()
        names = [f"L{i}H{j}" for i in range(scope.model.n_layers) for j in range(scope.model.n_heads)]
        before = resident_mb()
        kept = [run("head", {"head": name})[0] for name in names[: args.sessions]]
        grown = resident_mb() - before
        each = grown / len(kept)
        print(f"\n{len(kept)} sessions: {grown:.0f} MB more ({each:.1f} each) than {before:.0f} MB before")


if __name__ == "__main__":
    main()
