"""Steps that make tables: shards of the corpus pass, summaries, DFA, reference tables, the release."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from atlas import __version__
from atlas.analysis import corpus as summaries
from atlas.analysis.dfa import DFAPass, Kept, columns_of, dfa_share
from atlas.analysis.shard import ShardPass, load_acts, load_moments
from atlas.analysis.weights import (
    attribution_directions,
    decoder_share,
    fve,
    logit_effects,
    weight_statistics,
)
from atlas.corpus.tokens import load_tokenizer, vocabulary
from atlas.pipeline.execute import RELEASE_NOTE, Context
from atlas.pipeline.inputs import (
    analysed_blocks,
    the_model,
    the_sae,
    the_saes,
    the_text,
    write_columns,
    write_rows,
)
from atlas.pipeline.refining import pruned_of
from atlas.sae.model import SAE
from atlas.store import release
from atlas.store.parquet import read_table
from atlas.tables import TABLES


def shard(context: Context) -> None:
    """One shard of the corpus pass."""
    model, store = the_model(context), the_text(context)
    asked = context.plan.shard_blocks(context.step.item)
    blocks = range(min(asked.start, len(store)), min(asked.stop, len(store)))
    work = ShardPass(model, the_saes(context, model), store)
    work.run(blocks, context.progress)
    work.save(context.out)


def summarise(context: Context) -> None:
    """All tables of one SAE that come from its activations and its weights."""
    item, model, store = context.step.item, the_model(context), the_text(context)
    context.progress.update(0, 3, "reading activations")
    acts = load_acts(context.inputs("shard"), item)
    sae = the_sae(context, item).to(model.device)
    text = summaries.Text(store.blocks(np.arange(analysed_blocks(context, store))), model.shape.d_vocab)
    name = {"sae": sae.info.name}
    context.progress.update(1, 3, "examples and statistics")
    corpus_tables = {
        "activation_histogram": summaries.activation_histogram(acts),
        "positions": summaries.positions(acts),
        "token_stats": summaries.token_stats(acts, text),
        "examples": summaries.examples(acts, context.plan.config.analysis.seed),
    }
    for which, columns in corpus_tables.items():
        write_columns(context.out, which, name | columns)
    context.progress.update(2, 3, "logit effects")
    effects, moments = logit_effects(model, sae)
    if effects:
        write_columns(context.out, "logit_effects", name | effects)
    nothing: dict[str, Any] = dict.fromkeys(("logit_mean", "logit_std", "logit_skew", "logit_kurtosis"))
    statistics = summaries.feature_statistics(acts, text) | weight_statistics(sae)
    statistics |= {"pruned": pruned_of(context, item)}
    top_head = _top_head(sae, model.shape.n_heads)
    write_columns(context.out, "features", name | statistics | {"top_head": top_head} | (nothing | moments))
    context.progress.update(3, 3)


def _has_heads(sae: SAE) -> bool:
    return sae.info.site.kind == "z" and sae.info.site.head is None


def _top_head(sae: SAE, n_heads: int) -> np.ndarray | None:
    if not _has_heads(sae):
        return None
    return decoder_share(sae.decoder_directions, n_heads).argmax(1).cpu().numpy()


def dfa(context: Context) -> None:
    """A second look at the kept examples of z SAEs: which head, looking where?"""
    model, store = the_model(context), the_text(context)
    found = [(i, sae) for i, sae in enumerate(the_saes(context, model)) if _has_heads(sae)]
    parts = context.plan.of_kind("summarise")
    kept_tables = [
        read_table(context.input(parts[i].name) / "examples.parquet", "examples") for i, _ in found
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
        write_columns(folder, "dfa", keys | columns_of(result, bias))
        is_top = examples["example_group"].to_numpy() == "top"
        share = dfa_share(result, where.feature, is_top, sae.d_sae)
        covariance = load_moments(shards, sae.info.site, sae.info.normalize_activations).covariance()
        _write_attribution(folder, sae, model.shape.n_heads, share, covariance)


def _write_attribution(
    folder: Path, sae: SAE, n_heads: int, share: np.ndarray, covariance: np.ndarray
) -> None:
    columns = {
        "sae": sae.info.name,
        "feature": np.repeat(np.arange(sae.d_sae), n_heads),
        "head": np.tile(np.arange(n_heads), sae.d_sae),
        "decoder_share": decoder_share(sae.decoder_directions, n_heads).cpu().numpy().ravel(),
        "fve": fve(attribution_directions(sae).cpu().numpy(), covariance, n_heads).ravel(),
        "dfa_share": share.ravel(),
    }
    write_columns(folder, "head_attribution", columns)


def reference(context: Context) -> None:
    """Tables that say what the others are about: models, vocab, docs, saes."""
    model, store = the_model(context), the_text(context)
    tokenizer = load_tokenizer(model.files.path)
    shape = model.shape._asdict()
    row = {"model": model.name, "processing": model.processing, **shape}
    write_rows(context.out, "models", [row | {"source": model.files.source, "digest": model.files.digest}])
    texts, raw = vocabulary(tokenizer, model.shape.d_vocab)
    vocab = {"model": model.name, "token": np.arange(len(texts)), "text": texts, "bytes": raw}
    write_columns(context.out, "vocab", vocab)
    n = analysed_blocks(context, store)
    docs = {
        "corpus": store.meta.corpus,
        "block": np.arange(n),
        "tokens": store.blocks(np.arange(n)).tolist(),
        "source": [store.source(block) for block in range(n)],
    }
    write_columns(context.out, "docs", docs)
    n_tokens = n * (store.meta.context - 1)
    write_rows(context.out, "saes", [_sae_row(sae, n_tokens) for sae in the_saes(context, model)])


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
        "normalize_activations": info.normalize_activations,
        "processing": info.processing,
        "include_bos": False,
        "tokens_trained": info.tokens_trained,
        "corpus": info.corpus,
        "n_tokens": n_tokens,
        "seed": info.seed,
        "origin": info.origin,
        "settings": info.settings,
        "digest": sae.digest(),
        "code_version": info.code_version,
    }


def publish(context: Context) -> None:
    """Gather every table into the next version of the release and make it current."""
    folders = [context.input(name) for name in context.step.needs]
    parts = {name: sorted(p for f in folders for p in f.rglob(f"{name}.parquet")) for name in TABLES}
    context.progress.update(0, 1, "building the release")
    plan, meta = context.plan, the_text(context).meta
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
    note["bytes"] = info.path.stat().st_size
    (context.out / RELEASE_NOTE).write_text(json.dumps(note), encoding="utf8")
    context.progress.update(1, 1, f"{info.name} version {info.version}")
