"""How long does the server take for each view of a release? And what do fifty people at once cost?

    python benchmarks/views.py [--home /tmp/store] [--repeats 5] [--views head,search]
    python benchmarks/views.py [--home /tmp/store] --sessions 50 [--rounds 6] [--pause 10]

The app is served as ``atlas app`` serves it and asked over its websocket (``served.py``); a page is done when
the server has sent all of it. Cold: after the server forgot all that it had kept; new: another head, another
feature, another question, each for the first time; again: the same once more, the fastest of ``--repeats``.
Milliseconds by the clock and, in brackets, of processors, which other work on the machine hardly changes.
``--home`` is an ATLAS_HOME; ``benchmarks/store.py --keep`` leaves a release of GPT-2's size there.

With ``--sessions`` that many sessions open pages beside each other, each after a pause drawn between nothing
and twice ``--pause`` seconds. What they open was opened before, so that memory that grows is theirs.
"""

import argparse
import asyncio
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from served import Address, Server, Session, Spent

from atlas.settings import load_settings
from atlas.store import published
from atlas.store.connection import open_release
from atlas.store.queries import overview, texts

Params = Mapping[str, str]
PLAIN = ("overview", "training", "sql", "jobs", "queue", "agreement", "survey", "try", "circuit", "qk",
         "induction", "ioi", "tasks")  # fmt: skip


def asked(home: Path) -> dict[str, list[Params]]:
    """Addresses by view: the first is asked cold and again, the others are new."""
    os.environ["ATLAS_HOME"] = str(home)
    con = open_release(published.current(load_settings(), None).path)
    model, refs = overview.models(con)[0], overview.sae_refs(con)
    words = [word for word in ("e", "the", "(", "=", "_", " in") if texts.tokens_like(con, model.model, word)]
    con.close()
    saes = list(overview.z_saes(refs, model.model).values())
    rng = random.Random(0)
    heads = [f"L{sae.layer}H{rng.randrange(model.n_heads)}" for sae in saes]
    features = [{"sae": sae.sae, "feature": str(rng.randrange(sae.d_sae))} for sae in saes]
    return {
        "atlas": [{}, {"colour": "induction"}, {"colour": "n_induction"}, {"form": "Table"}],
        "head": [{"head": name} for name in heads],
        "head, 50 features": [{"head": name, "k": "50"} for name in heads[:5]],
        "feature": list(features),
        "search": [{}, *_searches(words)],
        "search by text": [{"by": "text", "q": word} for word in ("import", "return", " was", "e", "xyzzy")],
        "search like a feature": [{"by": "like", "q": f"{one['sae']}/{one['feature']}"} for one in features],
        "compare": [{"one": one, "other": one[:-1] + str(h)} for h, one in enumerate(heads[:5])],
        "compare SAEs": [{"sae": saes[0].sae, "sae2": sae.sae} for sae in saes[1:5]] or [{}],
        **{view: [{}] for view in PLAIN},
        "sql, asked": [{"q": f"SELECT * FROM features WHERE feature = {n}"} for n in range(4)],
        "tasks, one layer": [{"layer": str(n)} for n in range(min(4, model.n_layers))],
        "induction, one head": [{"head": name} for name in heads[:4]],
        **(_live() if (home / "steps").is_dir() else {}),
    }


def _live() -> dict[str, list[Params]]:
    """Pages that ask the model, which the process beside the server loads at the first."""
    texts = ["import numpy as np", "def read(path):", "for line in lines:", "return self.name"]
    return {
        "try, a text": [{"text": text} for text in texts],
        "circuit, a text": [{"text": text} for text in texts],
    }


def _searches(words: Sequence[str]) -> Iterator[Params]:
    for word, role in zip(words, ("at", "next", "up", "down", "from", "at"), strict=False):
        yield {"by": role, "q": word}
    yield {"family": "induction"}
    yield {"family": "single_token", "order": "density"}
    yield {"range": "density:0.001..0.01"}
    yield {"range": "dfa_distance:5..", "order": "-n_active"}


def page(name: str, params: Params) -> Address:
    """The address of a named page; what stands after a comma or a space tells pages of one view apart."""
    return Address(name.split(",")[0].split(" ")[0], params)


async def first(server: Server, home: Path) -> None:
    """Prints the time of the first page after the server's start, a head, and of cards that come later."""
    server.rest()
    heads = asked(home)["head"]
    if not heads:
        return
    params = heads[0]
    async with Session.opened(server) as session:
        once = await session.visit(page("head", params))
    _no_errors(session)
    told = f"the first page, a head: {once.wall:.0f} ({once.cpu:.0f}) ms"
    async with Session.opened(server) as session:
        await session.visit(fifty := page("head", {**params, "k": "50"}))
        later = [await session.more(fifty) for _ in session.waiting.copy()]
    _no_errors(session)
    wall, cpu = (statistics.median(one[i] for one in later) for i in (0, 1))
    print(f"{told}; ten more cards of it: {wall:.0f} ({cpu:.0f}) ms, the median of {len(later)}\n")


