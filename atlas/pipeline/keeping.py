"""Whether the corpus pass keeps the residual stream for DFA, and where: on this disk, within a bound."""

import logging
import shutil
from collections.abc import Sequence

from atlas.analysis.dfa import reads_heads
from atlas.analysis.examples import N_GROUPS, N_RANDOM, PER_GROUP, TOP_EXAMPLES
from atlas.analysis.residuals import KeptResiduals
from atlas.analysis.shard import BATCH_BLOCKS
from atlas.configs import BuildConfig
from atlas.errors import StoreError
from atlas.lm.attention import replays
from atlas.lm.load import LanguageModel
from atlas.lm.runtime import batch_of
from atlas.sae.cache_folder import held_bytes
from atlas.sae.model import SAE
from atlas.settings import Settings

log = logging.getLogger(__name__)

_EXAMPLES = TOP_EXAMPLES + N_GROUPS * PER_GROUP + N_RANDOM


def can_keep(config: BuildConfig, model: LanguageModel, saes: Sequence[SAE]) -> bool:
    """Whether keeping the residual stream for DFA of ``saes`` would help, wherever there is room.

    It would not on a GPU, which runs the model faster than a disk is read; where DFA will look at few of the
    blocks; for SAEs on attn_out; and for models whose attention does not follow from it alone.
    """
    reading = [sae for sae in saes if reads_heads(sae)]
    few = _EXAMPLES * sum(sae.d_sae for sae in reading) < config.analysis.blocks
    if few or model.device.type != "cpu" or any(sae.info.site.kind != "z" for sae in reading):
        return False
    return replays(model, batch_of(BATCH_BLOCKS), config.corpus.context)


def kept_residuals(
    config: BuildConfig, text: str, settings: Settings, model: LanguageModel, saes: Sequence[SAE]
) -> KeptResiduals | None:
    """The residual stream before the layers whose heads ``saes`` read; None where it is not to be kept.

    ``text`` is the digest of the build's text.
    """
    if settings.residual_gb == 0 or not can_keep(config, model, saes):
        return None
    about = {"text": text, "context": config.corpus.context}
    layers = [sae.info.site.layer for sae in saes if reads_heads(sae)]
    try:
        room = _room(settings)
        return KeptResiduals(model, layers, about, batch_of(BATCH_BLOCKS), settings.residuals, room)
    except (StoreError, OSError) as error:
        log.warning("the residual stream is not kept: %s", error)
        return None


def _room(settings: Settings) -> int:
    """Bytes for all texts: what the settings allow, and at most half of what is free without them."""
    free = held_bytes(settings.residuals) + shutil.disk_usage(settings.home).free
    return min(int(settings.residual_gb * 1e9), free // 2)
