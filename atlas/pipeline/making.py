"""Steps that run the model to make SAEs and judge them: tokens, train, evaluate, heads."""

from atlas.corpus.sources import open_source
from atlas.corpus.tokens import build_token_store, load_tokenizer
from atlas.heads.measure import measure_heads
from atlas.pipeline.execute import Context
from atlas.pipeline.inputs import the_model, the_saes, the_source, the_stream, the_text, write_rows
from atlas.pipeline.wiring import text_ranges
from atlas.progress import Progress
from atlas.sae.context import harvested
from atlas.sae.evaluate import evaluate
from atlas.sae.files import save_sae
from atlas.sae.train import Training

CHECKPOINT, LIVE = "training.safetensors", "live.jsonl"


def tokens(context: Context) -> None:
    """Text to token blocks: those of the training, or what the analysis reads after them."""
    config, extends = context.plan.config, context.step.item > 0
    blocks = text_ranges(config)[context.step.item]
    source = open_source(config.corpus.source)
    build_token_store(
        context.out,
        source.spec,
        source.documents(),
        load_tokenizer(context.plan.files.path),
        context=config.corpus.context,
        blocks=len(blocks),
        progress=context.progress,
        least_blocks=0 if extends else config.evaluation.blocks + 1,
        skip=blocks.start,
    )


def train(context: Context) -> None:
    """Train the SAEs of one part of the sites in one pass over the text."""
    config, model, step = context.plan.config, the_model(context), context.step
    sites, stream = context.plan.parts[step.item], the_stream(context)
    source = the_source(context, model, stream, harvested(sites, config.sae))
    training = Training(model, stream, sites, config.sae, config.train, source)
    live = context.scratch / LIVE
    found = training.run(context.scratch / CHECKPOINT, context.progress, live)
    by_name = {sae.info.name: sae for sae in found}
    for member in context.plan.saes:
        if member.step == step.name:
            save_sae(by_name[member.name], context.out / f"{member.item:05d}")
    for name, rows in training.tables().items():
        write_rows(context.out, name, rows)


class _Share:
    """Progress of one of several equal shares of a step."""

    def __init__(self, progress: Progress, number: int, of: int) -> None:
        self.progress, self.number, self.of = progress, number, of

    def update(self, done: int, total: int, message: str = "") -> None:
        self.progress.update(self.number * total + done, self.of * total, message)


def evaluate_saes(context: Context) -> None:
    """Judge every SAE on held-out text: after its last stage and, if there are several, after each."""
    model, store, stages = the_model(context), the_text(context), context.plan.stages
    blocks = context.plan.config.evaluation.blocks
    of_stage = {}
    for number, stage in enumerate(stages):
        share = _Share(context.progress, number, len(stages))
        of_stage[stage] = evaluate(model, the_saes(context, model, stage), store, blocks, share)
    write_rows(context.out, "sae_metrics", of_stage[stages[-1]])
    if len(stages) > 1:
        rows = [{"stage": stage, **row} for stage, found in of_stage.items() for row in found]
        write_rows(context.out, "sae_stages", rows)


def heads(context: Context) -> None:
    """Measure every head by itself: where it looks, its weights, induction, and the loss without it."""
    config, model = context.plan.config, the_model(context)
    blocks = config.evaluation.blocks
    found = measure_heads(model, the_text(context), blocks, config.heads, context.progress)
    for name, rows in found.items():
        write_rows(context.out, name, rows)
