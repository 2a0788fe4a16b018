"""Do many annotators who write at once lose anything, see errors, or wait?

    python benchmarks/annotators.py [--people 20] [--seconds 60] [--pause 0.5] [--postgresql URL]

Every annotator is a process of its own. Half of them write as themselves; the others are pairs of browsers of
the same person, who change the same notes and so meet conflicts: the second writer is refused, sees both
texts, and writes again on top of the newer one. Each save adds one to a counter inside the note, so a lost
update would leave the counter behind the saves that were confirmed. Printed: saves, conflicts, latencies of a
save (without the pause between saves, which stands for typing), and the check. Without --postgresql only
SQLite is measured; the database of the URL must be empty.
"""

import argparse
import multiprocessing
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from queue import Empty

from atlas.db.annotations import StaleAnnotationError, head_history, load_head, save_head
from atlas.db.engine import close_engines
from atlas.db.notes import HeadAnnotation
from atlas.db.schema import downgrade, upgrade
from atlas.settings import Settings, load_settings

MODEL, HEADS = "docs-12l", 2
"""Few heads, so that the two browsers of a person meet."""


@dataclass
class Told:
    """What one process did: confirmed saves by (annotator, head), latencies in seconds."""

    saves: Counter = field(default_factory=Counter)
    conflicts: int = 0
    unseen: int = 0
    """Conflicts that did not show both texts."""
    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """All processes together, and what the database holds in the end."""

    people: int
    lasted: float
    told: Told
    lost: int
    """Confirmed saves that the notes and their history do not show."""

    def share(self, part: float) -> float:
        """The latency, in seconds, under which this part of the saves stayed."""
        ordered = sorted(self.told.seconds)
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def name_of(number: int, people: int) -> str:
    """Who process ``number`` writes as: the second half are pairs of browsers.

    >>> [name_of(i, 6) for i in range(6)]
    ['own-0', 'own-1', 'own-2', 'pair-1', 'pair-2', 'pair-2']
    """
    return f"own-{number}" if number < people // 2 else f"pair-{number // 2}"


def _save_one(settings: Settings, who: str, head: int, told: Told) -> None:
    """Add one to a note's counter, on top of whatever is there; a conflict is resolved as a person would."""
    base = load_head(settings, MODEL, 0, head, who) or HeadAnnotation(MODEL, 0, head, who)
    while True:
        mine = replace(base, seconds_spent=base.seconds_spent + 1, label=f"{who} {base.version + 1}")
        began = time.perf_counter()
        try:
            save_head(settings, mine, base.version)
        except StaleAnnotationError as conflict:
            told.seconds.append(time.perf_counter() - began)
            told.conflicts += 1
            both = conflict.yours == mine and conflict.theirs is not None
            told.unseen += not (both and conflict.theirs.version > base.version)
            base = conflict.theirs or base
            continue
        told.seconds.append(time.perf_counter() - began)
        told.saves[who, head] += 1
        return


def annotate(
    settings: Settings, number: int, people: int, seconds: float, pause: float, gate, answers
) -> None:
    """One process: wait for the others, then save notes until the time is over."""
    told, who, chance = Told(), name_of(number, people), random.Random(number)
    try:
        load_head(settings, MODEL, 0, 0, who)  # open the connection before the start
        gate.wait(60)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            _save_one(settings, who, chance.randrange(HEADS), told)
            time.sleep(chance.uniform(0, 2 * pause))
    except Exception as error:  # noqa: BLE001 - every error is one too many, and is reported
        told.errors.append(f"{type(error).__name__}: {error}")
    answers.put(told)


def measure(settings: Settings, people: int, seconds: float, pause: float) -> Outcome:
    """Let ``people`` processes write for so many seconds, then compare what they were told with the notes."""
    close_engines()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([annotate.__module__])
    gate, answers = context.Barrier(people), context.Queue()
    rest = (people, seconds, pause, gate, answers)
    children = [context.Process(target=annotate, args=(settings, i, *rest)) for i in range(people)]
    began = time.monotonic()
    for child in children:
        child.start()
    whole = Told()
    try:
        for _ in children:
            one = answers.get(timeout=seconds + 120)
            whole.saves += one.saves
            whole.conflicts += one.conflicts
            whole.unseen += one.unseen
            whole.seconds += one.seconds
            whole.errors += one.errors
    except Empty:
        whole.errors.append("a process ended without a word")
    for child in children:
        child.join(30)
        if child.is_alive():
            child.kill()
    return Outcome(people, time.monotonic() - began, whole, _lost(settings, whole.saves))


def _lost(settings: Settings, saves: Counter) -> int:
    """By how much the notes' counters and versions and the history fall short of the confirmed saves."""
    lost = 0
    for (who, head), n in saves.items():
        note = load_head(settings, MODEL, 0, head, who)
        versions = [saved.version for saved in head_history(settings, MODEL, 0, head, who)]
        counted = round(note.seconds_spent) if note else 0
        lost += abs(n - counted) + abs(n - (note.version if note else 0))
        lost += versions != list(range(1, n + 1))
    return lost


def row(kind: str, pause: float, seconds: float, found: Outcome) -> str:
    """One line of the table."""
    told = found.told
    total = sum(told.saves.values())
    times = " | ".join(f"{1000 * found.share(part):.1f}" for part in (0.5, 0.95, 0.99, 1.0))
    return (
        f"| {kind} | {pause:g} s | {total:,} | {total / seconds:.0f} | {told.conflicts:,} | {times} "
        f"| {found.lost + told.unseen} | {len(told.errors)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pause", type=float, nargs="*", default=[0.5, 0.0])
    parser.add_argument("--postgresql", help="URL of an empty database")
    asked = parser.parse_args()
    print(f"{asked.people} annotators, {asked.seconds:g} s")
    columns = "Database, Pause, Saves, Saves/s, Conflicts, p50 ms, p95 ms, p99 ms, max ms, Lost, Errors"
    print(f"| {columns.replace(', ', ' | ')} |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for pause in asked.pause:
        with tempfile.TemporaryDirectory() as folder:
            embedded = load_settings({"ATLAS_HOME": folder})
            kinds = {"SQLite": embedded}
            if asked.postgresql:
                kinds["PostgreSQL"] = replace(embedded, database_url=asked.postgresql)
            for kind, settings in kinds.items():
                upgrade(settings)
                found = measure(settings, asked.people, asked.seconds, pause)
                print(row(kind, pause, asked.seconds, found), *found.told.errors[:3], sep="\n", flush=True)
                close_engines()
                if kind == "PostgreSQL":
                    _empty(settings)


def _empty(settings: Settings) -> None:
    """Leave the server's database as it was found."""
    downgrade(settings, "base")
    close_engines()


if __name__ == "__main__":
    main()
