"""The queries behind the app's views with the arguments that the views give them, timed cold and warm."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa

from atlas.store.connection import cursor, open_release
from atlas.store.queries import (
    evidence,
    examples,
    features,
    heads,
    near,
    overview,
    quality,
    search,
    shares,
    texts,
    training,
)

Arguments = tuple[Any, ...]


class Case(NamedTuple):
    """One query as one view asks it: every call of ``arguments`` draws others."""

    view: str
    name: str
    query: Callable[..., Any]
    arguments: Callable[[], Arguments]


class Latency(NamedTuple):
    """Milliseconds of a query with other and other arguments, and with the same ones again.

    ``cpu`` is of processors: the sum over threads, which other work on the machine hardly changes.
    """

    new_p50: float
    new_p95: float
    warm_p50: float
    warm_p95: float
    cpu_p50: float
    cpu_p95: float


class Draw:
    """Random arguments of a release: SAEs, features that fire, heads and what a head's page shows."""

    def __init__(self, con: duckdb.DuckDBPyConnection, seed: int = 0) -> None:
        self._con, self._rng = con, np.random.default_rng(seed)
        self.model = overview.models(con)[0].model
        self._refs = overview.sae_refs(con)
        self.names = tuple(ref.sae for ref in overview.z_saes(self._refs, self.model).values())
        self._n_heads = overview.models(con)[0].n_heads

        self.all_names = tuple(ref.sae for ref in self._refs)
        ((self._n_tokens,),) = con.execute("SELECT count(*) FROM vocab").fetchall()
        ((self._n_blocks, self._length),) = con.execute(
            "SELECT count(*), max(len(tokens)) FROM docs"
        ).fetchall()

    def tokens(self, n: int) -> tuple[int, ...]:
        return tuple(int(i) for i in self._rng.choice(self._n_tokens, n, replace=False))

    def word(self) -> str:
        rows = self._con.execute("SELECT text FROM vocab WHERE token = ?", [self.tokens(1)[0]]).fetchall()
        return str(rows[0][0])

    def places(self, n: int) -> pa.Table:
        """A place in each of ``n`` blocks: a string that stands in so many of them."""
        blocks = np.sort(self._rng.choice(self._n_blocks, min(n, self._n_blocks), replace=False))
        low = self._rng.integers(1, self._length - 1, len(blocks))
        columns = zip((blocks, low, low + 1), texts.PLACES, strict=True)
        return pa.table([pa.array(values, field.type) for values, field in columns], schema=texts.PLACES)

    def sae(self) -> str:
        return self.names[self._rng.integers(len(self.names))]

    def feature(self) -> Arguments:
        ref = self._refs[self._rng.integers(len(self._refs))]
        return ref.sae, int(self._rng.integers(ref.d_sae))

    def features(self, n: int) -> Arguments:
        ref = self._refs[self._rng.integers(len(self._refs))]
        return ref.sae, tuple(int(i) for i in self._rng.choice(ref.d_sae, min(n, ref.d_sae), replace=False))

    def head(self) -> Arguments:
        return self.sae(), int(self._rng.integers(self._n_heads))


def cases(draw: Draw) -> Iterator[Case]:
    """Every query that a view calls, as it calls it."""
    yield from _whole(draw)
    yield from _of_heads(draw)
    yield from _of_features(draw)
    yield from _evidence(draw)
    yield from _searches(draw)
    yield from _beside(draw)


def _whole(draw: Draw) -> Iterator[Case]:
    def fixed(*values: Any) -> Callable[[], Arguments]:
        return lambda: values

    yield Case("every page", "models", overview.models, fixed())
    yield Case("every page", "sae_refs", overview.sae_refs, fixed())
    yield Case("head, feature", "vocabulary", overview.vocabulary, fixed(draw.model))
    yield Case("overview", "sae_table", overview.sae_table, fixed(draw.model, "eval"))
    yield Case("overview", "manifest", overview.manifest, fixed())
    yield Case("overview", "provenance", overview.provenance, fixed())
    for name in ("layers", "qk", "sweep", "stages", "pruning"):
        values = (draw.model, "z", "eval") if name == "layers" else (draw.model,)
        yield Case("overview", name, getattr(quality, name), fixed(*values))
    yield Case("atlas", "head_scores", heads.head_scores, fixed(draw.model))
    yield Case("atlas", "grid_metrics, 12 SAEs", heads.grid_metrics, fixed(draw.names))
    yield Case("training", "trained", training.trained, fixed(draw.model))
    yield Case("training", "endings", training.endings, fixed(draw.model))
    for name in training.LOGS:
        yield Case("training", f"{name}, 4 SAEs", training.rows_of, fixed(name, draw.names[:4]))


def _of_heads(draw: Draw) -> Iterator[Case]:
    for measure in heads.MEASURES:
        for k in (10, 50):
            yield Case("head", f"top_features {measure}, {k}", heads.top_features,
                       lambda m=measure, k=k: (*draw.head(), m, k))  # fmt: skip
    yield Case("head, unfolded", "shares.in_head", shares.in_head, draw.head)
    yield Case("head", "head_summary", heads.head_summary, draw.head)
    for k, n in ((10, 3), (50, 10)):
        yield Case("head", f"summaries, {k}", features.summaries, lambda k=k: draw.features(k))
        yield Case("head", f"logits, {k}", features.logits, lambda k=k: (*draw.features(k), 8))
        # The view asks for the cards of ten features at a time, however many it shows.
        yield Case("head", f"examples, 10 x {n}", examples.examples,
                   lambda n=n: (*draw.features(10), ("top",), n))  # fmt: skip


