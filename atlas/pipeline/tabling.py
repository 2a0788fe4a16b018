"""Steps that say what the tables are about, and gather them into a release."""

import json
from typing import Any

import numpy as np

from atlas import __version__
from atlas.corpus.tokens import load_tokenizer, vocabulary
from atlas.pipeline.execute import RELEASE_NOTE, Context
from atlas.pipeline.inputs import (
    analysed_blocks,
    the_analysed_text,
    the_model,
    the_saes,
    the_text,
    write_columns,
    write_rows,
)
from atlas.pipeline.wiring import CODE_VERSIONS
from atlas.sae.model import SAE
from atlas.store import published
from atlas.tables import TABLES


def reference(context: Context) -> None:
    """Tables that say what the others are about: models, vocab, docs, saes."""
    model, store = the_model(context), the_analysed_text(context)
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
        "code_versions": json.dumps(CODE_VERSIONS, sort_keys=True),
    }
    info = published.publish(context.settings, plan.config.release_name, parts, provenance)
    note = {"name": info.name, "version": info.version, "digest": info.digest, "file": info.path.name}
    note["bytes"] = info.path.stat().st_size if info.size is None else info.size
    (context.out / RELEASE_NOTE).write_text(json.dumps(note), encoding="utf8")
    context.progress.update(1, 1, f"{info.name} version {info.version}")
