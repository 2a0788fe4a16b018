"""Measure the heads of a release once more, from its model and its text, and say how far the tables agree."""

import math
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import torch

from atlas.configs import BuildConfig, CorpusConfig, HeadsConfig
from atlas.corpus.sources import open_source
from atlas.corpus.tokens import TokenStore, build_token_store, load_tokenizer
from atlas.heads.measure import Rows, measure_heads, measure_tasks
from atlas.lm.load import LanguageModel, load_model
from atlas.lm.runtime import prepare_torch
from atlas.progress import NullProgress, Progress
from atlas.settings import Settings
from atlas.tables import TABLES


class Agreement(NamedTuple):
    """One table: its rows here, rows that only one side has, and the largest difference of a number."""

    table: str
    rows: int
    unmatched: int
    largest: float
    where: str


def text_of(corpus: CorpusConfig, model: LanguageModel, folder: Path) -> TokenStore:
    """The text of a config as a token store in a folder, as the step ``tokens`` makes it."""
    source, tokenizer = open_source(corpus.source), load_tokenizer(model.files.path)
    build_token_store(
        folder, source.spec, source.documents(), tokenizer, context=corpus.context, blocks=corpus.blocks,
        progress=NullProgress(),
    )  # fmt: skip
    return TokenStore(folder)


def remeasure(config: BuildConfig, settings: Settings, progress: Progress) -> Rows:
    """Rows of every table about heads, made anew."""
    model = load_model(config.model, prepare_torch(settings))
    with tempfile.TemporaryDirectory() as folder:
        store = text_of(config.corpus, model, Path(folder))
        return measure_heads(model, store, config.evaluation.blocks, config.heads, progress)


def measure_some_tasks(
    config: BuildConfig, heads: HeadsConfig, layers: Iterable[int], settings: Settings, progress: Progress
) -> Rows:
    """Tasks alone, on the model and text of a config; the evaluation blocks give the means."""
    model = load_model(config.model, prepare_torch(settings))
    context = min(config.corpus.context, model.shape.n_ctx)
    with tempfile.TemporaryDirectory() as folder:
        store = text_of(replace(config.corpus, context=context), model, Path(folder))
        text = torch.from_numpy(store.blocks(range(min(config.evaluation.blocks, len(store)))))
        return measure_tasks(model, text, heads, layers, store.meta.bos, progress)


def agreement(con: duckdb.DuckDBPyConnection, found: Rows) -> list[Agreement]:
    """Compare rows with the tables of a release, by key; 32-bit numbers differ by rounding."""
    return [_compare(con, name, rows) for name, rows in found.items() if rows]


def _compare(con: duckdb.DuckDBPyConnection, name: str, rows: list[dict[str, Any]]) -> Agreement:
    key = TABLES[name].key
    columns = [c.name for c in TABLES[name].columns if c.name not in key]
    model = rows[0]["model"]
    stored = con.execute(
        f"SELECT {', '.join([*key, *columns])} FROM {name} WHERE model = ?",  # noqa: S608
        [model],
    ).fetchall()
    there = {row[: len(key)]: dict(zip(columns, row[len(key) :], strict=True)) for row in stored}
    here = {tuple(row[k] for k in key): row for row in rows}
    unmatched, largest, where = len(there.keys() ^ here.keys()), 0.0, ""
    for at in sorted(there.keys() & here.keys()):
        for column in columns:
            far = _difference(here[at][column], there[at][column])
            if far > largest:
                largest, where = far, f"{column} of {' '.join(map(str, at[1:]))}"
    return Agreement(name, len(here), unmatched, largest, where)


def _difference(one: Any, other: Any) -> float:
    """How far two values are apart; infinite where they cannot be compared."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return max((_difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other)
    return 0.0 if one == other else math.inf
