"""What each kind of step does: read its inputs, call one room, write its output."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from atlas import __version__
from atlas.analysis import corpus as summaries
from atlas.analysis.dfa import DFAPass, Kept, columns_of, dfa_share
from atlas.analysis.shard import ShardPass, load_acts, load_moments
from atlas.analysis.weights import decoder_share, fve, logit_effects, weight_statistics
from atlas.corpus.sources import open_source
from atlas.corpus.tokens import TokenStore, build_token_store, load_tokenizer, vocabulary
from atlas.heads.measure import measure_heads
from atlas.lm.load import LanguageModel, load_model
from atlas.lm.runtime import prepare_torch
from atlas.pipeline.execute import RELEASE_NOTE, Context, StepFunction, output_of
from atlas.sae.evaluate import evaluate
from atlas.sae.files import load_sae, save_sae
from atlas.sae.harvest import Stream
from atlas.sae.model import SAE
from atlas.sae.train import Training
from atlas.store import release
from atlas.store.parquet import read_table, write_table
from atlas.tables import TABLES, table

CHECKPOINT = "training.safetensors"


# --------------------------------------------------------------------------- what several steps need


def _model(context: Context) -> LanguageModel:
    return load_model(context.plan.config.model, prepare_torch(context.settings))


def _store(context: Context) -> TokenStore:
    return TokenStore(context.input("tokens"))


def _saes(context: Context, model: LanguageModel) -> list[SAE]:
    folder = context.input("train")
    return [load_sae(folder / f"{i:05d}").to(model.device) for i in range(len(context.plan.sae_names))]


def _analysed(context: Context, store: TokenStore) -> int:
    """Blocks that the tables summarise."""
    return min(context.plan.config.analysis.blocks, len(store))


def _write(folder: Path, name: str, columns: Mapping[str, Any]) -> None:
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


def _write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    names = table(name).schema.names
    _write(folder, name, {column: [row.get(column) for row in rows] for column in names})


# --------------------------------------------------------------------------- the steps


def tokens(context: Context) -> None:
    """Text to token blocks."""
    config = context.plan.config
    source = open_source(config.corpus.source)
    build_token_store(
        context.out,
        source.spec,
        source.documents(),
        load_tokenizer(context.plan.files.path),
        context=config.corpus.context,
        blocks=config.corpus.blocks,
        progress=context.progress,
        least_blocks=config.evaluation.blocks + 1,
    )


def train(context: Context) -> None:
    """Train every SAE in one pass over the text."""
    config, model = context.plan.config, _model(context)
    chunk_tokens = config.train.batch * config.train.chunk_batches
    stream = Stream(_store(context), config.evaluation.blocks, chunk_tokens, config.train.seed)
    training = Training(model, stream, context.plan.sites, config.sae, config.train)
    for i, sae in enumerate(training.run(context.scratch / CHECKPOINT, context.progress)):
        save_sae(sae, context.out / f"{i:05d}")
    _write_rows(context.out, "training_log", training.log_rows())


def evaluate_saes(context: Context) -> None:
    """Judge every SAE on held-out text."""
    model = _model(context)
    blocks = context.plan.config.evaluation.blocks
    rows = evaluate(model, _saes(context, model), _store(context), blocks, context.progress)
    _write_rows(context.out, "sae_metrics", rows)


def heads(context: Context) -> None:
    """Score every head by where it looks."""
    model = _model(context)
    rows = measure_heads(model, _store(context), context.plan.config.evaluation.blocks, context.progress)
    _write_rows(context.out, "head_scores", [{"model": model.name, **row._asdict()} for row in rows])


def shard(context: Context) -> None:
    """One shard of the corpus pass."""
    model, store = _model(context), _store(context)
    asked = context.plan.shard_blocks(context.step.item)
    blocks = range(min(asked.start, len(store)), min(asked.stop, len(store)))
    work = ShardPass(model, _saes(context, model), store)
    work.run(blocks, context.progress)
    work.save(context.out)


def summarise(context: Context) -> None:
    """All tables of one SAE that come from its activations and its weights."""
    item, model, store = context.step.item, _model(context), _store(context)
    context.progress.update(0, 3, "reading activations")
    acts = load_acts(context.inputs("shard"), item)
    sae = load_sae(context.input("train") / f"{item:05d}").to(model.device)
    text = summaries.Text(store.blocks(np.arange(_analysed(context, store))), model.shape.d_vocab)
    name = {"sae": sae.info.name}
    context.progress.update(1, 3, "examples and statistics")
    corpus_tables = {
        "activation_histogram": summaries.activation_histogram(acts),
        "positions": summaries.positions(acts),
        "token_stats": summaries.token_stats(acts, text),
        "examples": summaries.examples(acts, context.plan.config.analysis.seed),
    }
    for which, columns in corpus_tables.items():
        _write(context.out, which, name | columns)
    context.progress.update(2, 3, "logit effects")
    effects, moments = logit_effects(model, sae)
    if effects:
        _write(context.out, "logit_effects", name | effects)
    nothing: dict[str, Any] = dict.fromkeys(("logit_mean", "logit_std", "logit_skew", "logit_kurtosis"))
    statistics = summaries.feature_statistics(acts, text) | weight_statistics(sae)
    top_head = _top_head(sae, model.shape.n_heads)
    _write(context.out, "features", name | statistics | {"top_head": top_head} | (nothing | moments))
    context.progress.update(3, 3)


def _has_heads(sae: SAE) -> bool:
    return sae.info.site.kind == "z" and sae.info.site.head is None


def _top_head(sae: SAE, n_heads: int) -> np.ndarray | None:
    if not _has_heads(sae):
        return None
    return decoder_share(sae.W_dec, n_heads).argmax(1).cpu().numpy()


def dfa(context: Context) -> None:
    """A second look at the kept examples of z SAEs: which head, looking where?"""
    model, store = _model(context), _store(context)
    found = [(i, sae) for i, sae in enumerate(_saes(context, model)) if _has_heads(sae)]
    parts = context.plan.of_kind("summarise")
    kept_tables = [
        read_table(output_of(parts[i], context.settings) / "examples.parquet", "examples") for i, _ in found
    ]
    kept = [
        Kept(*(t[c].to_numpy().astype(np.int64) for c in ("feature", "block", "position")))
        for t in kept_tables
    ]
    results = DFAPass(model, [sae for _, sae in found], kept).run(store, context.progress)
    shards = context.inputs("shard")
    for number, ((_, sae), where, examples, result) in enumerate(
        zip(found, kept, kept_tables, results, strict=True)
    ):
        folder = context.out / f"{number:05d}"
        folder.mkdir()
        keys = {c: examples[c].combine_chunks() for c in ("sae", "feature", "example_group", "rank")}
        bias = sae.bias_term.cpu().numpy()[where.feature]
        _write(folder, "dfa", keys | columns_of(result, bias))
        is_top = examples["example_group"].to_numpy() == "top"
        share = dfa_share(result, where.feature, is_top, sae.d_sae)
        covariance = load_moments(shards, sae.info.site).covariance()
        _write_attribution(folder, sae, model.shape.n_heads, share, covariance)


def _write_attribution(
    folder: Path, sae: SAE, n_heads: int, share: np.ndarray, covariance: np.ndarray
) -> None:
    columns = {
        "sae": sae.info.name,
        "feature": np.repeat(np.arange(sae.d_sae), n_heads),
        "head": np.tile(np.arange(n_heads), sae.d_sae),
        "decoder_share": decoder_share(sae.W_dec, n_heads).cpu().numpy().ravel(),
        "fve": fve(sae.W_enc.cpu().numpy(), covariance, n_heads).ravel(),
        "dfa_share": share.ravel(),
    }
    _write(folder, "head_attribution", columns)


def reference(context: Context) -> None:
    """Tables that say what the others are about: models, vocab, docs, saes."""
    model, store = _model(context), _store(context)
    tokenizer = load_tokenizer(model.files.path)
    shape = model.shape._asdict()
    row = {"model": model.name, "processing": model.processing, **shape}
    _write_rows(context.out, "models", [row | {"source": model.files.source, "digest": model.files.digest}])
    texts, raw = vocabulary(tokenizer, model.shape.d_vocab)
    vocab = {"model": model.name, "token": np.arange(len(texts)), "text": texts, "bytes": raw}
    _write(context.out, "vocab", vocab)
    n = _analysed(context, store)
    docs = {
        "corpus": store.meta.corpus,
        "block": np.arange(n),
        "tokens": store.blocks(np.arange(n)).tolist(),
        "source": [store.source(block) for block in range(n)],
    }
    _write(context.out, "docs", docs)
    n_tokens = n * (store.meta.context - 1)
    _write_rows(context.out, "saes", [_sae_row(sae, n_tokens) for sae in _saes(context, model)])


def _sae_row(sae: SAE, n_tokens: int) -> dict[str, Any]:
    info = sae.info
    return {
        "sae": info.name,
        "model": info.model,
        "site": info.site.kind,
        "layer": info.site.layer,
        "head": info.site.head,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "architecture": info.architecture,
        "k": info.k,
        "l1_coefficient": info.l1_coefficient,
        "processing": info.processing,
        "include_bos": False,
        "tokens_trained": info.tokens_trained,
        "corpus": info.corpus,
        "n_tokens": n_tokens,
        "seed": info.seed,
        "origin": info.origin,
        "digest": sae.digest(),
        "code_version": info.code_version,
    }


def publish(context: Context) -> None:
    """Gather every table into the next version of the release and make it current."""
    folders = [output_of(step, context.settings) for step in context.plan.steps if step.kind != "publish"]
    parts = {name: sorted(p for f in folders for p in f.rglob(f"{name}.parquet")) for name in TABLES}
    context.progress.update(0, 1, "building the release")
    plan, meta = context.plan, _store(context).meta
    provenance = {
        "config": plan.config.to_json(),
        "model": plan.files.name,
        "model_digest": plan.files.digest,
        "processing": plan.config.model.processing,
        "corpus": meta.corpus,
        "corpus_blocks": str(meta.n_blocks),
        "corpus_documents": str(meta.documents),
        "context": str(meta.context),
        "seed": str(plan.config.train.seed),
        "code_version": __version__,
    }
    info = release.publish(context.settings.releases, plan.config.release_name, parts, provenance)
    note = {"name": info.name, "version": info.version, "digest": info.digest, "file": info.path.name}
    (context.out / RELEASE_NOTE).write_text(json.dumps(note), encoding="utf8")
    context.progress.update(1, 1, f"{info.name} version {info.version}")


STEPS: dict[str, StepFunction] = {
    "tokens": tokens,
    "train": train,
    "evaluate": evaluate_saes,
    "heads": heads,
    "shard": shard,
    "summarise": summarise,
    "dfa": dfa,
    "reference": reference,
    "publish": publish,
}
