"""What is lost without a head: exact zero- and mean-ablation of every head's output.

Question
    How much does the next-token loss rise when the output of one head is taken away, or replaced by its mean?

Formula
    For head h and every prediction counted, with z[h] replaced at every position (BOS too)::

        effect = mean of cross-entropy with z[h] = 0 (or mean z[h])  -  mean of cross-entropy as it is    nats

    z is the head's output before W_O, in the model's own processing; the mean is over the tokens of the
    evaluation text, position 0 left out. Only block h's layer and those after it are run again. The standard
    error is that of a mean over rows (blocks, or prompts).

Source
    Seed 001, row B9 (zero-ablation by task); Michel et al. 2019, "Are Sixteen Heads Really Better than One?".
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atlas.lm.hooks import Resume, capture, logits_with
from atlas.lm.load import LanguageModel
from atlas.sites import Site

KINDS = ("zero", "mean")
_MOST_LOGITS = {"cpu": 2**22, "cuda": 2**27}
"""Logits of the copies that run at once: what stays in a processor's cache is fastest."""
Counted = Bool[Tensor, "row next"]


class Ablations(NamedTuple):
    """Summed losses of each row: as the model is, and with one head ablated; float64, in nats."""

    clean: Float[Tensor, " row"]
    without: Float[Tensor, "kind layer head row"]
    n: Int[Tensor, " row"]

    def effect(self) -> Float[Tensor, "kind layer head"]:
        """The rise of the mean loss.

        >>> Ablations(torch.tensor([2.0, 4.0]), torch.full((1, 1, 1, 2), 4.0), torch.tensor([1, 3])).effect()
        tensor([[[0.5000]]])
        """
        return (self.without - self.clean).sum(3) / self.n.sum()

    def standard_error(self) -> Float[Tensor, "kind layer head"]:
        """Of the effect, rows taken as independent (ratio estimator); NaN for a single row."""
        rows = len(self.clean)
        if rows < 2:
            return torch.full_like(self.without[..., 0], float("nan"))
        rest = (self.without - self.clean) - self.effect()[..., None] * self.n
        return (rest.square().sum(3) * rows / (rows - 1)).sqrt() / self.n.sum()


def summed_loss(
    logits: Float[Tensor, "row pos d_vocab"], tokens: Int[Tensor, "row pos"], counted: Counted
) -> Float[Tensor, " row"]:
    """Return each row's cross-entropy, summed over the predictions that count.

    >>> one = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    >>> summed_loss(one, torch.tensor([[0, 1]]), torch.tensor([[True]])).round(decimals=4).tolist()
    [0.6931]
    """
    # Only what counts goes through the softmax, which costs more than the unembedding.
    row, position = counted.nonzero(as_tuple=True)
    loss = torch.nn.functional.cross_entropy(
        logits[row, position].float(), tokens[row, position + 1], reduction="none"
    )
    found = torch.zeros(len(tokens), dtype=torch.float64, device=loss.device)
    return found.index_add_(0, row, loss.double()).cpu()


@torch.no_grad()
def ablate(
    model: LanguageModel,
    tokens: Int[Tensor, "row pos"],
    counted: Counted,
    means: Sequence[Float[Tensor, "n_heads d_head"]],
    layers: Sequence[int],
    tick: Callable[[int], None] = lambda _: None,
) -> Ablations:
    """Ablate every head of some layers, one at a time, on these rows; ``means`` has one entry per layer.

    ``tick`` is told how many rows of a layer are done. Memory does not grow with the number of rows.
    """
    shape, n = model.shape, len(tokens)
    most = _MOST_LOGITS.get(model.device.type, 2**22)
    at_once = max(1, most // (tokens.shape[1] * shape.d_vocab))
    step = max(1, at_once // (len(KINDS) * shape.n_heads))
    clean = torch.zeros(n, dtype=torch.float64)
    without = torch.zeros(len(KINDS), len(layers), shape.n_heads, n, dtype=torch.float64)
    sites = [Site("resid_pre", layer) for layer in layers]
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        batch = _Batch(model, tokens[rows].to(model.device), counted[rows].to(model.device))
        clean[rows] = batch.loss({}, None, 1)[0]
        entering, _ = capture(model, batch.tokens, sites)
        for at, (layer, site) in enumerate(zip(layers, sites, strict=True)):
            without[:, at, :, rows] = _layer(batch, layer, entering[site], means[at], at_once)
            tick(rows.stop - rows.start)
    return Ablations(clean, without, counted.sum(1).cpu())


class _Batch(NamedTuple):
    """Some rows, and passes over several copies of them."""

    model: LanguageModel
    tokens: Int[Tensor, "row pos"]
    counted: Counted

    def loss(
        self, edits: dict[Site, Callable[[Tensor], Tensor]], resume: Resume | None, copies: int
    ) -> Float[Tensor, "copy row"]:
        tokens, counted = self.tokens.repeat(copies, 1), self.counted.repeat(copies, 1)
        logits = logits_with(self.model, tokens, edits, resume)
        return summed_loss(logits, tokens, counted).reshape(copies, -1)


def _layer(
    batch: _Batch,
    layer: int,
    entering: Float[Tensor, "row pos d_model"],
    mean: Float[Tensor, "n_heads d_head"],
    at_once: int,
) -> Float[Tensor, "kind head row"]:
    """Every head of a layer, as many at once as fit."""
    n_heads = batch.model.shape.n_heads
    instead = torch.stack([torch.zeros_like(mean), mean]).to(entering)
    chosen = [(kind, head) for kind in range(len(KINDS)) for head in range(n_heads)]
    step, found = max(1, at_once // len(batch.tokens)), []
    for some in (chosen[i : i + step] for i in range(0, len(chosen), step)):

        def replace(z: Tensor, some: list[tuple[int, int]] = some) -> Tensor:
            out = z.clone().reshape(len(some), len(batch.tokens), z.shape[1], n_heads, -1)
            for copy, (kind, head) in enumerate(some):
                out[copy, :, :, head] = instead[kind, head]
            return out.flatten(0, 1).flatten(2)

        resume = Resume(layer, entering.repeat(len(some), 1, 1))
        found.append(batch.loss({Site("z", layer): replace}, resume, len(some)))
    return torch.cat(found).reshape(len(KINDS), n_heads, -1)
