"""What a head's weights do by themselves: spectra of its two circuits, copying, suppression, succession.

Question
    A head reads with its QK circuit ``W_Q W_K^T`` and writes with its OV circuit ``W_V W_O``, both d_model x
    d_model matrices of rank d_head. How many directions do they use, and does the OV circuit give back the
    token that it read, take it away, or give the one that follows it?

Formula
    With singular values ``s`` of a circuit (weights as in the model's processing, biases left out)::

        frobenius = sqrt(sum s^2)    spectral = max s    effective_rank = exp(- sum p log p), p = s / sum s

    With ``E = (W_E - mean over d_model) * ln1.weight`` (what the head reads of a token, up to a scale) and U
    the unembedding with the final LayerNorm's weight, centred (``LanguageModel.logit_directions``)::

        OV: eigenvalues of E W_V W_O U      [d_vocab, d_vocab]
        QK: eigenvalues of E W_Q W_K^T E^T  [d_vocab, d_vocab]
        copying, matching = sum Re(eigenvalue) / sum |eigenvalue|    in [-1, 1]

    Both have rank d_head, and XY and YX share their nonzero eigenvalues, so those of the d_head x d_head
    matrices ``W_O U E W_V`` and ``W_K^T E^T E W_Q`` are all of them. 1 would be a head that only copies (or
    looks at its own token), -1 one that only suppresses.

    With ``e(t)`` the stream that enters the layer when the context is BOS and t (for layers after the first:
    what block 0 made of it, the *effective embedding*) and ``l(t) = ln1(e(t)) W_V W_O U`` the logits that
    attending to t would write::

        copying_top10     share of sampled tokens t that are among the 10 largest of l(t)
        copy_suppression  share of sampled tokens t that are among the 10 smallest of l(t)
        successor         share of the pairs t, t' of known sequences in which t' is the largest of l(t)
                          among the tokens of its sequence (chance: 1 / their number)

Source
    Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (eigenvalues, copying); Roy &
    Vetterli 2007, "The effective rank"; McDougall et al. 2023, "Copy Suppression" (the diagonal among the
    lowest); Gould et al. 2023, "Successor Heads" (effective embedding, ordinal sequences). Seed 001, row B6.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from atlas.lm.hooks import capture
from atlas.lm.load import LanguageModel
from atlas.sites import Site

TOP = 10
SAMPLED = 512
_MOST = 2**26
SEQUENCES: tuple[tuple[str, ...], ...] = (
    ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
     "November", "December"),
    ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"),
    tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    tuple("abcdefghijklmnopqrstuvwxyz"),
    ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"),
)  # fmt: skip
"""Ordinal sequences of Gould et al.; each is asked for with and without a leading space."""


class Spectrum(NamedTuple):
    """One circuit of one head."""

    singular_values: Float[Tensor, " d_head"]
    eigenvalues: Complex[Tensor, " d_head"]

    @property
    def share(self) -> float:
        """Sum of the eigenvalues' real parts over the sum of their magnitudes.

        >>> Spectrum(torch.ones(2), torch.tensor([3, -1 + 0j])).share
        0.5
        """
        total = float(self.eigenvalues.abs().sum())
        return float(self.eigenvalues.real.sum()) / total if total else 0.0


def effective_rank(singular_values: Float[Tensor, " d"]) -> float:
    """Return the exponential of the entropy of the singular values' shares; 0 for a zero matrix.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 6)
    2.0
    """
    s = singular_values.double()
    if not float(s.sum()):
        return 0.0
    p = s / s.sum()
    return float((-torch.special.xlogy(p, p).sum()).exp())


def low_rank_singular_values(
    left: Float[Tensor, "rows rank"], right: Float[Tensor, "rank columns"]
) -> Float[Tensor, " rank"]:
    """Return the singular values of ``left @ right``, largest first, without making the product.

    >>> low_rank_singular_values(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]])).tolist()
    [10.0]
    """
    r_left = torch.linalg.qr(left.double(), mode="r").R
    r_right = torch.linalg.qr(right.double().T, mode="r").R
    return cast(Tensor, torch.linalg.svdvals(r_left @ r_right.T))


def low_rank_eigenvalues(
    left: Float[Tensor, "rows rank"], right: Float[Tensor, "rank rows"]
) -> Complex[Tensor, " rank"]:
    """Return the eigenvalues of ``left @ right`` that may differ from 0, by magnitude, largest first.

    >>> low_rank_eigenvalues(torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 2.0]])).tolist()
    [(11+0j)]
    """
    found = torch.linalg.eigvals(right.double() @ left.double())
    # Conjugate pairs have one magnitude; the imaginary part keeps their order fixed.
    pairs = sorted(found.tolist(), key=lambda x: (-round(abs(x), 9), -x.real, -x.imag))
    return torch.tensor(pairs, dtype=torch.complex128)


def read_embedding(model: LanguageModel, layer: int) -> Float[Tensor, "d_vocab d_model"]:
    """Return every token's embedding as the layer's heads read it, up to a scale: E above."""
    W_E = cast(Tensor, model.bridge.W_E).detach().double()
    weight = getattr(model.bridge.blocks[layer].ln1, "weight", None)
    centred = W_E - W_E.mean(1, keepdim=True)
    return centred if weight is None else centred * weight.detach().double()


def spectra(model: LanguageModel, layer: int) -> list[dict[str, Spectrum]]:
    """Return the OV and the QK spectrum of every head of a layer."""
    W_Q, W_K, W_O = (w.double() for w in (model.W_Q(layer), model.W_K(layer), model.W_O(layer)))
    W_V, E = _W_V(model, layer).double(), read_embedding(model, layer)
    U_E = model.logit_directions().double() @ E
    E_E = E.T @ E
    return [
        {
            "OV": Spectrum(
                low_rank_singular_values(W_V[h], W_O[h]), low_rank_eigenvalues(W_V[h], W_O[h] @ U_E)
            ),
            "QK": Spectrum(
                low_rank_singular_values(W_Q[h], W_K[h].T), low_rank_eigenvalues(W_Q[h], W_K[h].T @ E_E)
            ),
        }
        for h in range(model.shape.n_heads)
    ]


def _W_V(model: LanguageModel, layer: int) -> Float[Tensor, "n_heads d_model d_head"]:
    return cast(Tensor, model.bridge.blocks[layer].attn.W_V).detach()


# --------------------------------------------------------------------------- tokens through the OV circuit


@torch.no_grad()
def token_streams(
    model: LanguageModel, tokens: Int[Tensor, " token"], bos: int, layers: Iterable[int]
) -> dict[int, Float[Tensor, "token d_model"]]:
    """Return what enters a layer of each token after BOS: before block 0, or the effective embedding."""
    wanted = {layer: Site("resid_pre", min(layer, 1)) for layer in layers}
    prompts = torch.stack([torch.full_like(tokens, bos), tokens], dim=1).to(model.device)
    found, _ = capture(model, prompts, tuple(dict.fromkeys(wanted.values())))
    return {layer: found[site][:, 1] for layer, site in wanted.items()}


@torch.no_grad()
def written_logits(
    model: LanguageModel, layer: int, stream: Float[Tensor, "token d_model"]
) -> Float[Tensor, "head token d_vocab"]:
    """Return the logits that each head of a layer would write when it attends to each token: l(t) above."""
    read = model.bridge.blocks[layer].ln1(stream[None])[0]
    values = torch.einsum("td,hde->hte", read, _W_V(model, layer))
    return values @ (model.W_O(layer) @ model.logit_directions())


class Copying(NamedTuple):
    """Tokens among the largest, and among the smallest, of what a head writes of them."""

    top: Int[Tensor, " head"]
    bottom: Int[Tensor, " head"]
    n: int


@torch.no_grad()
def copying(
    model: LanguageModel, layer: int, tokens: Int[Tensor, " token"], stream: Float[Tensor, "token d_model"]
) -> Copying:
    """Count the tokens that are among the 10 largest, and among the 10 smallest, logits written of them."""
    n_heads, d_vocab = model.shape.n_heads, model.shape.d_vocab
    top = torch.zeros(n_heads, dtype=torch.int64)
    bottom = torch.zeros(n_heads, dtype=torch.int64)
    step = max(1, _MOST // (n_heads * d_vocab))
    for some, ids in zip(torch.split(stream, step), torch.split(tokens.to(model.device), step), strict=True):
        logits = written_logits(model, layer, some)
        own = logits.gather(2, ids.expand(n_heads, -1)[:, :, None])
        n = min(TOP, d_vocab)
        top += (own >= logits.topk(n).values[..., -1:]).sum((1, 2)).cpu()
        bottom += (own <= logits.topk(n, largest=False).values[..., -1:]).sum((1, 2)).cpu()
    return Copying(top, bottom, len(tokens))


def sampled_tokens(d_vocab: int, special: Iterable[int]) -> Int[Tensor, " token"]:
    """Return up to 512 ordinary tokens, spread evenly over the vocabulary.

    >>> sampled_tokens(6, [0]).tolist()
    [1, 2, 3, 4, 5]
    """
    left_out = set(special)
    ordinary = torch.tensor([token for token in range(d_vocab) if token not in left_out])
    n = min(SAMPLED, len(ordinary))
    return ordinary[torch.arange(n) * len(ordinary) // max(1, n)]


def known_sequences(tokenizer: Any) -> list[list[int]]:
    """Return the runs of the ordinal sequences whose members are single tokens, three at least."""
    found = []
    for sequence in SEQUENCES:
        for space in ("", " "):
            runs: list[list[int]] = [[]]
            for word in sequence:
                ids = tokenizer(space + word, add_special_tokens=False)["input_ids"]
                if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
                    runs[-1].append(ids[0])
                elif runs[-1]:
                    runs.append([])
            found += [run for run in runs if len(run) >= 3 and len(set(run)) == len(run)]
    return found


@torch.no_grad()
def successors(
    model: LanguageModel,
    layer: int,
    sequences: list[list[int]],
    streams: list[Float[Tensor, "_ d_model"]],
) -> tuple[Int[Tensor, " head"], int]:
    """Count the pairs in which the successor is the largest logit of its sequence; and the pairs.

    ``streams`` holds, for each sequence, what enters the layer of each of its tokens.
    """
    right, n = torch.zeros(model.shape.n_heads, dtype=torch.int64), 0
    for sequence, stream in zip(sequences, streams, strict=True):
        logits = written_logits(model, layer, stream[:-1])[:, :, torch.tensor(sequence)]
        wanted = torch.arange(1, len(sequence), device=logits.device)
        right += (logits.argmax(2) == wanted).sum(1).cpu()
        n += len(sequence) - 1
    return right, n
