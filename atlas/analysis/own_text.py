"""Features on a text that somebody typed: what fires where, and which heads and sources made it fire.

The same numbers as in the tables (activations, and DFA as in ``atlas.analysis.dfa``), for one text: BOS, then
the tokens of the text, in one block. Sources: seed 002 (row C8), seed 003 (row D8).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.analysis.contributions import contributions, largest
from atlas.analysis.dfa import reads_heads
from atlas.analysis.dfa_sums import matched_prefix
from atlas.analysis.weights import attribution_directions
from atlas.corpus.tokens import bos_id, load_tokenizer, vocabulary
from atlas.errors import ConfigError, SAEError
from atlas.lm.hooks import capture
from atlas.lm.load import LanguageModel
from atlas.sae.model import SAE

MOST_CHARACTERS, MOST_TOKENS = 20_000, 512
MOST_ATTRIBUTED = 64
"""Positions of a text for which DFA is given, the strongest ones."""


class Text(NamedTuple):
    """A text as the model reads it."""

    tokens: Int[Tensor, " pos"]
    texts: list[str]
    """Visible form of each token."""
    cut: bool
    """Whether the text went on after the last token."""


class Reading(NamedTuple):
    """How one feature reads z: its heads, its direction in each, and what is added to the sum."""

    heads: list[int]
    direction: Float[Tensor, "heads d_head"]
    offset: float


def read_text(model: LanguageModel, text: str, most: int = MOST_TOKENS) -> Text:
    """BOS and the text's tokens, as many as the model and ``most`` let through.

    Raises:
        ConfigError: the text is empty or longer than 20,000 characters.
    """
    if not text.strip():
        raise ConfigError("the text is empty; allowed: 1 to 20,000 characters")
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"the text has {len(text):,} characters; allowed: 1 to {MOST_CHARACTERS:,}")
    tokenizer = model.bridge.tokenizer or load_tokenizer(model.files.path)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    most = min(most, model.shape.n_ctx)
    kept = [bos_id(tokenizer), *ids][:most]
    return Text(torch.tensor(kept, device=model.device), shown(model, kept), len(ids) + 1 > most)


_SHOWN: dict[str, list[str]] = {}


def shown(model: LanguageModel, ids: Sequence[int]) -> list[str]:
    """The visible form of tokens, as the table ``vocab`` has it."""
    if model.files.digest not in _SHOWN:
        _SHOWN.clear()
        _SHOWN[model.files.digest] = vocabulary(load_tokenizer(model.files.path), model.shape.d_vocab)[0]
    texts = _SHOWN[model.files.digest]
    return [texts[i] for i in ids]


def make_ready() -> None:
    """Compile what attribution is made of, so that the first question after an installation need not wait."""
    nowhere = np.zeros(1, np.int64)
    largest(torch.zeros(1, 1, 1), nowhere)
    matched_prefix(nowhere, nowhere, nowhere)


@torch.no_grad()
def firing_features(
    model: LanguageModel, saes: Sequence[SAE], tokens: Int[Tensor, " pos"], k: int = 20
) -> list[list[dict[str, Any]]]:
    """The k features of each SAE that fire most strongly on a text, BOS left out.

    A feature: its number, its largest activation, the position of it (the first of equals), and every
    position with its activation. In order of the largest activation; ties go to the lower feature.
    """
    sites = list(dict.fromkeys(sae.info.site for sae in saes))
    activations, _ = capture(model, tokens[None], sites)
    return [_firing(sae, activations[sae.info.site][0].float(), k) for sae in saes]


def _firing(sae: SAE, x: Float[Tensor, "pos d_in"], k: int) -> list[dict[str, Any]]:
    row, feature, value = (part.cpu().tolist() for part in sae.active(x))
    found: dict[int, list[tuple[int, float]]] = {}
    for position, number, activation in zip(row, feature, value, strict=True):
        if position > 0:
            found.setdefault(number, []).append((position, activation))
    best = {number: max(active, key=lambda one: (one[1], -one[0])) for number, active in found.items()}
    order = sorted(found, key=lambda number: (-best[number][1], number))[:k]
    return [
        {"feature": n, "activation": best[n][1], "position": best[n][0], "active": found[n]} for n in order
    ]


def reading_of(model: LanguageModel, sae: SAE, feature: int) -> Reading:
    """The direction through which one feature of an SAE on z or attn_out reads each head."""
    site, direction = sae.info.site, attribution_directions(sae)[:, feature]
    heads, offset = list(range(model.shape.n_heads)), 0.0
    if site.kind == "attn_out":
        offset = float(model.b_O(site.layer) @ direction)
        direction = model.W_O(site.layer).flatten(0, 1) @ direction
    elif site.head is not None:
        heads = [site.head]
    return Reading(heads, direction.reshape(len(heads), -1), offset)


@torch.no_grad()
def feature_on_text(
    model: LanguageModel, sae: SAE, tokens: Int[Tensor, " pos"], feature: int
) -> dict[str, Any]:
    """One feature on a text: activation and pre-activation at every position, and DFA where it fires.

    ``active`` lists (position, activation), BOS included; ``pre`` is the pre-activation of every position;
    ``dfa`` has an entry for each of the 64 strongest firing positions but BOS, or for the strongest
    pre-activation where the feature does not fire: position, by_head, bias_term, pre_activation, sources
    (head, source, contribution; the largest, to 95 % of the absolute sum), top_source, matched_prefix.
    Empty where the site does not sum over heads.

    Raises:
        SAEError: the SAE has no such feature.
    """
    if not 0 <= feature < sae.d_sae:
        raise SAEError(f"feature {feature} is not in {sae.info.name}; allowed: 0 to {sae.d_sae - 1}")
    site, layer = sae.info.site, sae.info.site.layer
    names = [f"blocks.{layer}.attn.hook_{what}" for what in ("pattern", "v")] if reads_heads(sae) else []
    activations, raw = capture(model, tokens[None], [site], names)
    x = activations[site][0].float()
    pre = sae.preactivations(x)
    fired = sae.firing(x, pre)
    mine = fired.feature == feature
    pairs = zip(fired.row[mine].tolist(), fired.value[mine].tolist(), strict=True)
    active = [(position, value) for position, value in pairs]
    column = pre[:, feature]
    found: dict[str, Any] = {"active": active, "pre": column.tolist(), "dfa": []}
    if names:
        positions = _attributed(active, column)
        pattern, v = raw[names[0]][0].float(), raw[names[1]][0].float()
        reading = reading_of(model, sae, feature)
        found["dfa"] = _split(sae, reading, (pattern, v, x), tokens, (feature, positions))
    return found


@torch.no_grad()
def feature_on_blocks(
    model: LanguageModel, sae: SAE, tokens: Int[Tensor, "block pos"], feature: int
) -> list[list[tuple[int, float]]]:
    """Where one feature fires in blocks that begin with BOS: (position, activation) of each, BOS left out.

    Raises:
        SAEError: the SAE has no such feature.
    """
    if not 0 <= feature < sae.d_sae:
        raise SAEError(f"feature {feature} is not in {sae.info.name}; allowed: 0 to {sae.d_sae - 1}")
    site = sae.info.site
    activations, _ = capture(model, tokens, [site])
    found: list[list[tuple[int, float]]] = []
    for x in activations[site]:
        row, number, value = sae.active(x.float())
        mine = (number == feature) & (row > 0)
        found.append(list(zip(row[mine].tolist(), value[mine].tolist(), strict=True)))
    return found


def _attributed(active: list[tuple[int, float]], pre: Float[Tensor, " pos"]) -> list[int]:
    """The strongest firing positions, or where the feature came nearest to firing; BOS left out."""
    strongest = sorted((one for one in active if one[0] > 0), key=lambda one: (-one[1], one[0]))
    if strongest:
        return [position for position, _ in strongest[:MOST_ATTRIBUTED]]
    return [int(pre[1:].argmax()) + 1] if len(pre) > 1 else []


def _split(
    sae: SAE,
    reading: Reading,
    seen: tuple[
        Float[Tensor, "heads query key"], Float[Tensor, "key heads d_head"], Float[Tensor, "pos d_in"]
    ],
    tokens: Int[Tensor, " pos"],
    asked: tuple[int, list[int]],
) -> list[dict[str, Any]]:
    """DFA of one feature at some positions, strongest sources first."""
    feature, positions = asked
    if not positions:
        return []
    pattern, v, x = seen
    at = torch.tensor(positions, device=x.device)
    if len(reading.heads) < len(pattern):
        pattern, v = pattern[reading.heads], v[:, reading.heads]
    direction = reading.direction[None].expand(len(positions), -1, -1)
    dense = contributions(pattern, v, direction, at)
    scale = sae.scale(x[at])
    size = torch.ones(len(at), device=x.device) if scale is None else scale.size[:, 0]
    dense, bias = dense / size[:, None, None], float(sae.bias_term[feature]) + reading.offset / size
    where = np.array(positions)
    kept, by_head = largest(dense, where), dense.sum(2)
    places = [divmod_all(row[:n].tolist(), dense.shape[2]) for row, n in zip(kept.place, kept.n, strict=True)]
    sources = [
        [
            (reading.heads[head], source, float(value))
            for (head, source), value in zip(row, values, strict=False)
        ]
        for row, values in zip(places, kept.value, strict=True)
    ]
    top = np.where(kept.best < 0, -1, kept.best % dense.shape[2])
    matched = matched_prefix(tokens.cpu().numpy(), where, top)
    return [
        {
            "position": position,
            "by_head": by_head[i].tolist(),
            "bias_term": float(bias[i]),
            "pre_activation": float(by_head[i].sum() + bias[i]),
            "sources": sources[i],
            "top_source": None if top[i] < 0 else int(top[i]),
            "matched_prefix": int(matched[i]),
        }
        for i, position in enumerate(positions)
    ]


def divmod_all(places: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Row and column of places in a matrix.

    >>> divmod_all([0, 5], 4)
    [(0, 0), (1, 1)]
    """
    return [divmod(place, width) for place in places]
