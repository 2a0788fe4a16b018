"""Induction that wants one token to match, or several: n-prefix induction, on random tokens and on text.

Question
    An induction head looks at what followed an earlier copy of its token. Does it do so wherever one token
    matches (A B ... A -> B), or only where a longer stretch does (X Y A B ... X Y A -> B)?

Formula
    Source j of destination i has a *match of n tokens* if n is the largest number with::

        tokens[i - m] == tokens[j - 1 - m]   for m = 0 .. n - 1,   j < i,   position 0 never matching

    so that n = 0 where j - 1 does not hold the destination's token. With A the attention pattern:

    - *prefix curve*: on random tokens whose last n repeat an earlier stretch, exactly n of them,
      ``attention(n) = mean A[end of the repetition, the position after the earlier stretch]``, and the direct
      logit attribution to the token there,

      ``dla(n) = z[h, end] W_O[h] . U[:, token] / scale``

      with U the unembedding with the final LayerNorm's weight, centred over d_model and the vocabulary, and
      scale the final LayerNorm's own at that position. Sequences of one block differ in nothing but the
      tokens before the matched ones, so positions and distances are the same for every n.
    - *text*: of all (destination, source >= 1) with ``A > threshold``, how many have a match of n tokens.
    - *corruption*: (destination, source) pairs of the text with a match of at least 2 that does not overlap
      what it repeats; the tokens before the destination that match are replaced by others, so that exactly
      the destination's own is left. Mean A before and after, over all pairs, and over those at which A was
      above the threshold.

Source
    Seed 001, rows B12 to B15 (Goldowsky-Dill et al. 2023 found the same in a two-layer model). The released
    code of seed 001 divides by the next layer's ln1 scale in the direct logit attribution; here it is the
    final LayerNorm's.

Axes: batch, head, query (destination i), key (source j).
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.errors import ConfigError
from atlas.lm.hooks import capture
from atlas.lm.load import LanguageModel
from atlas.sites import Site

LONGEST = 9
"""The longest repeated stretch on random tokens (seed 001: 1 to 9)."""
COUNTED = 10
"""Longer matches on text are counted as this length."""
THRESHOLDS = (0.1, 0.3, 0.5, 0.7)
THRESHOLD = 0.3
"""Seed 001's: attention that is no rest on BOS."""
SEQUENCE = 64
EXAMPLES_PER_BLOCK = 1


class PrefixSequences(NamedTuple):
    """Sequences that end in a repetition of 1, 2, ... tokens, and where its continuation stood before."""

    tokens: Int[Tensor, "sequence prefix pos"]
    source: Int[Tensor, " sequence"]

    @property
    def answer(self) -> Int[Tensor, " sequence"]:
        """The token that would continue the repetition."""
        return self.tokens[torch.arange(len(self.source)), 0, self.source]


