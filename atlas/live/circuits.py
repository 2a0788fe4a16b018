"""Live calls of the circuit explorer. A model is {name, processing, digest}, an SAE is {name, digest}."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from atlas.circuits.graph import circuit_tracer
from atlas.circuits.nodes import Bounds
from atlas.circuits.opening import one_per_layer
from atlas.circuits.parts import by_source
from atlas.circuits.passes import token_texts, tokenise
from atlas.circuits.trace import Tracer
from atlas.errors import ConfigError
from atlas.live.loaded import loaded
from atlas.lm.load import LanguageModel

Asked = Mapping[str, Any]
_KEPT: dict[tuple[str, ...], Tracer] = {}


def _tracer(model: Asked, saes: Sequence[Asked]) -> Tracer:
    """The tracer through these SAEs, one per layer and role; the last one is kept."""
    here = loaded()
    known = here.model(model)
    key = (known.files.digest, known.processing, *(one["digest"] for one in saes))
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = Tracer(known, one_per_layer([here.sae(one) for one in saes]))
    return _KEPT[key]


def _tokens(model: LanguageModel, text: str, tokens: Sequence[int]) -> Int[Tensor, " pos"]:
    """The prompt: a text, or token ids (a block of the analysed text up to some position)."""
    if not tokens:
        return tokenise(model, text)
    if len(tokens) > model.shape.n_ctx or not all(0 <= one < model.shape.d_vocab for one in tokens):
        raise ConfigError(f"{len(tokens)} tokens are not a prompt of {model.name!r}")
    return torch.tensor(list(tokens))


def firing(
    model: Asked, saes: Sequence[Asked], text: str, tokens: Sequence[int], position: int, k: int
) -> dict[str, Any]:
    """The prompt's tokens, and the k attention features of each layer that fire most strongly at a position.

    A negative position counts from the end.
    """
    tracer = _tracer(model, saes)
    ids = _tokens(tracer.model, text, tokens)
    if not -len(ids) <= position < len(ids):
        raise ConfigError(f"position {position} does not exist; the prompt has positions 0 to {len(ids) - 1}")
    look, found = tracer.look(ids), {}
    for layer, wide in sorted(tracer.attention.items()):
        acts = look.attention(layer).acts[position]
        order = torch.argsort(-acts, stable=True)[:k].tolist()
        found[wide.sae.info.name] = [[f, float(acts[f])] for f in order if acts[f] > 0]
    return {
        "texts": token_texts(tracer.model, ids), "tokens": ids.tolist(), "position": position % len(ids),
        "saes": found,
    }  # fmt: skip


def trace(
    model: Asked,
    saes: Sequence[Asked],
    text: str,
    tokens: Sequence[int],
    sae: str,
    feature: int,
    position: int,
    bounds: Mapping[str, Any],
) -> dict[str, Any]:
    """A trace as JSON, the same as a graph, and the root's weights by head and source."""
    tracer = _tracer(model, saes)
    ids = _tokens(tracer.model, text, tokens)
    found = tracer.trace(ids, sae, feature, position, Bounds(**bounds))
    wide, at = tracer.wide(sae), position % len(ids)
    look = tracer.look(ids)
    weights = by_source(look.one, wide, look.attention(wide.sae.info.site.layer), feature, at).terms
    return {
        "trace": found.to_plain(),
        "graph": circuit_tracer(found),
        "by_head": weights[:, : at + 1].tolist(),
        "heads": list(range(weights.shape[0])),
    }
