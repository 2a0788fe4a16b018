"""Activations at sites, from a forward pass that goes from layer to layer by itself.

    x = embed(tokens) + pos_embed
    for each layer:  z = attention(ln1(x));  x = x + W_O z + b_O;  x = x + mlp(ln2(x))

These are the modules of the bridge and the operations that it applies between them, without what a hooked
pass does beside: no cache of keys and values, no mask made anew in each layer. Parts of a batch go side by
side, each in one thread, so that threads wait for each other once per batch and not in every operation. The
numbers are those of ``hooks.capture`` bit for bit. Whether they are is tried (``agrees``), and where they are
not, as in a model with rotary positions or parallel layers, ``capture`` reads them.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.lm.attention import attend, project
from atlas.lm.hooks import capture, read_site
from atlas.lm.load import LanguageModel
from atlas.lm.runtime import lanes
from atlas.sites import HEAD_KINDS, KINDS, Site

_LEAST, _MOST = 2, 8
"""Blocks that one thread works on at a time."""


def read_sites(
    model: LanguageModel,
    tokens: Int[Tensor, "batch pos"],
    sites: Sequence[Site],
    pool: ThreadPoolExecutor | None = None,
) -> dict[Site, Float[Tensor, "batch pos d_in"]]:
    """What ``hooks.capture`` gives at ``sites``; ``pool``: one of ``runtime.lanes``."""
    if model.device.type != "cpu" or not sites or not agrees(model, *tokens.shape):
        return capture(model, tokens, sites)[0]
    return _side_by_side(model, tokens, sites, pool)


def _side_by_side(
    model: LanguageModel, tokens: Tensor, sites: Sequence[Site], pool: ThreadPoolExecutor | None
) -> dict[Site, Tensor]:
    if pool is None:
        with lanes() as own:
            return _side_by_side(model, tokens, sites, own)
    found = {s: torch.empty(*tokens.shape, s.d_in(model.shape), dtype=torch.float32) for s in sites}

    @torch.no_grad()
    def read(part: slice) -> None:
        for site, value in _values(model, tokens[part], sites):
            found[site][part] = value

    size = max(_LEAST, min(_MOST, -(-len(tokens) // torch.get_num_threads())))
    parts = [slice(first, first + size) for first in range(0, len(tokens), size)]
    list(pool.map(read, parts))
    return found


def _values(
    model: LanguageModel, tokens: Int[Tensor, "batch pos"], sites: Sequence[Site]
) -> Iterator[tuple[Site, Float[Tensor, "batch pos d_in"]]]:
    """The sites' values, layer by layer, as far as the last layer that is asked for."""
    last = max(site.layer for site in sites)
    bridge = model.bridge
    x = bridge.embed(tokens) + bridge.pos_embed(torch.arange(tokens.shape[1])[None])
    for layer in range(last + 1):
        wanted = [site for site in sites if site.layer == layer]
        within = layer < last or any(site.kind not in ("resid_pre", *HEAD_KINDS) for site in wanted)
        values = {"resid_pre": x}
        if within or any(site.kind in HEAD_KINDS for site in wanted):
            heads = project(model, layer, x)
            values |= {"q": heads.q, "k": heads.k, "v": heads.v, "z": attend(heads)[1]}
        if within:
            block = bridge.blocks[layer]
            values["attn_out"] = block.attn.o(values["z"].flatten(2))
            x = values["attn_out"] + x
            values["mlp_out"] = block.mlp(block.ln2(x))
            x = x + values["mlp_out"]
        for site in wanted:
            yield site, read_site(values[site.kind], site)


@lru_cache(maxsize=4)
def agrees(model: LanguageModel, blocks: int, context: int) -> bool:
    """Whether a pass from layer to layer gives what a whole pass gives, in every bit, tried on tokens.

    At all kinds of sites of the first and the last layer, of a batch like the real ones.
    """
    tokens = torch.arange(blocks * context, device=model.device).reshape(blocks, context)
    layers = {0, model.shape.n_layers - 1}
    heads = {kind: (0,) if kind in ("q", "k", "v") else (None,) for kind in KINDS}
    sites = [Site(kind, layer, head) for layer in sorted(layers) for kind in KINDS for head in heads[kind]]
    tokens %= model.shape.d_vocab
    whole = capture(model, tokens, sites)[0]
    try:
        found = _side_by_side(model, tokens, sites, None)
    except (AttributeError, RuntimeError, TypeError, ValueError, LookupError):
        return False
    return all(torch.equal(whole[site], found[site]) for site in sites)