def prefix_sequences(n: int, length: int, d_vocab: int, *, bos: int, seed: int) -> PrefixSequences:
    """Return ``n`` blocks of BOS and distinct random tokens, with repetitions of 1 to 9 tokens at the end.

    Between BOS and the end lie 9 tokens P and the answer, at a random place; the last 9 positions hold fresh
    tokens, of which the last k are replaced by the last k of P. Short contexts and small vocabularies get
    shorter blocks and fewer repetitions.

    >>> made = prefix_sequences(1, 24, 100, bos=0, seed=0)
    >>> end, before = made.tokens[0, 2, -3:].tolist(), int(made.source[0])
    >>> end == made.tokens[0, 2, before - 3 : before].tolist(), made.tokens.shape
    (True, torch.Size([1, 9, 24]))
    """
    length = min(length, d_vocab - 1)
    longest = min(LONGEST, (length - 3) // 2)
    if n < 1 or longest < 1:
        raise ConfigError(
            f"prefix sequences: {n} of {length} distinct tokens; allowed: at least 1 of at least 5"
        )
    random = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([token for token in range(d_vocab) if token != bos])
    rows, sources = [], []
    for _ in range(n):
        drawn = allowed[torch.randperm(len(allowed), generator=random)[: length - 1]]
        block = torch.cat([torch.tensor([bos]), drawn])
        # P begins anywhere such that P, the answer and the last stretch do not overlap.
        start = 1 + int(torch.randint(length - 2 * longest - 1, (1,), generator=random))
        source = start + longest
        each = block.repeat(longest, 1)
        for k in range(1, longest + 1):
            each[k - 1, length - k :] = block[source - k : source]
        rows.append(each)
        sources.append(source)
    return PrefixSequences(torch.stack(rows), torch.tensor(sources))


class PrefixCurve(NamedTuple):
    """Mean attention and direct logit attribution of every head against the length of the repetition."""

    attention: Float[Tensor, "layer head prefix"]
    dla: Float[Tensor, "layer head prefix"]
    n: int


@torch.no_grad()
def prefix_curve(model: LanguageModel, made: PrefixSequences, batch: int = 64) -> PrefixCurve:
    """Measure the prefix curve of every head."""
    n, longest, _ = made.tokens.shape
    shape = model.shape
    attention = torch.zeros(shape.n_layers, shape.n_heads, n * longest, dtype=torch.float64)
    dla = torch.zeros_like(attention)
    tokens = made.tokens.flatten(0, 1)
    source, answer = (x.repeat_interleave(longest) for x in (made.source, made.answer))
    hooks = [f"blocks.{layer}.attn.hook_pattern" for layer in range(shape.n_layers)]
    sites = [Site("z", layer) for layer in range(shape.n_layers)]
    last = f"blocks.{shape.n_layers - 1}.hook_resid_post"
    directions = model.logit_directions()
    for start in range(0, len(tokens), batch):
        rows = slice(start, min(start + batch, len(tokens)))
        z, raw = capture(model, tokens[rows].to(model.device), sites, [*hooks, last])
        wanted = directions[:, answer[rows].to(model.device)].T
        wanted = wanted / final_scale(model, raw[last][:, -1])[:, None]
        here, at = torch.arange(rows.stop - rows.start), source[rows]
        for layer, (hook, site) in enumerate(zip(hooks, sites, strict=True)):
            attention[layer, :, rows] = raw[hook][here, :, -1, at].T.double().cpu()
            heads = z[site][:, -1].reshape(-1, shape.n_heads, shape.d_head)
            written = torch.einsum("bhe,hed,bd->hb", heads, model.W_O(layer), wanted)
            dla[layer, :, rows] = written.double().cpu()
    split = (shape.n_layers, shape.n_heads, n, longest)
    return PrefixCurve(attention.reshape(split).mean(2), dla.reshape(split).mean(2), n)


def final_scale(model: LanguageModel, resid: Float[Tensor, "batch d_model"]) -> Float[Tensor, " batch"]:
    """Return what the final LayerNorm divides a centred stream by: its root mean square, with epsilon."""
    centred = resid - resid.mean(1, keepdim=True)
    scale: Tensor = (centred.square().mean(1) + model.bridge.cfg.eps).sqrt()
    return scale


# --------------------------------------------------------------------------- text


def match_lengths(tokens: Int[Tensor, "batch pos"], longest: int = COUNTED) -> Int[Tensor, "batch query key"]:
    """Return how many tokens up to each query repeat those before each key, counted up to ``longest``.

    >>> match_lengths(torch.tensor([[0, 5, 6, 7, 5, 6]]))[0, 5].tolist()
    [0, 0, 0, 2, 0, 0]
    """
    length = tokens.shape[1]
    same = torch.zeros(len(tokens), length, length, dtype=torch.bool, device=tokens.device)
    # Keys before the query alone; position 0 is BOS and matches nothing.
    same[:, 1:, 2:] = (tokens[:, 1:, None] == tokens[:, None, 1:-1]).tril(-2)
    found = same.to(torch.int64)
    running = same
    for _ in range(1, longest):
        # One more matches where this one does and the match that ends one token earlier has that many.
        running = same & torch.nn.functional.pad(running[:, :-1, :-1], (1, 0, 1, 0))
        if not running.any():
            break
        found += running
    return found


def count_matches(
    pattern: Float[Tensor, "batch head query key"], matches: Int[Tensor, "batch query key"]
) -> Int[Tensor, "head threshold prefix"]:
    """Count attention above each threshold, BOS left out, by the length of the match it goes to.

    >>> pattern = torch.tensor([[[[1.0, 0, 0], [0.4, 0.6, 0], [0.2, 0.2, 0.6]]]])
    >>> count_matches(pattern, torch.zeros(1, 3, 3, dtype=torch.int64))[0, :, 0].tolist()
    [3, 2, 2, 0]
    """
    late = pattern[:, :, 1:, 1:]
    row, head, query, key = (late > THRESHOLDS[0]).nonzero(as_tuple=True)
    value, length = late[row, head, query, key], matches[row, query + 1, key + 1]
    width = COUNTED + 1
    counts = [
        torch.bincount((head * width + length)[value > threshold], minlength=late.shape[1] * width)
        for threshold in THRESHOLDS
    ]
    return torch.stack(counts, 1).reshape(late.shape[1], width, len(THRESHOLDS)).transpose(1, 2).cpu()


class LongMatches(NamedTuple):
    """Pairs (destination, source) of the text with a match of 2 tokens or more, a destination's longest."""

    tokens: Int[Tensor, "example pos"]
    corrupted: Int[Tensor, "example pos"]
    query: Int[Tensor, " example"]
    key: Int[Tensor, " example"]


def long_matches(blocks: Int[Tensor, "block pos"], d_vocab: int, *, bos: int, seed: int) -> LongMatches:
    """Draw a pair of each block, and cut their matches to one token by replacing those before it.

    A destination's source is the one of the longest match, the nearest of several. A replacement is any token
    but BOS and the one that matched.
    """
    random = np.random.default_rng(seed)
    rows, corrupted, queries, keys = [], [], [], []
    for block in blocks:
        # No cap: every matching token has to go. The repetition must not overlap what it repeats, or cutting
        # the one would change the other.
        lengths = match_lengths(block[None], block.shape[0])[0]
        position = torch.arange(len(block))
        lengths = lengths * (position <= position[:, None] - lengths)
        best = lengths.amax(1)
        able = (best >= 2).nonzero()[:, 0].numpy()
        for query in sorted(random.permutation(able)[:EXAMPLES_PER_BLOCK].tolist()):
            key = int((lengths[query] == best[query]).nonzero()[-1])
            changed = block.clone()
            for place in range(query - int(best[query]) + 1, query):
                changed[place] = _another(random, d_vocab, {bos, int(block[place])})
            rows.append(block)
            corrupted.append(changed)
            queries.append(query)
            keys.append(key)
    empty = blocks[:0]
    stacked = (torch.stack(rows), torch.stack(corrupted)) if rows else (empty, empty)
    return LongMatches(
        *stacked, torch.tensor(queries, dtype=torch.int64), torch.tensor(keys, dtype=torch.int64)
    )


def _another(random: np.random.Generator, d_vocab: int, not_these: set[int]) -> int:
    while (token := int(random.integers(d_vocab))) in not_these:
        pass
    return token


class Corruption(NamedTuple):
    """Attention of every head to the source of each pair, before and after its match is cut to one token."""

    before: Float[Tensor, "layer head example"]
    after: Float[Tensor, "layer head example"]


@torch.no_grad()
def corruption(model: LanguageModel, found: LongMatches, batch: int = 16) -> Corruption:
    """Measure every head's attention on the pairs, as they are and corrupted."""
    shape, n = model.shape, len(found.query)
    values = torch.zeros(2, shape.n_layers, shape.n_heads, n, dtype=torch.float64)
    hooks = [f"blocks.{layer}.attn.hook_pattern" for layer in range(shape.n_layers)]
    for which, tokens in enumerate((found.tokens, found.corrupted)):
        for start in range(0, n, batch):
            rows = slice(start, min(start + batch, n))
            _, raw = capture(model, tokens[rows].to(model.device), (), hooks)
            here = torch.arange(rows.stop - rows.start)
            for layer, hook in enumerate(hooks):
                at = raw[hook][here, :, found.query[rows], found.key[rows]]
                values[which, layer, :, rows] = at.T.double().cpu()
    return Corruption(*values)
