"""Steps that run the model to make SAEs and judge them: tokens, train, evaluate, heads."""

from atlas.corpus.sources import open_source
from atlas.corpus.tokens import build_token_store, load_tokenizer
from atlas.heads.measure import measure_heads
from atlas.pipeline.execute import Context
from atlas.pipeline.inputs import the_model, the_saes, the_text, write_rows
from atlas.sae.evaluate import evaluate
from atlas.sae.files import save_sae
from atlas.sae.harvest import Stream
from atlas.sae.train import Training

CHECKPOINT = "training.safetensors"


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
    config, model = context.plan.config, the_model(context)
    chunk_tokens = config.train.batch * config.train.chunk_batches
    stream = Stream(the_text(context), config.evaluation.blocks, chunk_tokens, config.train.seed)
    training = Training(model, stream, context.plan.sites, config.sae, config.train)
    for i, sae in enumerate(training.run(context.scratch / CHECKPOINT, context.progress)):
        save_sae(sae, context.out / f"{i:05d}")
    write_rows(context.out, "training_log", training.log_rows())


def evaluate_saes(context: Context) -> None:
    """Judge every SAE on held-out text."""
    model = the_model(context)
    blocks = context.plan.config.evaluation.blocks
    rows = evaluate(model, the_saes(context, model), the_text(context), blocks, context.progress)
    write_rows(context.out, "sae_metrics", rows)


def heads(context: Context) -> None:
    """Score every head by where it looks."""
    model = the_model(context)
    rows = measure_heads(model, the_text(context), context.plan.config.evaluation.blocks, context.progress)
    write_rows(context.out, "head_scores", [{"model": model.name, **row._asdict()} for row in rows])