async def times(server: Server, pages: Mapping[str, list[Params]], repeats: int) -> None:
    """Prints each page's times, each page in a session of its own; errors end it."""
    print("| page | cold | new, median | new, slowest | again | KB sent |\n|---|---|---|---|---|---|")
    for name, (first, *others) in pages.items():
        async with Session.opened(server) as session:
            await session.visit(Address("overview", {}))
            await session.forget()
            cold = await session.visit(page(name, first))
            new = [await session.visit(page(name, params)) for params in others] or [cold]
            again = [await session.visit(page(name, first)) for _ in range(repeats)]
        _no_errors(session)
        columns = (cold, _each(statistics.median, new), _each(max, new), _each(min, again))
        told = " | ".join(f"{one.wall:.0f} ({one.cpu:.0f})" for one in columns)
        print(f"| {name} | {told} | {again[0].kilobytes:,.0f} |", flush=True)


def _each(choose: object, found: Sequence[Spent]) -> Spent:
    """The median, the largest or the least of each kind of number by itself."""
    return Spent(*(choose(one) for one in zip(*found, strict=True)))  # type: ignore[operator]


def _no_errors(session: Session) -> None:
    if session.errors:
        raise SystemExit("\n".join(session.errors))


class Crowd:
    """Sessions beside each other: what each met, and the server's memory while all of them are open."""

    def __init__(self, server: Server, pages: Mapping[str, list[Params]], n: int) -> None:
        self.server, self.pages = server, pages
        self.met: dict[str, list[float]] = defaultdict(list)
        self.errors: list[str] = []
        self.memory = 0.0
        self._all_done = asyncio.Barrier(n)

    async def person(self, rounds: int, pause: float, seed: int) -> None:
        """One of them: opens a random page after a pause, ``rounds`` times, and stays until all are done."""
        rng = random.Random(seed)
        async with Session.opened(self.server) as session:
            for _ in range(rounds):
                await asyncio.sleep(rng.uniform(0, 2 * pause))
                name = rng.choice(list(self.pages))
                spent = await session.visit(page(name, rng.choice(self.pages[name])))
                self.met[name].append(spent.wall)
            await self._all_done.wait()
            self.memory = max(self.memory, self.server.memory())
            self.errors += session.errors
            await self._all_done.wait()


async def together(
    server: Server, pages: Mapping[str, list[Params]], n: int, rounds: int, pause: float
) -> None:
    """Prints what ``n`` sessions at once met, and what they cost."""
    async with Session.opened(server) as session:
        for name, addresses in pages.items():
            for params in addresses:
                await session.visit(page(name, params))
        _no_errors(session)
    before, cpu, start = server.memory(), server.cpu(), time.perf_counter()
    crowd = Crowd(server, pages, n)
    await asyncio.gather(*(crowd.person(rounds, pause, seed) for seed in range(n)))
    seconds, cpu = time.perf_counter() - start, server.cpu() - cpu
    print("| page | opened | p50 ms | p95 ms |\n|---|---|---|---|")
    every = [one for found in crowd.met.values() for one in found]
    for name, found in [*sorted(crowd.met.items()), ("all", every)]:
        print(f"| {name} | {len(found)} | {_quantile(found, 0.5):.0f} | {_quantile(found, 0.95):.0f} |")
    grown = crowd.memory - before
    print(
        f"\n{n} sessions, {len(every)} pages in {seconds:.0f} s: {len(crowd.errors)} errors, "
        f"{cpu / len(every):.0f} ms of a processor per page; {grown:.0f} MB more than the {before:.0f} MB "
        f"before ({grown / n:.1f} each)"
    )
    print("\n".join(crowd.errors[:20]))


def _quantile(found: Sequence[float], q: float) -> float:
    return float(np.quantile(found, q))


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path("/tmp/store"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--views", help="with commas between them, such as head,search by text; without it all"
    )
    parser.add_argument("--sessions", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=6, help="pages that each session opens")
    parser.add_argument("--pause", type=float, default=10.0, help="mean seconds before each")
    args = parser.parse_args()
    pages = {name: addresses for name, addresses in asked(args.home).items() if addresses}
    if args.views:
        wanted = args.views.split(",")
        pages = {name: asked for name, asked in pages.items() if name.split(",")[0] in wanted}
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with Server(args.home) as server:
        seconds = f"{server.seconds_to_start:.1f} s ({server.cpu() / 1000:.1f} of a processor)"
        print(f"the server answers {seconds} after its start\n")
        if args.sessions:
            await together(server, pages, args.sessions, args.rounds, args.pause)
        else:
            await first(server, args.home)
            await times(server, pages, args.repeats)
    print(f"load of the machine: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    asyncio.run(main())
