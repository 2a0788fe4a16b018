"""Whether the corpus pass keeps the residual stream for DFA, and where: on this disk, within a bound."""

import shutil
from collections.abc import Sequence

from atlas.analysis.dfa import reads_heads
from atlas.analysis.examples import N_GROUPS, N_RANDOM, PER_GROUP, TOP_EXAMPLES
from atlas.analysis.residuals import KeptResiduals
from atlas.analysis.shard import BATCH_BLOCKS
from atlas.lm.attention import replays
from atlas.lm.load import LanguageModel
from atlas.lm.runtime import batch_of
from atlas.pipeline.execute import Context
from atlas.sae.cache_folder import held_bytes
from atlas.sae.model import SAE
from atlas.settings import Settings

_EXAMPLES = TOP_EXAMPLES + N_GROUPS * PER_GROUP + N_RANDOM


def the_residuals(context: Context, model: LanguageModel, saes: Sequence[SAE]) -> KeptResiduals | None:
    """The residual stream before the layers whose heads ``saes`` read; None where keeping it would not help.

    It would not on a GPU, which runs the model faster than a disk is read; where DFA will look at few of the
    blocks; for SAEs on attn_out; and for models whose attention does not follow from it alone.
    """
    plan, settings = context.plan, context.settings
    reading = [sae for sae in saes if reads_heads(sae)]
    few = _EXAMPLES * sum(sae.d_sae for sae in reading) < plan.config.analysis.blocks
    if settings.residual_gb == 0 or few or model.device.type != "cpu":
        return None
    size, length = batch_of(BATCH_BLOCKS), plan.config.corpus.context
    if any(sae.info.site.kind != "z" for sae in reading) or not replays(model, size, length):
        return None
    text = {"text": plan.step("tokens").digest, "context": length}
    layers, room = [sae.info.site.layer for sae in reading], _room(settings)
    return KeptResiduals(model, layers, text, size, settings.residuals, room)


def _room(settings: Settings) -> int:
    """Bytes for all texts: what the settings allow, and never more than half of the disk that is free."""
    held = held_bytes(settings.residuals)
    return min(int(settings.residual_gb * 1e9), held + shutil.disk_usage(settings.home).free // 2)
