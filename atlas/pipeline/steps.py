"""The registry: each kind of step and the function that carries it out."""

from atlas.pipeline import attributing, making, pairing, refining, summarising, tabling
from atlas.pipeline.execute import StepFunction

STEPS: dict[str, StepFunction] = {
    "tokens": making.tokens,
    "train": making.train,
    "imports": refining.imports,
    "prune": refining.prune,
    "finetune": refining.finetune,
    "evaluate": making.evaluate_saes,
    "heads": making.heads,
    "shard": summarising.shard,
    "effects": summarising.effects,
    "summarise": summarising.summarise,
    "dfa": attributing.dfa,
    "attribute": attributing.attribute,
    "pair": pairing.pair,
    "reference": tabling.reference,
    "publish": tabling.publish,
}
