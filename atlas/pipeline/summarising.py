"""Steps that read the whole text: shards of the corpus pass, loss effects, and the tables of one SAE."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from atlas.analysis import corpus
from atlas.analysis.acts import FeatureActs, Ints
from atlas.analysis.arrays import UNREADABLE, read_npz
from atlas.analysis.coactivation import coactivation
from atlas.analysis.effects import LossEffects
from atlas.analysis.examples import examples
from atlas.analysis.logits import logit_effects
from atlas.analysis.neighbours import neighbours
from atlas.analysis.qk import position_products, qk_partners, qk_products
from atlas.analysis.shard import ShardPass, load_misses, stored_acts
from atlas.analysis.text import Text
from atlas.analysis.weights import decoder_share, has_heads, weight_statistics
from atlas.corpus.tokens import TokenStore
from atlas.errors import StoreError
from atlas.lm.load import LanguageModel
from atlas.pipeline.execute import Context
from atlas.pipeline.inputs import (
    analysed_blocks,
    as_table,
    joined,
    shard_blocks,
    side_by_side,
    tables_of,
    the_analysed_text,
    the_model,
    the_residuals,
    the_saes,
    write_columns,
)
from atlas.pipeline.refining import pruned_of
from atlas.sae.model import SAE
from atlas.sites import partner

_CORPUS_TABLES = ("features", "activation_counts", "position_counts", "token_stats", "examples")


def shard(context: Context) -> None:
    """One shard of the corpus pass."""
    model, store = the_model(context), the_analysed_text(context)
    blocks = shard_blocks(context, store)
    saes = the_saes(context, model)
    residuals = the_residuals(context, model, saes)
    if residuals is not None and not residuals.has_room(blocks):
        residuals = None
    work = ShardPass(model, saes, store, residuals)
    work.run(blocks, context.progress)
    work.save(context.out)


def effects(context: Context) -> None:
    """What ablating each feature would do to the loss, on a sample of the text."""
    model, store = the_model(context), the_analysed_text(context)
    saes = the_saes(context, model)
    work = LossEffects(model, saes, store)
    work.run(range(min(context.plan.config.analysis.loss_blocks, len(store))), context.progress)
    for number, found in enumerate(work.finish()):
        np.savez(context.out / f"{number:05d}.npz", allow_pickle=False, **found)


def summarise(context: Context) -> None:
    """All tables of one SAE that come from its activations and its weights."""
    item, model = context.step.item, the_model(context)
    name = {"sae": context.plan.saes[item].name}
    ranges: list[range] = []
    # Inputs are looked up, and checked, before there are threads to look twice.
    shards, store = context.inputs("shard"), the_analysed_text(context)

    def jobs() -> Iterator[Callable[[], Any]]:
        yield partial(_write_coactivation, context, item, name)
        work, found = _corpus_work(context, item, shards, store)
        ranges.extend(found)
        yield from (partial(work, features) for features in found)

    with tables_of(context.out, _CORPUS_TABLES) as tables, side_by_side(jobs()) as results:
        saes = the_saes(context, model)
        d_sae = saes[item].d_sae
        context.progress.update(0, d_sae, "weights")
        write_columns(context.out, "neighbours", name | neighbours(model, saes, item))
        of_features = _of_weights(context, model, saes, item)
        next(results)
        for features, found in zip(ranges, results, strict=True):
            found["features"] |= {c: v[features.start : features.stop] for c, v in of_features.items()}
            for table, columns in found.items():
                columns["feature"] = columns["feature"] + features.start
                tables[table].write(as_table(table, name | columns))
            context.progress.update(features.stop, d_sae, "features")


def _corpus_work(
    context: Context, item: int, shards: Sequence[Path], store: TokenStore
) -> tuple[Callable[[range], dict[str, corpus.Columns]], list[range]]:
    """What makes the tables that read activations of some features, and the ranges to make them for."""
    acts, misses = stored_acts(shards, item), load_misses(shards, item)
    text = Text(store, analysed_blocks(context, store), store.meta.context, context.plan.shape.d_vocab)
    seed = context.plan.config.analysis.seed

    def work(features: range) -> dict[str, corpus.Columns]:
        part = acts.read(features)
        n_top = corpus.strongest_positions(part)
        return {
            "features": feature_columns(part, text, n_top),
            "activation_counts": corpus.activation_counts(part),
            "position_counts": corpus.position_counts(part, n_top),
            "token_stats": corpus.token_stats(part, text),
            "examples": examples(part, misses.finish(features), seed),
        }

    return work, list(acts.ranges())


def feature_columns(acts: FeatureActs, text: Text, n_top: Ints) -> dict[str, Any]:
    """What the activations alone say about features; ``n_top`` as in ``corpus.position_counts``."""
    traits = corpus.position_traits(acts, n_top) | corpus.token_traits(acts, text)
    return corpus.feature_statistics(acts, text) | traits


def _of_weights(
    context: Context, model: LanguageModel, saes: Sequence[SAE], item: int
) -> dict[str, np.ndarray]:
    """Write what the SAE's directions do; what they and sampled gradients say about features."""
    sae = saes[item]
    found = logit_effects(model, sae)
    for table, columns in found.tables.items():
        write_columns(context.out, table, {"sae": sae.info.name} | columns)
    _write_qk(context, model, saes, item)
    return _weight_columns(context, sae, item, model.shape.n_heads) | found.moments


def _weight_columns(context: Context, sae: SAE, item: int, n_heads: int) -> dict[str, np.ndarray]:
    pruned = np.broadcast_to(pruned_of(context, item), sae.d_sae)
    top_head = np.full(sae.d_sae, np.nan)
    if has_heads(sae):
        top_head = decoder_share(sae.decoder_directions, n_heads).argmax(1).cpu().numpy()
    path = context.input("effects") / f"{item:05d}.npz"
    try:
        file = read_npz(path)
        loss = {name: file[name] for name in ("loss_effect", "n_loss")}
    except UNREADABLE as error:
        raise StoreError(f"loss effects in {str(path)!r} cannot be read: {error}") from None
    return weight_statistics(sae) | {"pruned": pruned, "top_head": top_head} | loss


def _write_coactivation(context: Context, item: int, name: dict[str, str]) -> None:
    analysis, store = context.plan.config.analysis, the_analysed_text(context)
    blocks = min(analysis.coactivation_blocks, analysed_blocks(context, store))
    first = context.inputs("shard")[: -(-blocks // analysis.shard_blocks)]
    stored = stored_acts(first, item)
    acts = stored.read(range(stored.d_sae), before=blocks * stored.context)
    write_columns(context.out, "coactivation", name | coactivation(acts, blocks * (stored.context - 1)))


def _write_qk(context: Context, model: LanguageModel, saes: Sequence[SAE], item: int) -> None:
    """Products with the features of the same head's other side, and with the positions."""
    sae = saes[item]
    if sae.info.site.kind not in ("q", "k"):
        return
    name = {"sae": sae.info.name}
    others = [other for other in saes if other.info.site == partner(sae.info.site)]
    parts = [name | {"other_sae": other.info.name} | qk_partners(sae, other) for other in others]
    write_columns(context.out, "qk_partners", joined(parts, "qk_partners"))
    if sae.info.site.kind == "q":
        rows = [name | {"other_sae": other.info.name} | qk_products(sae, other) for other in others]
        write_columns(context.out, "qk_products", joined(rows, "qk_products"))
    products = position_products(model, sae, context.plan.config.corpus.context)
    if products:
        write_columns(context.out, "position_products", name | products)
