"""Steps that look again at the kept examples: DFA of a part of the text, and each SAE's tables of it."""

from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from atlas.analysis.dfa import DFAPass, Kept, reads_heads
from atlas.analysis.dfa_rows import StoredRows, columns_of
from atlas.analysis.dfa_sums import DFASums
from atlas.analysis.dfa_tokens import source_tokens
from atlas.analysis.examples import GROUPS, NEGATIVE
from atlas.analysis.logits import logit_share
from atlas.analysis.shard import load_moments, load_shares
from atlas.analysis.text import Text
from atlas.analysis.variance import fve
from atlas.analysis.weights import attribution_directions, decoder_share, has_heads
from atlas.lm.load import LanguageModel
from atlas.pipeline.execute import Context
from atlas.pipeline.inputs import (
    as_table,
    shard_blocks,
    side_by_side,
    tables_of,
    the_analysed_text,
    the_model,
    the_residuals,
    the_sae,
    the_saes,
    write_columns,
)
from atlas.pipeline.keeping import can_keep
from atlas.sae.model import SAE

FEATURES_AT_ONCE, PER_PART = 512, 1024
_PLACES = ("feature", "rank", "block", "position")


def dfa(context: Context) -> None:
    """DFA of the kept examples in one shard of the text, of every SAE that reads heads."""
    model, store = the_model(context), the_analysed_text(context)
    blocks = shard_blocks(context, store)
    found = [(item, sae) for item, sae in enumerate(the_saes(context, model)) if reads_heads(sae)]
    saes = [sae for _, sae in found]
    residuals, as_kept = the_residuals(context, model, saes), can_keep(context.plan.config, model, saes)
    summaries = context.plan.of_kind("summarise")
    paths = [context.input(summaries[item].name) / "examples.parquet" for item, _ in found]
    with side_by_side([partial(_kept, path, blocks) for path in paths]) as kept:
        work = DFAPass(model, saes, list(kept), residuals, as_kept=as_kept)
    work.run(store, blocks, context.progress)
    saves: list[Callable[[], None]] = []
    for (item, _), rows, sums in zip(found, work.rows, work.sums, strict=True):
        saves.append(partial(rows.save, context.out / f"rows-{item:05d}"))
        saves.append(partial(sums.save, context.out / f"sums-{item:05d}.npz"))
    with side_by_side(saves) as saved:
        list(saved)
    if residuals is not None:
        residuals.forget(blocks)


def _kept(path: Path, blocks: range) -> Kept:
    """The kept examples in some blocks on which a feature fires, read a row group at a time."""
    parts = []
    # Groups come as numbers of a few names: as names, they would take longer than everything else.
    with pq.ParquetFile(path, read_dictionary=["example_group"]) as file:
        for batch in file.iter_batches(columns=["example_group", *_PLACES]):
            block_of = batch["block"].to_numpy()
            rows = np.flatnonzero((blocks.start <= block_of) & (block_of < blocks.stop))
            group = batch["example_group"]
            codes = np.searchsorted(GROUPS, group.dictionary.to_numpy(zero_copy_only=False).astype(str))
            code = codes[group.indices.to_numpy()[rows]]
            columns = (batch[c].to_numpy()[rows].astype(np.int64) for c in _PLACES)
            feature, rank, block, position = columns
            part = Kept(feature, code, rank, block, position)
            parts.append(part.at(code != NEGATIVE))
    empty = np.empty(0, np.int64)
    nothing = Kept(empty, empty, empty, empty, empty)
    return Kept(*(np.concatenate(columns) for columns in zip(nothing, *parts, strict=True)))


def attribute(context: Context) -> None:
    """The tables of one SAE that say which heads, looking where, make its features fire.

    Those of single examples are written in parts, side by side: most of the time is that of writing them.
    """
    item, model = context.step.item, the_model(context)
    sae, parts = the_sae(context, item).to(model.device), context.inputs("dfa")
    stored = StoredRows([part / f"rows-{item:05d}" for part in parts])
    store = the_analysed_text(context)
    text = Text(store, len(store), store.meta.context, model.shape.d_vocab)

    def work(features: range) -> None:
        folder = context.out / f"from-{features.start:06d}"
        folder.mkdir()
        with tables_of(folder, ("dfa", "dfa_tokens")) as tables:
            for some in features[::FEATURES_AT_ONCE]:
                rows = stored.read(range(some, min(some + FEATURES_AT_ONCE, features.stop)))
                for table, columns in (("dfa", columns_of(rows)), ("dfa_tokens", source_tokens(rows, text))):
                    tables[table].write(as_table(table, {"sae": sae.info.name} | columns))

    ranges = _parts(sae.d_sae)
    jobs = [partial(_write_sums, context, model, sae), *(partial(work, features) for features in ranges)]
    with side_by_side(jobs) as done:
        next(done)
        for features, _ in zip(ranges, done, strict=True):
            context.progress.update(features.stop, sae.d_sae, "features")


def _parts(d_sae: int) -> list[range]:
    """Runs of features that are written side by side; short ones, as a step that is stopped ends those begun.

    >>> _parts(1500)
    [range(0, 1024), range(1024, 1500)]
    """
    return [range(start, min(start + PER_PART, d_sae)) for start in range(0, d_sae, PER_PART)]


def _write_sums(context: Context, model: LanguageModel, sae: SAE) -> None:
    """The tables that come from sums over examples, and what weights and moments say about heads."""
    item, name = context.step.item, {"sae": sae.info.name}
    parts = context.inputs("dfa")
    sums = reduce(DFASums.merge, (DFASums.load(part / f"sums-{item:05d}.npz") for part in parts))
    write_columns(context.out, "dfa_summary", name | sums.summary())
    write_columns(context.out, "dfa_distances", name | sums.distances())
    if has_heads(sae):
        write_columns(context.out, "head_attribution", name | _head_columns(context, model, sae, sums))


def _head_columns(context: Context, model: LanguageModel, sae: SAE, sums: DFASums) -> dict[str, Any]:
    shards = context.inputs("shard")
    n_heads, item = model.shape.n_heads, context.step.item
    covariance = load_moments(shards, sae.info.site, sae.info.normalize_activations).covariance()
    W = attribution_directions(sae).cpu().numpy()
    shares = load_shares(shards, item, sae, n_heads)
    return {
        "feature": np.repeat(np.arange(sae.d_sae), n_heads),
        "head": np.tile(np.arange(n_heads), sae.d_sae),
        "decoder_share": decoder_share(sae.decoder_directions, n_heads).cpu().numpy().ravel(),
        "fve": fve(W, covariance, n_heads).ravel(),
        "fve_active": shares.finish().ravel(),
        "dfa_share": sums.dfa_share().ravel(),
        "logit_share": logit_share(model, sae).ravel(),
        **sums.head_columns(),
    }
