"""What several kinds of step need: the model, the text, the SAEs; and columns written as a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from atlas.corpus.tokens import TokenStore
from atlas.lm.load import LanguageModel, load_model
from atlas.lm.runtime import prepare_torch
from atlas.pipeline.execute import Context
from atlas.sae.files import load_sae
from atlas.sae.model import SAE
from atlas.store.parquet import write_table
from atlas.tables import table


def the_model(context: Context) -> LanguageModel:
    """The model of the build, on this machine's device."""
    return load_model(context.plan.config.model, prepare_torch(context.settings))


def the_text(context: Context) -> TokenStore:
    """The token store of the build."""
    return TokenStore(context.input("tokens"))


def the_saes(context: Context, model: LanguageModel) -> list[SAE]:
    """The trained SAEs, in the plan's order."""
    folder = context.input("train")
    return [load_sae(folder / f"{i:05d}").to(model.device) for i in range(len(context.plan.sae_names))]


def analysed_blocks(context: Context, store: TokenStore) -> int:
    """Blocks that the tables summarise."""
    return min(context.plan.config.analysis.blocks, len(store))


def write_columns(folder: Path, name: str, columns: Mapping[str, Any]) -> None:
    """Write columns (arrays or constants) as a table, sorted by its key."""
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
    rows = pa.table(arrays, schema=declared.schema)
    write_table(folder / f"{name}.parquet", name, rows.sort_by([(key, "ascending") for key in declared.key]))


def _array(value: Any, kind: pa.DataType) -> pa.Array:
    """An Arrow array of the declared type; NaN in a float column that may be NULL becomes NULL."""
    if isinstance(value, np.ndarray):
        if pa.types.is_floating(kind):
            return pa.array(value, mask=np.isnan(value)).cast(kind)
        return pa.array(value).cast(kind)
    return value if isinstance(value, pa.Array) else pa.array(value, kind)


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write dicts as a table; a key that a row lacks is NULL."""
    names = table(name).schema.names
    write_columns(folder, name, {column: [row.get(column) for row in rows] for column in names})
