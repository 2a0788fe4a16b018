"""The functions behind live calls. A model is {name, processing, digest}, an SAE is {name, digest}."""

from collections.abc import Mapping, Sequence
from typing import Any

from atlas.analysis import own_text
from atlas.live.loaded import loaded

Asked = Mapping[str, Any]


def warm(model: Asked, saes: Sequence[Asked]) -> dict[str, Any]:
    """Load a model and some SAEs, so that the next call finds them."""
    here = loaded()
    known = here.model(model)
    own_text.shown(known, [])
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