def _of_features(draw: Draw) -> Iterator[Case]:
    for query in (features.feature_row, features.alive_around, features.histogram, features.positions,
                  features.attribution):  # fmt: skip
        yield Case("feature", query.__name__, query, draw.feature)
    yield Case("feature", "block_length", features.block_length, tuple)
    yield Case("feature", "token_stats", features.token_stats, lambda: (*draw.feature(), 50))
    yield Case("feature", "logits", features.logits, lambda: (*draw.features(1), 20))
    yield Case("feature", "examples, all groups", examples.examples,
               lambda: (*draw.features(1), examples.GROUPS, 20))  # fmt: skip
    for order in ("feature", "density", "max_activation"):
        yield Case("feature", f"some_features by {order}", features.some_features,
                   lambda order=order: (draw.sae(), order, 500))  # fmt: skip
    yield Case("overview", "some_features, first", features.some_features,
               lambda: (draw.sae(), "max_activation", 1))  # fmt: skip


def _evidence(draw: Draw) -> Iterator[Case]:
    for query in (evidence.neighbours, evidence.coactivation, evidence.dfa_summary, evidence.dfa_distances,
                  evidence.dfa_tokens, evidence.logit_histogram, evidence.head_logit_effects):  # fmt: skip
        yield Case("feature", query.__name__, query, draw.feature)
    yield Case("feature", "families", evidence.families, lambda: draw.features(1))
    yield Case("head", "families, 50", evidence.families, lambda: draw.features(50))
    for family in ("dense", "induction"):
        yield Case("head", f"family_features {family}", evidence.family_features,
                   lambda f=family: (draw.sae(), f, int(draw.head()[1])))  # fmt: skip


def _searches(draw: Draw) -> Iterator[Case]:
    """What a search asks; the table of all features and the text are made once per server (first, cold)."""
    every = search.Filters(draw.all_names)
    chosen = {
        "all": every,
        "a family": search.Filters(draw.all_names, families=("induction",)),
        "a range": search.Filters(draw.all_names, ranges=(("density", 0.001, 0.01),), order="-n_active"),
    }
    for name, filters in chosen.items():
        for query in (search.page, search.facets):
            yield Case("search", f"{query.__name__}, {name}", query, lambda f=filters: (f,))
    for role in search.ROLES:
        yield Case("search", f"by_token {role}, 2 tokens", search.by_token,
                   lambda role=role: (draw.tokens(2), role))  # fmt: skip
    yield Case("search", "tokens_like", texts.tokens_like, lambda: (draw.model, draw.word()))
    yield Case("search", "like", search.like, draw.feature)
    for n in (50, 500):
        yield Case("search", f"by_places, {n} blocks", search.by_places, lambda n=n: (draw.places(n),))
    yield Case("search, once", "read_texts", texts.read_texts, lambda: (draw.model,))


def _beside(draw: Draw) -> Iterator[Case]:
    yield Case("head, unfolded", "heads_of_one_layer", near.heads_of_one_layer, draw.head)
    yield Case("head, unfolded", "profiles", near.profiles, lambda: (draw.names,))
    yield Case("atlas", "layer_rows", near.layer_rows, lambda: (draw.names,))
    yield Case("compare", "shares.in_two_heads", shares.in_two_heads,
               lambda: (draw.sae(), *(draw.head()[1] for _ in range(2))))  # fmt: skip
    yield Case("compare", "densities, 2 SAEs", near.densities, lambda: ((draw.sae(), draw.sae()),))
    yield Case("compare", "family_counts", evidence.family_counts, lambda: (draw.sae(),))


def forget(path: Path) -> None:
    """Put the file's pages out of the operating system's memory (nothing of it is waiting to be written)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def recall(path: Path) -> None:
    """Read the file once, so that the operating system has all of it in memory if it fits."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def _milliseconds(con: duckdb.DuckDBPyConnection, case: Case, arguments: Arguments) -> tuple[float, float]:
    """By the clock, and of processors."""
    start, cpu = time.perf_counter(), time.process_time()
    case.query(cursor(con), *arguments)
    return 1000 * (time.perf_counter() - start), 1000 * (time.process_time() - cpu)


def cold(path: Path, case: Case) -> float:
    """The first answer of a new connection while nothing of the file is in memory; median of three."""
    times = []
    for _ in range(3):
        forget(path)
        con = open_release(path)
        times.append(_milliseconds(con, case, case.arguments())[0])
        con.close()
    return float(np.median(times))


def latency(path: Path, case: Case, repeats: int, tries: int) -> Latency:
    """Of one connection to a file in memory: each of ``repeats`` arguments for the first time, and again.

    Again means ``tries`` times, of which the fastest counts: a machine may be busy with something else.
    """
    con = open_release(path)
    try:
        arguments = [case.arguments() for _ in range(repeats)]
        new = [_milliseconds(con, case, one)[0] for one in arguments]
        again = np.array([[_milliseconds(con, case, one) for _ in range(tries)] for one in arguments])
    finally:
        con.close()
    warm, cpu = again.min(axis=1).T
    return Latency(*(float(np.quantile(times, q)) for times in (new, warm, cpu) for q in (0.5, 0.95)))


def opened(path: Path) -> float:
    """Milliseconds until a connection to a file that is not in memory can be asked."""
    forget(path)
    start = time.perf_counter()
    open_release(path).close()
    return 1000 * (time.perf_counter() - start)
