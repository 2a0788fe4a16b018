"""The functions behind live calls. A model is {name, processing, digest}, an SAE is {name, digest}."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from atlas.analysis import own_text
from atlas.errors import ConfigError
from atlas.live.loaded import loaded

Asked = Mapping[str, Any]


def warm(model: Asked, saes: Sequence[Asked]) -> dict[str, Any]:
    """Load a model and some SAEs, so that the next call finds them."""
    here = loaded()
    known = here.model(model)
    own_text.shown(known, [])
    own_text.make_ready()
    return {"model": known.name, "saes": [here.sae(one).info.name for one in saes]}


def feature_on_text(model: Asked, sae: Asked, feature: int, text: str, most: int) -> dict[str, Any]:
    """One feature on a text: its tokens, and what ``own_text.feature_on_text`` says."""
    here = loaded()
    known = here.model(model)
    read = own_text.read_text(known, text, most)
    found = own_text.feature_on_text(known, here.sae(sae), read.tokens, feature)
    return {"tokens": read.tokens.tolist(), "texts": read.texts, "cut": read.cut, **found}


def features_on_text(model: Asked, saes: Sequence[Asked], text: str, most: int, k: int) -> dict[str, Any]:
    """The k strongest features of each SAE on a text, by the SAE's name."""
    here = loaded()
    known, loaded_saes = here.model(model), [here.sae(one) for one in saes]
    read = own_text.read_text(known, text, most)
    found = own_text.firing_features(known, loaded_saes, read.tokens, k)
    names = [sae.info.name for sae in loaded_saes]
    return {
        "tokens": read.tokens.tolist(),
        "texts": read.texts,
        "cut": read.cut,
        "saes": dict(zip(names, found, strict=True)),
    }


def feature_on_blocks(
    model: Asked, sae: Asked, feature: int, blocks: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Where one feature fires in blocks of token ids, all of one length: (position, activation) by block.

    Raises:
        ConfigError: blocks are empty, of several lengths, or hold tokens that the model does not have.
    """
    here = loaded()
    known = here.model(model)
    lengths, shape = {len(block) for block in blocks}, known.shape
    if len(lengths) != 1 or not 1 <= max(lengths) <= shape.n_ctx:
        raise ConfigError(f"blocks have {sorted(lengths)} tokens; allowed: one length of 1 to {shape.n_ctx}")
    tokens = torch.tensor(blocks, device=known.device)
    if int(tokens.min()) < 0 or int(tokens.max()) >= shape.d_vocab:
        raise ConfigError(f"blocks hold unknown tokens; allowed: 0 to {shape.d_vocab - 1}")
    return {"active": own_text.feature_on_blocks(known, here.sae(sae), tokens, feature)}
