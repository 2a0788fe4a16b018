"""What several kinds of step need: the model, the text, the SAEs; and columns written as a table."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from atlas.analysis.residuals import KeptResiduals
from atlas.corpus.stores import TextStores
from atlas.corpus.tokens import TokenStore
from atlas.lm.load import LanguageModel, load_model
from atlas.lm.runtime import lanes, prepare_torch
from atlas.pipeline.execute import Context
from atlas.pipeline.keeping import kept_residuals
from atlas.sae.files import load_sae
from atlas.sae.harvest import Harvest, Source, Stream
from atlas.sae.model import SAE
from atlas.sites import Site
from atlas.store.parquet import TableWriter, open_table, write_table
from atlas.tables import table

CACHE = "cache"
"""Folder of cached activations, which all builds of a home share."""


def the_model(context: Context) -> LanguageModel:
    """The model of the build, on this machine's device."""
    return load_model(context.plan.config.model, prepare_torch(context.settings))


def the_text(context: Context) -> TokenStore:
    """The token store of the build."""
    return TokenStore(context.input("tokens"))


def the_sae(context: Context, item: int, stage: str | None = None) -> SAE:
    """One SAE by its number in the plan, as it is after a stage (the last one)."""
    return load_sae(_folder_of_sae(context, item, stage))


def _folder_of_sae(context: Context, item: int, stage: str | None) -> Path:
    step, folder = context.plan.place(item, stage)
    return context.input(step) / folder


def the_saes(context: Context, model: LanguageModel, stage: str | None = None) -> list[SAE]:
    """Every SAE, in the plan's order, as it is after a stage (the last one)."""
    folders = [_folder_of_sae(context, item, stage) for item in range(len(context.plan.saes))]
    with side_by_side([partial(load_sae, folder) for folder in folders]) as saes:
        return [sae.to(model.device) for sae in saes]


def the_stream(context: Context) -> Stream:
    """The training text, held-out blocks left out, in the order in which it is read."""
    config = context.plan.config
    chunk_tokens = config.train.batch * config.train.chunk_batches
    dtype = config.train.activation_dtype
    return Stream(the_text(context), config.evaluation.blocks, chunk_tokens, config.train.seed, dtype)


def the_source(context: Context, model: LanguageModel, stream: Stream, sites: Sequence[Site]) -> Source:
    """The activations of the training text: from the cache on disk if the build asks for one."""
    train = context.plan.config.train
    if not train.cache:
        return Harvest(model, stream, sites)
    from atlas.sae.cache import CachedHarvest

    folder = context.settings.home / CACHE
    return CachedHarvest(model, stream, sites, folder, int(train.cache_gb * 1e9))


def the_analysed_text(context: Context) -> TokenStore:
    """The text that the tables summarise, as far as the step needs it; it may go on after the training's."""
    names = [name for name in context.step.needs if context.plan.step(name).kind == "tokens"]
    stores = [TokenStore(context.input(name)) for name in names]
    return stores[0] if len(stores) == 1 else TextStores(stores)


def the_residuals(context: Context, model: LanguageModel, saes: Sequence[SAE]) -> KeptResiduals | None:
    """The residual stream between the corpus pass and DFA of these SAEs, where it is to be kept."""
    plan = context.plan
    return kept_residuals(plan.config, plan.step("tokens").digest, context.settings, model, saes)


def shard_blocks(context: Context, store: TokenStore) -> range:
    """The blocks of the step's shard, as far as the text goes."""
    asked = context.plan.shard_blocks(context.step.item)
    return range(min(asked.start, len(store)), min(asked.stop, len(store)))


def analysed_blocks(context: Context, store: TokenStore) -> int:
    """Blocks that the tables summarise."""
    return min(context.plan.config.analysis.blocks, len(store))


R = TypeVar("R")


@contextmanager
def side_by_side(jobs: Iterable[Callable[[], R]]) -> Iterator[Iterator[R]]:
    """What each job gives, in order; as many at once as torch has threads.

    The first begin at once, beside whatever the block does before it asks for results. One more than are done
    at once is begun or held at a time, so that what nobody has read yet does not pile up.
    """
    with lanes() as pool:
        waiting, begun = iter(jobs), deque[Future[R]]()

        def begin(n: int) -> None:
            begun.extend(pool.submit(job) for job in islice(waiting, n))

        def results() -> Iterator[R]:
            while begun:
                found = begun.popleft().result()
                begin(1)
                yield found

        begin(torch.get_num_threads() + 1)
        yield results()


def joined(parts: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The rows of several sets of columns of one table."""
    tables = [as_table(name, part) for part in parts]
    rows = pa.concat_tables(tables) if tables else table(name).schema.empty_table()
    return {column: rows[column].combine_chunks() for column in rows.column_names}


def as_table(name: str, columns: Mapping[str, Any]) -> pa.Table:
    """Columns (arrays or constants) in the declared order and types of a table."""
    declared = table(name)
    lengths = {len(c) for c in columns.values() if not isinstance(c, str | int | float | bool | None)}
    n = max(lengths, default=1)
    arrays = {}
    for column in declared.columns:
        value = columns[column.name]
        if value is None or isinstance(value, str | int | float | bool):
            arrays[column.name] = pa.repeat(pa.scalar(value, column.type), n)
        else:
            arrays[column.name] = _array(value, column.type)
    return pa.table(arrays, schema=declared.schema)


def write_columns(folder: Path, name: str, columns: Mapping[str, Any]) -> None:
    """Write columns (arrays or constants) as a table of a step's output, sorted by its key."""
    rows = as_table(name, columns)
    key = [(column, "ascending") for column in table(name).key]
    # Whether it has to reach the disk is decided for the output as a whole.
    write_table(folder / f"{name}.parquet", name, rows.sort_by(key), flush=False)


@contextmanager
def tables_of(folder: Path, names: Iterable[str]) -> Iterator[dict[str, TableWriter]]:
    """Tables of a step's output that are written batch by batch, in the order of their keys."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(open_table(folder / f"{name}.parquet", name, flush=False))
            for name in names
        }


def _array(value: Any, kind: pa.DataType) -> pa.Array:
    """An Arrow array of the declared type; NaN becomes NULL."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f":
            return pa.array(value, mask=np.isnan(value)).cast(kind)
        return pa.array(value).cast(kind)
    return value if isinstance(value, pa.Array) else pa.array(value, kind, from_pandas=True)


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write dicts as a table; a key that a row lacks is NULL."""
    names = table(name).schema.names
    write_columns(folder, name, {column: [row.get(column) for row in rows] for column in names})
