"""A step that ran out of memory is done again with smaller batches."""

import gc
import logging
from collections.abc import Callable

import torch

from atlas.errors import AtlasError
from atlas.lm.runtime import smaller_batches
from atlas.pipeline.retries import is_out_of_memory
from atlas.pipeline.wiring import Step

log = logging.getLogger("atlas.step")

HALVINGS = 4
DIVISIBLE = frozenset({"evaluate", "heads", "shard", "effects", "dfa"})
"""Steps that read the text in batches of blocks and keep sums over all of them."""


def within_memory(make: Callable[[], None], step: Step) -> None:
    """Do ``make``; out of memory, again with batches of a half, a quarter, ... a sixteenth.

    Sums over blocks are kept in float64, but products of other shapes may round their last bit otherwise in
    float32; the tables are rounded to fewer digits than that.

    Raises:
        AtlasError: the memory does not suffice for the smallest batches either, or the step has none.
    """
    halvings = 0
    while True:
        try:
            with smaller_batches(halvings):
                return make()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if step.kind not in DIVISIBLE or halvings == HALVINGS:
                raise AtlasError(_advice(step, halvings, error)) from error
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
        halvings += 1
        log.warning("out of memory (%s): again with batches of 1/%d", said, 2**halvings)
        # Only now is the failed attempt's traceback gone, and with it what it held.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _advice(step: Step, halvings: int, error: Exception) -> str:
    tried = f", even with batches of 1/{2**halvings}" if halvings else ""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"step {step.name!r} ran out of memory{tried} ({said}); allowed: a machine with more, fewer SAEs in "
        "one build, or for training a smaller train.batch or more train.parts"
    )
